//! Ranking rewards and losses on the emulator against their definitions and the CPU.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/ranking.rs"]
mod reference;

use common::cuda::{Costs, bits, for_each_schedule, reports_of, up, with_cuda, with_emulator};
use dust_kernels::ranking::{Ranking, RankingReward};
use dust_kernels::{Cpu, Cuda, Device, Error};
use reference::{
    Lists, check_all_of_four, check_list, pairwise, pairwise_f64, permutations, plackett_luce,
    plackett_luce_f64, random, rewards, shuffled,
};

const KINDS: [RankingReward; 3] = [
    RankingReward::PairwiseAccuracy,
    RankingReward::Ndcg,
    RankingReward::Selection,
];

/// Labels 0 and 1.
fn labels(seed: u64, len: usize) -> Vec<f32> {
    let positive = |x: &f32| f32::from(*x > 0.0);
    random(seed, len, 1.0).iter().map(positive).collect()
}

/// Both losses of three lists against their formulas.
fn check_losses(cuda: &Cuda, items: usize) {
    let (scores, order) = (random(1, 3 * items, 3.0), shuffled(2, 3, items));
    let got = plackett_luce(cuda, items, 0.5, &scores, &order);
    for list in 0..3 {
        let order = &order[list * items..][..items];
        check_list(list, items, &scores, &got, &|s| {
            0.5 * plackett_luce_f64(s, order)
        });
    }
    let labels = labels(5, 3 * items);
    let got = pairwise(cuda, items, 0.5, &scores, &labels);
    for list in 0..3 {
        let y = &labels[list * items..][..items];
        check_list(list, items, &scores, &got, &|s| 0.5 * pairwise_f64(s, y));
    }
}

#[test]
fn matches_the_definitions_under_every_schedule() {
    for_each_schedule(|_, cuda| {
        check_all_of_four(cuda);
        for items in [1, 2, 7, 33] {
            check_losses(cuda, items);
        }
    });
}

#[test]
fn long_lists_match_the_definitions() {
    with_cuda(|cuda, _| check_losses(cuda, 111));
}

fn close((got_loss, got_d): &Lists, (want_loss, want_d): &Lists) {
    let both = got_loss.iter().zip(want_loss);
    for (got, want) in both.chain(got_d.iter().zip(want_d)) {
        let off = (got - want).abs();
        assert!(off <= 3e-7 * (1.0 + want.abs()), "{got} {want}");
    }
}

#[test]
fn agrees_with_the_cpu() {
    let cpu = Cpu::with_threads(1);
    with_cuda(|cuda, _| {
        for items in [1, 2, 31, 32, 33, 63, 64] {
            let (order, y) = (shuffled(6, 9, items), labels(7, 9 * items));
            for kind in KINDS {
                let got = rewards(cuda, kind, items, &order, &y);
                let want = rewards(&cpu, kind, items, &order, &y);
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() <= 1.2e-7, "{kind:?}: {got} {want}");
                }
            }
            let scores = random(8, 9 * items, 5.0);
            close(
                &plackett_luce(cuda, items, 0.3, &scores, &order),
                &plackett_luce(&cpu, items, 0.3, &scores, &order),
            );
            close(
                &pairwise(cuda, items, 0.3, &scores, &y),
                &pairwise(&cpu, items, 0.3, &scores, &y),
            );
        }
    });
}

#[test]
fn the_best_order_earns_one_and_the_worst_nothing() {
    with_cuda(|cuda, _| {
        for items in [2usize, 7, 33, 64] {
            let labels: Vec<f32> = (0..items).map(|i| (i % 2) as f32).collect();
            let even = (0..items as u32).filter(|i| i % 2 == 0);
            let best: Vec<u32> = (0..items as u32)
                .filter(|i| i % 2 == 1)
                .chain(even)
                .collect();
            let worst: Vec<u32> = best.iter().rev().copied().collect();
            for kind in KINDS {
                assert_eq!(rewards(cuda, kind, items, &best, &labels), [1.0]);
                let low = rewards(cuda, kind, items, &worst, &labels)[0];
                assert!(low < 1.0, "{kind:?}");
                assert!(low == 0.0 || kind == RankingReward::Ndcg, "{kind:?}");
            }
        }
    });
}

#[test]
fn what_is_no_permutation_gets_the_invalid_reward_and_its_neighbours_theirs() {
    let rows = [[0, 1, 2], [0, 0, 1], [0, 1, 3], [2, 1, 0], [u32::MAX, 0, 1]];
    let labels = [1.0, 0.0, 0.0].repeat(5);
    with_cuda(|cuda, _| {
        let kind = RankingReward::PairwiseAccuracy;
        let got = rewards(cuda, kind, 3, rows.as_flattened(), &labels);
        assert_eq!(got, [1.0, -1.0, -1.0, 0.0, -1.0]);
    });
}

#[test]
fn plackett_luce_likelihoods_of_all_orders_sum_to_one() {
    let orders = permutations(4);
    let scores = random(3, 4, 2.0).repeat(24);
    let (loss, _) = with_cuda(|cuda, _| plackett_luce(cuda, 4, 1.0, &scores, &orders.concat()));
    let total: f64 = loss.iter().map(|&l| f64::from(-l).exp()).sum();
    assert!((total - 1.0).abs() < 1e-6, "{total}");
}

#[test]
fn large_scores_are_safe_and_lists_without_contrast_have_no_loss() {
    with_cuda(|cuda, _| {
        let scores = [1e30, -1e30, 1e30];
        let (loss, d) = plackett_luce(cuda, 3, 1.0, &scores, &[0, 2, 1]);
        assert_eq!(loss, [2f32.ln()]);
        assert_eq!(d, [-0.5, 0.0, 0.5]);
        let (loss, d) = plackett_luce(cuda, 3, 1.0, &scores, &[1, 0, 2]);
        assert_eq!(loss, [2e30]);
        assert_eq!(d, [0.0, -1.0, 1.0]);
        let (loss, d) = pairwise(cuda, 2, 1.0, &scores[..2], &[1.0, 0.0]);
        assert_eq!((loss, d), (vec![0.0], vec![0.0, 0.0]));
        let (loss, d) = pairwise(cuda, 2, 1.0, &scores[..2], &[0.0, 1.0]);
        assert_eq!((loss, d), (vec![2e30], vec![1.0, -1.0]));
        let (loss, d) = pairwise(cuda, 3, 1.0, &[1.0, 2.0, 3.0], &[1.0; 3]);
        assert_eq!((loss, d), (vec![0.0], vec![0.0; 3]));
    });
}

#[test]
fn bits_depend_on_the_list_alone() {
    with_cuda(|cuda, _| {
        let items = 37;
        let (scores, order) = (random(9, 6 * items, 3.0), shuffled(10, 6, items));
        let y = labels(11, 6 * items);
        let last = 5 * items..6 * items;
        for (all, alone) in [
            (
                plackett_luce(cuda, items, 0.5, &scores, &order),
                plackett_luce(
                    cuda,
                    items,
                    0.5,
                    &scores[last.clone()],
                    &order[last.clone()],
                ),
            ),
            (
                pairwise(cuda, items, 0.5, &scores, &y),
                pairwise(cuda, items, 0.5, &scores[last.clone()], &y[last.clone()]),
            ),
        ] {
            assert_eq!(bits(&all.0[5..]), bits(&alone.0));
            assert_eq!(bits(&all.1[last.clone()]), bits(&alone.1));
        }
    });
}

#[test]
fn an_order_that_is_no_permutation_is_named_and_its_list_left_alone() {
    with_cuda(|cuda, _| {
        let (scores, weight) = (up(cuda, &[0f32; 9]), 1.0);
        for (bad, name, at, value, limit) in [
            ([0, 1, 3], "order", 5, 3, 3),
            ([2, 1, 2], "occurrences in order", 5, 2, 2),
        ] {
            let order: Vec<u32> = [[0, 1, 2], bad, [2, 0, 1]].concat();
            let order = up(cuda, &order);
            let (mut loss, mut d) = (up(cuda, &[7f32; 3]), up(cuda, &[7f32; 9]));
            cuda.plackett_luce_loss(3, 3, weight, &scores, &order, &mut loss, &mut d)
                .unwrap();
            let op = "plackett_luce_loss";
            let want = Error::OutOfRange {
                op,
                name,
                at,
                value,
                limit,
            };
            assert_eq!(cuda.download(&loss).unwrap_err(), want);
            let (loss, d) = (cuda.download(&loss).unwrap(), cuda.download(&d).unwrap());
            assert!((loss[0] - 6f32.ln()).abs() < 1e-6 && loss[0] == loss[2]);
            assert_eq!(loss[1], 7.0);
            assert_eq!(d[3..6], [7.0; 3]);
            assert!(d[..3].iter().chain(&d[6..]).all(|&d| d != 7.0));
        }
    });
}

#[test]
fn bad_arguments_are_refused_as_on_the_cpu() {
    with_cuda(|cuda, _| {
        let (order, x) = (cuda.zeros::<u32>(130).unwrap(), up(cuda, &[0f32; 130]));
        let (mut a, mut b) = (up(cuda, &[0f32; 3]), up(cuda, &[0f32; 130]));
        for items in [0, 65] {
            let kind = RankingReward::Ndcg;
            let error = cuda
                .ranking_reward(2, items, kind, 0.0, &order, &x, &mut a)
                .unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
        let error = cuda
            .plackett_luce_loss(66, 2, 1.0, &x, &order, &mut a, &mut b)
            .unwrap_err();
        assert!(matches!(error, Error::TooShort { name: "scores", .. }));
        let error = cuda
            .pairwise_logistic_loss(4, 2, 1.0, &x, &x, &mut a, &mut b)
            .unwrap_err();
        assert!(matches!(error, Error::TooShort { name: "loss", .. }));
        let error = cuda
            .plackett_luce_loss(0, 4097, 1.0, &x, &order, &mut a, &mut b)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "plackett_luce_loss: `items` is 4097, on a CUDA device it may not be above 4096"
        );
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let (lists, items) = (64, 64);
        let n = lists * items;
        let scores = up(cuda, &random(1, n, 3.0));
        let order = up(cuda, &shuffled(2, lists, items));
        let y = up(cuda, &labels(3, n));
        let (mut loss, mut d) = (cuda.zeros(lists).unwrap(), cuda.zeros(n).unwrap());
        let reports = reports_of(emulator, || {
            let kind = RankingReward::PairwiseAccuracy;
            cuda.ranking_reward(lists, items, kind, 0.0, &order, &y, &mut loss)
        });
        Costs::memory_bound(8 * n + 4 * lists).check("ranking_reward", &reports);
        let reports = reports_of(emulator, || {
            cuda.pairwise_logistic_loss(lists, items, 1.0, &scores, &y, &mut loss, &mut d)
        });
        Costs::memory_bound(12 * n + 4 * lists).check("pairwise_logistic_loss", &reports);
        let reports = reports_of(emulator, || {
            cuda.plackett_luce_loss(lists, items, 1.0, &scores, &order, &mut loss, &mut d)
        });
        Costs::memory_bound(12 * n + 4 * lists).check("plackett_luce_loss", &reports);
    });
}
