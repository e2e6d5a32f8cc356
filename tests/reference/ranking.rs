//! Rankings and lists, their rewards and losses by definition.

use dust_kernels::ranking::{Ranking, RankingReward};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// All orders of `n` items.
pub fn permutations(n: u32) -> Vec<Vec<u32>> {
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

/// Rewards of rankings; what is no permutation gets -1.
pub fn rewards<D: Ranking>(
    device: &D,
    kind: RankingReward,
    items: usize,
    order: &[u32],
    labels: &[f32],
) -> Vec<f32> {
    let rankings = order.len() / items;
    let mut out = device.zeros(rankings).unwrap();
    let (order, labels) = (
        device.upload(order).unwrap(),
        device.upload(labels).unwrap(),
    );
    device
        .ranking_reward(rankings, items, kind, -1.0, &order, &labels, &mut out)
        .unwrap();
    device.download(&out).unwrap()
}

/// Holds the rewards of all orders and labels of four items to their definitions.
pub fn check_all_of_four<D: Ranking>(device: &D) {
    let orders = permutations(4);
    assert_eq!(orders.len(), 24);
    let (mut all, mut labels, mut want) = (Vec::new(), Vec::new(), Vec::new());
    for mask in 0..16u32 {
        let y: Vec<f32> = (0..4).map(|i| (mask >> i & 1) as f32).collect();
        let dcg = |order: &[u32]| -> f64 {
            (0..4)
                .map(|r| f64::from(y[order[r] as usize]) / ((r + 2) as f64).log2())
                .sum()
        };
        let best = orders.iter().map(|o| dcg(o)).fold(0.0, f64::max);
        for order in &orders {
            let rank = |item: u32| order.iter().position(|&o| o == item);
            let (mut pairs, mut right) = (0, 0);
            for i in 0..4u32 {
                for j in 0..4u32 {
                    if y[i as usize] > y[j as usize] {
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
            all.extend(order);
            labels.extend(&y);
            want.push((accuracy, ndcg, y[order[0] as usize]));
        }
    }
    let of = |kind| rewards(device, kind, 4, &all, &labels);
    let accuracy = of(RankingReward::PairwiseAccuracy);
    let (ndcg, selection) = (of(RankingReward::Ndcg), of(RankingReward::Selection));
    for (i, want) in want.into_iter().enumerate() {
        assert_eq!(accuracy[i], want.0);
        assert!((f64::from(ndcg[i]) - want.1).abs() < 1e-7);
        assert_eq!(selection[i], want.2);
    }
}

/// Uniform in -range .. range.
pub fn random(seed: u64, len: usize, range: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-range..range)).collect()
}

/// Random orders.
pub fn shuffled(seed: u64, lists: usize, items: usize) -> Vec<u32> {
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
pub type Lists = (Vec<f32>, Vec<f32>);

/// Plackett-Luce losses and gradients.
pub fn plackett_luce<D: Ranking>(
    device: &D,
    items: usize,
    weight: f32,
    scores: &[f32],
    order: &[u32],
) -> Lists {
    let lists = scores.len() / items;
    let (mut loss, mut d) = (
        device.zeros(lists).unwrap(),
        device.zeros(scores.len()).unwrap(),
    );
    let (scores, order) = (
        device.upload(scores).unwrap(),
        device.upload(order).unwrap(),
    );
    device
        .plackett_luce_loss(lists, items, weight, &scores, &order, &mut loss, &mut d)
        .unwrap();
    (
        device.download(&loss).unwrap(),
        device.download(&d).unwrap(),
    )
}

/// Pairwise logistic losses and gradients.
pub fn pairwise<D: Ranking>(
    device: &D,
    items: usize,
    weight: f32,
    scores: &[f32],
    labels: &[f32],
) -> Lists {
    let lists = scores.len() / items;
    let (mut loss, mut d) = (
        device.zeros(lists).unwrap(),
        device.zeros(scores.len()).unwrap(),
    );
    let (scores, labels) = (
        device.upload(scores).unwrap(),
        device.upload(labels).unwrap(),
    );
    device
        .pairwise_logistic_loss(lists, items, weight, &scores, &labels, &mut loss, &mut d)
        .unwrap();
    (
        device.download(&loss).unwrap(),
        device.download(&d).unwrap(),
    )
}

/// Loss and gradient of `list` against `loss`, an f64 reference, and its finite differences.
pub fn check_list(
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

/// Plackett-Luce of one list by its formula.
pub fn plackett_luce_f64(scores: &[f64], order: &[u32]) -> f64 {
    let score = |i: usize| scores[order[i] as usize];
    let rest = |i: usize| (i..order.len()).map(|k| score(k).exp()).sum::<f64>();
    (0..order.len()).map(|i| rest(i).ln() - score(i)).sum()
}

/// Pairwise logistic of one list by its formula.
pub fn pairwise_f64(scores: &[f64], labels: &[f32]) -> f64 {
    let n = labels.len();
    let all = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
    let pairs: Vec<_> = all.filter(|&(i, j)| labels[i] > labels[j]).collect();
    let one = |&(i, j): &(usize, usize)| (1.0 + (scores[j] - scores[i]).exp()).ln();
    pairs.iter().map(one).sum::<f64>() / pairs.len().max(1) as f64
}
