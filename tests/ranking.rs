//! Ranking rewards over all orders, and ranking losses against f64 and finite differences.

use dust_kernels::ranking::{Ranking, RankingReward};
use dust_kernels::{Cpu, Device, Error};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn permutations(n: u32) -> Vec<Vec<u32>> {
    if n == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(n - 1);
    let insert = |p: &Vec<u32>, at: usize| {
        let mut p = p.clone();
        p.insert(at, n - 1);
        p
    };
    shorter
        .iter()
        .flat_map(|p| (0..=p.len()).map(move |at| insert(p, at)))
        .collect()
}

fn rewards(
    cpu: &Cpu,
    kind: RankingReward,
    items: usize,
    order: &[u32],
    labels: &[f32],
) -> Vec<f32> {
    let rankings = order.len() / items;
    let mut out = cpu.zeros(rankings).unwrap();
    let (order, labels) = (cpu.upload(order).unwrap(), cpu.upload(labels).unwrap());
    cpu.ranking_reward(rankings, items, kind, -1.0, &order, &labels, &mut out)
        .unwrap();
    out.to_vec()
}

#[test]
fn rewards_match_brute_force_over_all_orders_and_labels_of_four() {
    let cpu = Cpu::with_threads(2);
    let orders = permutations(4);
    assert_eq!(orders.len(), 24);
    for mask in 0..16u32 {
        let labels: Vec<f32> = (0..4).map(|i| (mask >> i & 1) as f32).collect();
        let dcg = |order: &[u32]| -> f64 {
            (0..4)
                .map(|r| f64::from(labels[order[r] as usize]) / ((r + 2) as f64).log2())
                .sum()
        };
        let best = orders.iter().map(|o| dcg(o)).fold(0.0, f64::max);
        for order in &orders {
            let rank = |item: u32| order.iter().position(|&o| o == item);
            let (mut pairs, mut right) = (0, 0);
            for i in 0..4u32 {
                for j in 0..4u32 {
                    if labels[i as usize] > labels[j as usize] {
                        pairs += 1;
                        right += i32::from(rank(i) < rank(j));
                    }
                }
            }
            let all_or_none = if mask == 15 { 1.0 } else { 0.0 };
            let accuracy = if pairs == 0 {
                all_or_none
            } else {
                right as f32 / pairs as f32
            };
            let ndcg = if best == 0.0 { 0.0 } else { dcg(order) / best };
            let one = |kind| rewards(&cpu, kind, 4, order, &labels)[0];
            assert_eq!(one(RankingReward::PairwiseAccuracy), accuracy);
            assert_eq!(one(RankingReward::Selection), labels[order[0] as usize]);
            assert!((f64::from(one(RankingReward::Ndcg)) - ndcg).abs() < 1e-7);
        }
    }
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

fn random(seed: u64, len: usize, range: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-range..range)).collect()
}

fn shuffled(seed: u64, lists: usize, items: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut all = Vec::new();
    for _ in 0..lists {
        let mut order: Vec<u32> = (0..items as u32).collect();
        for i in (1..items).rev() {
            order.swap(i, rng.random_range(0..=i));
        }
        all.extend(order);
    }
    all
}

/// Losses and gradients of lists.
type Lists = (Vec<f32>, Vec<f32>);

fn plackett_luce(cpu: &Cpu, items: usize, weight: f32, scores: &[f32], order: &[u32]) -> Lists {
    let lists = scores.len() / items;
    let (mut loss, mut d) = (cpu.zeros(lists).unwrap(), cpu.zeros(scores.len()).unwrap());
    let (scores, order) = (cpu.upload(scores).unwrap(), cpu.upload(order).unwrap());
    cpu.plackett_luce_loss(lists, items, weight, &scores, &order, &mut loss, &mut d)
        .unwrap();
    (loss.to_vec(), d.to_vec())
}

fn pairwise(cpu: &Cpu, items: usize, weight: f32, scores: &[f32], labels: &[f32]) -> Lists {
    let lists = scores.len() / items;
    let (mut loss, mut d) = (cpu.zeros(lists).unwrap(), cpu.zeros(scores.len()).unwrap());
    let (scores, labels) = (cpu.upload(scores).unwrap(), cpu.upload(labels).unwrap());
    cpu.pairwise_logistic_loss(lists, items, weight, &scores, &labels, &mut loss, &mut d)
        .unwrap();
    (loss.to_vec(), d.to_vec())
}

/// Loss and gradient of `list` against `loss`, an f64 reference, and its finite differences.
fn check_list(
    list: usize,
    items: usize,
    scores: &[f32],
    got: &Lists,
    loss: &dyn Fn(&[f64]) -> f64,
) {
    let range = list * items..(list + 1) * items;
    let scores: Vec<f64> = scores[range.clone()]
        .iter()
        .map(|&s| f64::from(s))
        .collect();
    let want = loss(&scores);
    assert!((f64::from(got.0[list]) - want).abs() < 1e-6 * (1.0 + want.abs()));
    for (i, &got) in got.1[range].iter().enumerate() {
        let at = |h: f64| {
            let mut scores = scores.clone();
            scores[i] += h;
            loss(&scores)
        };
        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!(
            (f64::from(got) - slope).abs() < 1e-6 * (1.0 + want.abs()),
            "{got} {slope}"
        );
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
                let rest = |i: usize| order[i..].iter().map(|&o| s[o as usize].exp()).sum::<f64>();
                0.5 * (0..items)
                    .map(|i| rest(i).ln() - s[order[i] as usize])
                    .sum::<f64>()
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
            check_list(list, items, &scores, &got, &|s| {
                let all = (0..items).flat_map(|i| (0..items).map(move |j| (i, j)));
                let pairs: Vec<_> = all.filter(|&(i, j)| y[i] > y[j]).collect();
                let sum: f64 = pairs
                    .iter()
                    .map(|&(i, j)| (1.0 + (s[j] - s[i]).exp()).ln())
                    .sum();
                0.5 * sum / pairs.len().max(1) as f64
            });
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
