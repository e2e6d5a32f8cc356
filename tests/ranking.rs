//! Ranking rewards over all orders, and ranking losses against f64 and finite differences.

#[path = "reference/ranking.rs"]
mod reference;

use dust_kernels::ranking::{Ranking, RankingReward};
use dust_kernels::{Cpu, Device, Error};
use reference::{
    check_all_of_four, check_list, pairwise, pairwise_f64, permutations, plackett_luce,
    plackett_luce_f64, random, rewards, shuffled,
};

#[test]
fn rewards_match_brute_force_over_all_orders_and_labels_of_four() {
    check_all_of_four(&Cpu::with_threads(2));
}

#[test]
fn the_best_order_earns_one_and_the_worst_nothing() {
    let cpu = Cpu::with_threads(1);
    for items in [2usize, 7, 33, 64] {
        let labels: Vec<f32> = (0..items).map(|i| (i % 2) as f32).collect();
        let odd_first = (0..items)
            .filter(|i| i % 2 == 1)
            .chain((0..items).filter(|i| i % 2 == 0));
        let best: Vec<u32> = odd_first.map(|i| i as u32).collect();
        let worst: Vec<u32> = best.iter().rev().copied().collect();
        for kind in [
            RankingReward::PairwiseAccuracy,
            RankingReward::Ndcg,
            RankingReward::Selection,
        ] {
            assert_eq!(
                rewards(&cpu, kind, items, &best, &labels),
                [1.0],
                "{kind:?}"
            );
            let low = rewards(&cpu, kind, items, &worst, &labels)[0];
            assert!(low < 1.0, "{kind:?}");
            if kind != RankingReward::Ndcg {
                assert_eq!(low, 0.0, "{kind:?}");
            }
        }
    }
}

#[test]
fn what_is_no_permutation_gets_the_invalid_reward_and_its_neighbours_theirs() {
    let rows = [[0, 1, 2], [0, 0, 1], [0, 1, 3], [2, 1, 0], [u32::MAX, 0, 1]];
    let labels = [1.0, 0.0, 0.0].repeat(5);
    for threads in [1, 2, 5] {
        let cpu = Cpu::with_threads(threads);
        let got = rewards(
            &cpu,
            RankingReward::PairwiseAccuracy,
            3,
            rows.as_flattened(),
            &labels,
        );
        assert_eq!(got, [1.0, -1.0, -1.0, 0.0, -1.0]);
    }
}

#[test]
fn plackett_luce_matches_f64() {
    let cpu = Cpu::with_threads(2);
    for items in [1, 2, 7, 111] {
        let scores = random(1, 3 * items, 3.0);
        let order = shuffled(2, 3, items);
        let got = plackett_luce(&cpu, items, 0.5, &scores, &order);
        for list in 0..3 {
            let order = &order[list * items..][..items];
            check_list(list, items, &scores, &got, &|s| {
                0.5 * plackett_luce_f64(s, order)
            });
        }
        for threads in [1, 5] {
            assert_eq!(
                plackett_luce(&Cpu::with_threads(threads), items, 0.5, &scores, &order),
                got
            );
        }
    }
}

#[test]
fn plackett_luce_likelihoods_of_all_orders_sum_to_one() {
    let cpu = Cpu::with_threads(1);
    let orders = permutations(4);
    let scores = random(3, 4, 2.0).repeat(24);
    let (loss, _) = plackett_luce(&cpu, 4, 1.0, &scores, &orders.concat());
    let total: f64 = loss.iter().map(|&l| f64::from(-l).exp()).sum();
    assert!((total - 1.0).abs() < 1e-6, "{total}");
}

#[test]
fn pairwise_logistic_matches_f64() {
    let cpu = Cpu::with_threads(2);
    for items in [1, 2, 7, 111] {
        let scores = random(4, 3 * items, 3.0);
        let labels: Vec<f32> = random(5, 3 * items, 1.0)
            .iter()
            .map(|&x| f32::from(x > 0.0))
            .collect();
        let got = pairwise(&cpu, items, 0.5, &scores, &labels);
        for list in 0..3 {
            let y = &labels[list * items..][..items];
            check_list(list, items, &scores, &got, &|s| 0.5 * pairwise_f64(s, y));
        }
        for threads in [1, 5] {
            assert_eq!(
                pairwise(&Cpu::with_threads(threads), items, 0.5, &scores, &labels),
                got
            );
        }
    }
    let (loss, d) = pairwise(&cpu, 3, 1.0, &[1.0, 2.0, 3.0], &[1.0; 3]);
    assert_eq!((loss, d), (vec![0.0], vec![0.0; 3]));
}

#[test]
fn large_scores_are_safe() {
    let cpu = Cpu::with_threads(1);
    let scores = [1e30, -1e30, 1e30];
    // Both at the top are equal, the last is beyond reach: ln 2 for the choice between the two.
    let (loss, d) = plackett_luce(&cpu, 3, 1.0, &scores, &[0, 2, 1]);
    assert_eq!(loss, [2f32.ln()]);
    assert_eq!(d, [-0.5, 0.0, 0.5]);
    let (loss, d) = plackett_luce(&cpu, 3, 1.0, &scores, &[1, 0, 2]);
    assert_eq!(loss, [2e30]);
    assert_eq!(d, [0.0, -1.0, 1.0]);
    let (loss, d) = pairwise(&cpu, 2, 1.0, &scores[..2], &[1.0, 0.0]);
    assert_eq!((loss, d), (vec![0.0], vec![0.0, 0.0]));
    let (loss, d) = pairwise(&cpu, 2, 1.0, &scores[..2], &[0.0, 1.0]);
    assert_eq!((loss, d), (vec![2e30], vec![1.0, -1.0]));
}

#[test]
fn bad_arguments_are_refused() {
    let cpu = Cpu::with_threads(1);
    let order = cpu.zeros::<u32>(130).unwrap();
    let x = cpu.zeros::<f32>(130).unwrap();
    let (mut a, mut b) = (cpu.zeros::<f32>(3).unwrap(), cpu.zeros::<f32>(130).unwrap());
    for items in [0, 65] {
        let kind = RankingReward::Ndcg;
        let error = cpu
            .ranking_reward(2, items, kind, 0.0, &order, &x, &mut a)
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Invalid {
                    op: "ranking_reward",
                    ..
                }
            ),
            "{error}"
        );
    }
    let kind = RankingReward::Selection;
    let error = cpu
        .ranking_reward(4, 2, kind, 0.0, &order, &x, &mut a)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "rewards",
                ..
            }
        ),
        "{error}"
    );
    let error = cpu
        .plackett_luce_loss(2, 2, 1.0, &x, &order, &mut a, &mut b)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "plackett_luce_loss: `order` of list 0 is no permutation of 0..2"
    );
    let error = cpu
        .plackett_luce_loss(66, 2, 1.0, &x, &order, &mut a, &mut b)
        .unwrap_err();
    assert!(
        matches!(error, Error::TooShort { name: "scores", .. }),
        "{error}"
    );
    let error = cpu
        .pairwise_logistic_loss(4, 2, 1.0, &x, &x, &mut a, &mut b)
        .unwrap_err();
    assert!(
        matches!(error, Error::TooShort { name: "loss", .. }),
        "{error}"
    );
}
