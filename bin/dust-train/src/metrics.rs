//! Figures of merit, as pure functions in f64.
//!
//! | figure | definition | source |
//! |---|---|---|
//! | pass@k | 1 - C(n-c, k) / C(n, k), mean over problems | Chen et al. 2021, HumanEval |
//! | NDCG | DCG / ideal DCG, gain 2^y - 1 = y, discount 1 / log2(rank + 1) | Järvelin and Kekäläinen 2002 |
//! | pairwise accuracy | share of (right, wrong) pairs that are in order | DuST, the reward |
//! | Best-of-N | share of groups whose top-ranked program is right | DuST |
//!
//! **Invalid rankings** are scored as an order drawn at random, by the expected value: the figures
//! then show what the judgments are worth, learning the answer's form alone gains nothing over the
//! random row, and the share of invalid rankings stands beside them.
//!
//! **Intervals** come from a bootstrap over problems ([`bootstrap`], [`paired_bootstrap`]), because
//! the groups of one problem are not independent.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::tasks::Difficulty;

/// Resamples of a bootstrap.
pub const RESAMPLES: usize = 10_000;

/// The unbiased estimate of the chance that one of `k` samples is right, from `n` samples with `c`
/// right: 1 - C(n-c, k) / C(n, k), as a product so that nothing overflows. Nothing if `k` is 0 or
/// exceeds `n`, or `c` exceeds `n`.
pub fn pass_at_k(n: usize, c: usize, k: usize) -> Option<f64> {
    if k == 0 || k > n || c > n {
        return None;
    }
    if n - c < k {
        return Some(1.0);
    }
    let miss: f64 = (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product();
    Some(1.0 - miss)
}

/// The mean of [`pass_at_k`] over problems given as (n, c); nothing unless every problem has at
/// least `k` samples, so that the mean is always over all problems.
pub fn mean_pass_at_k(problems: &[(usize, usize)], k: usize) -> Option<f64> {
    let values: Option<Vec<f64>> = problems.iter().map(|&(n, c)| pass_at_k(n, c, k)).collect();
    mean(&values?)
}

/// The share of (right, wrong) pairs that `ranked` (labels from best to worst) has in order.
/// Nothing without such a pair.
pub fn pairwise_accuracy(ranked: &[bool]) -> Option<f64> {
    let (mut right, mut in_order) = (0usize, 0usize);
    for &label in ranked {
        if label {
            right += 1;
        } else {
            in_order += right;
        }
    }
    let pairs = right * (ranked.len() - right);
    (pairs > 0).then(|| in_order as f64 / pairs as f64)
}

/// NDCG of labels from best to worst: DCG over the DCG of the best order, where the i-th (from 1)
/// adds y / log2(i + 1). Nothing if none is right; 1 if all are.
pub fn ndcg(ranked: &[bool]) -> Option<f64> {
    let right = ranked.iter().filter(|&&y| y).count();
    let dcg: f64 = ranked
        .iter()
        .zip(1..)
        .filter(|(y, _)| **y)
        .map(|(_, i)| discount(i))
        .sum();
    let ideal: f64 = (1..=right).map(discount).sum();
    (right > 0).then(|| dcg / ideal)
}

/// The expected [`ndcg`] of a random order of `n` labels with `right` right ones.
pub fn random_ndcg(n: usize, right: usize) -> Option<f64> {
    let all: f64 = (1..=n).map(discount).sum();
    let ideal: f64 = (1..=right).map(discount).sum();
    (0 < right && right <= n).then(|| right as f64 / n as f64 * all / ideal)
}

fn discount(rank: usize) -> f64 {
    1.0 / ((rank + 1) as f64).log2()
}

/// The mean; nothing of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Mean and sample standard deviation (n - 1) over repeats or training seeds; the deviation of a
/// single value is unknown.
pub fn mean_std(values: &[f64]) -> Option<(f64, Option<f64>)> {
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let std = (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt());
    Some((mean, std))
}

/// How often each shown position was picked first. Rankings are of shown positions, from 0.
pub fn picked_first<'a>(rankings: impl IntoIterator<Item = &'a [usize]>, k: usize) -> Vec<usize> {
    let mut counts = vec![0; k];
    for ranking in rankings {
        if let Some(count) = ranking.first().and_then(|&first| counts.get_mut(first)) {
            *count += 1;
        }
    }
    counts
}

/// One judgment of one group of candidates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgment {
    /// Whether each candidate is right.
    pub labels: Vec<bool>,
    /// The candidates from best to worst; nothing if the judge gave no valid ranking.
    pub ranking: Option<Vec<usize>>,
}

impl Judgment {
    fn right(&self) -> usize {
        self.labels.iter().filter(|&&y| y).count()
    }

    fn mixed(&self) -> bool {
        (1..self.labels.len()).contains(&self.right())
    }

    /// Labels from best to worst, if the ranking is one of these candidates.
    fn ranked(&self) -> Option<Vec<bool>> {
        let ranking = self.ranking.as_ref()?;
        let mut seen = vec![false; self.labels.len()];
        for &i in ranking {
            if std::mem::replace(seen.get_mut(i)?, true) {
                return None;
            }
        }
        (ranking.len() == self.labels.len())
            .then(|| ranking.iter().map(|&i| self.labels[i]).collect())
    }

    /// The share of right candidates: what a random pick is worth.
    fn chance(&self) -> f64 {
        self.right() as f64 / self.labels.len().max(1) as f64
    }

    fn score(&self, metric: Metric) -> Option<f64> {
        let n = self.labels.len();
        let right = self.right();
        if n == 0 {
            return None;
        }
        let flag = |b: bool| Some(f64::from(u8::from(b)));
        let ndcg = || match self.ranked() {
            Some(ranked) => ndcg(&ranked),
            None => random_ndcg(n, right),
        };
        match metric {
            Metric::Pass1 => None,
            Metric::Ndcg => Some(ndcg().unwrap_or(0.0)),
            Metric::NdcgMixed => self.mixed().then(ndcg)?,
            Metric::NdcgRandom => self.mixed().then(|| random_ndcg(n, right))?,
            Metric::PairAccuracy if !self.mixed() => None,
            Metric::PairAccuracy => self.ranked().map_or(Some(0.5), |r| pairwise_accuracy(&r)),
            Metric::BestOfN => match self.ranked() {
                Some(ranked) => flag(ranked[0]),
                None => Some(self.chance()),
            },
            Metric::Random => Some(self.chance()),
            Metric::Oracle => flag(right > 0),
            Metric::AllRight => flag(right == n),
            Metric::AllWrong => flag(right == 0),
            Metric::Mixed => flag(self.mixed()),
            Metric::Invalid if !self.mixed() => None,
            Metric::Invalid => flag(self.ranked().is_none()),
        }
    }
}

/// Everything measured on one problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// The problem's name; before and after are paired by it.
    pub id: String,
    /// Its stratum.
    pub difficulty: Option<Difficulty>,
    /// Programs sampled.
    pub samples: usize,
    /// Programs that pass.
    pub passed: usize,
    /// Judgments of the groups that this model wrote. Which way a group is ranked whose candidates
    /// are all right or all wrong decides nothing, so that it needs no ranking.
    pub judgments: Vec<Judgment>,
    /// Judgments of the mixed groups that the model before training wrote: the same programs for
    /// every model, so that a difference is the judge's.
    pub same: Vec<Judgment>,
}

/// A figure of merit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// pass@1 of the generator.
    Pass1,
    /// NDCG over all groups, where one that is all wrong counts 0 and one that is all right 1, as
    /// published figures have it. It rises with the generator even if the judge stays the same.
    Ndcg,
    /// NDCG over the mixed groups of [`Problem::same`]: the judge alone.
    NdcgMixed,
    /// What a random order of these groups is worth.
    NdcgRandom,
    /// Pairwise accuracy over the same groups.
    PairAccuracy,
    /// The top-ranked candidate is right.
    BestOfN,
    /// A candidate picked at random is right.
    Random,
    /// Some candidate is right: what a perfect judge reaches.
    Oracle,
    /// Share of groups whose candidates are all right.
    AllRight,
    /// Share of groups whose candidates are all wrong.
    AllWrong,
    /// Share of groups with both.
    Mixed,
    /// Share of judgments of the same groups without a valid ranking.
    Invalid,
}

impl Metric {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 12] = [
        Self::Pass1,
        Self::NdcgMixed,
        Self::NdcgRandom,
        Self::PairAccuracy,
        Self::Invalid,
        Self::Ndcg,
        Self::BestOfN,
        Self::Random,
        Self::Oracle,
        Self::AllRight,
        Self::AllWrong,
        Self::Mixed,
    ];

    /// The sum and the count that `problem` brings to the mean. Every problem weighs the same,
    /// whatever the number of its groups; one to which the figure does not apply weighs nothing.
    pub fn of(self, problem: &Problem) -> Ratio {
        let value = match self {
            Self::Pass1 => pass_at_k(problem.samples, problem.passed, 1),
            _ => {
                let judgments = match self {
                    Self::NdcgMixed | Self::NdcgRandom | Self::PairAccuracy | Self::Invalid => {
                        &problem.same
                    }
                    _ => &problem.judgments,
                };
                let scores: Vec<_> = judgments.iter().filter_map(|j| j.score(self)).collect();
                mean(&scores)
            }
        };
        match value {
            Some(value) => Ratio {
                sum: value,
                count: 1.0,
            },
            None => Ratio {
                sum: 0.0,
                count: 0.0,
            },
        }
    }
}

/// What a problem, or a set of them, brings to a mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The sum of the values.
    pub sum: f64,
    /// How many they are.
    pub count: f64,
}

/// A value with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// The 2.5th percentile of the resamples.
    pub low: f64,
    /// The 97.5th percentile.
    pub high: f64,
}

/// The mean over problems with its interval; nothing if no problem counts. Resamples in which no
/// problem counts are left out.
pub fn bootstrap(problems: &[Ratio], seed: u64) -> Option<Estimate> {
    resample(problems.len(), seed, |pick| ratio(pick, problems))
}

/// The difference `after - before` of the means over the same problems in the same order, with its
/// interval: a resample draws problems and takes both sides of each. Nothing if the lengths differ.
pub fn paired_bootstrap(before: &[Ratio], after: &[Ratio], seed: u64) -> Option<Estimate> {
    if before.len() != after.len() {
        return None;
    }
    resample(before.len(), seed, |pick| {
        Some(ratio(pick, after)? - ratio(pick, before)?)
    })
}

fn ratio(pick: &[usize], problems: &[Ratio]) -> Option<f64> {
    let (sum, count) = pick.iter().fold((0.0, 0.0), |(sum, count), &i| {
        (sum + problems[i].sum, count + problems[i].count)
    });
    (count > 0.0).then(|| sum / count)
}

fn resample(n: usize, seed: u64, statistic: impl Fn(&[usize]) -> Option<f64>) -> Option<Estimate> {
    let mut pick: Vec<usize> = (0..n).collect();
    let value = statistic(&pick)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut values: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            for slot in &mut pick {
                *slot = ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize;
            }
            statistic(&pick)
        })
        .collect();
    values.sort_unstable_by(f64::total_cmp);
    Some(Estimate {
        value,
        low: quantile(&values, 0.025)?,
        high: quantile(&values, 0.975)?,
    })
}

/// Linear interpolation between the order statistics.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * (at - at.floor()))
}

/// One line of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The figure.
    pub metric: Metric,
    /// The stratum, or nothing for all problems.
    pub difficulty: Option<Difficulty>,
    /// How many problems count on either side.
    pub problems: usize,
    /// Before training.
    pub before: Option<Estimate>,
    /// After training.
    pub after: Option<Estimate>,
    /// The paired difference.
    pub change: Option<Estimate>,
}

/// Every figure before and after training, over all problems and over each stratum. Problems are
/// paired by name; those that are on one side only are left out.
pub fn compare(before: &[Problem], after: &[Problem], seed: u64) -> Vec<Row> {
    let pairs: Vec<(&Problem, &Problem)> = before
        .iter()
        .filter_map(|b| Some((b, after.iter().find(|a| a.id == b.id)?)))
        .collect();
    let mut strata: Vec<_> = pairs.iter().filter_map(|(b, _)| b.difficulty).collect();
    strata.sort_unstable();
    strata.dedup();
    let strata = std::iter::once(None).chain(strata.into_iter().map(Some));
    let mut rows = Vec::new();
    for difficulty in strata {
        let inside: Vec<_> = pairs
            .iter()
            .filter(|(b, _)| difficulty.is_none() || b.difficulty == difficulty)
            .collect();
        for metric in Metric::ALL {
            let left: Vec<_> = inside.iter().map(|(b, _)| metric.of(b)).collect();
            let right: Vec<_> = inside.iter().map(|(_, a)| metric.of(a)).collect();
            rows.push(Row {
                metric,
                difficulty,
                problems: left
                    .iter()
                    .zip(&right)
                    .filter(|(l, r)| l.count + r.count > 0.0)
                    .count(),
                before: bootstrap(&left, seed),
                after: bootstrap(&right, seed),
                change: paired_bootstrap(&left, &right, seed),
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: Option<f64>, b: f64) -> bool {
        a.is_some_and(|a| (a - b).abs() < 1e-12)
    }

    #[test]
    fn pass_at_k_counts_the_subsets() {
        for n in 1..=7usize {
            for c in 0..=n {
                for k in 1..=n {
                    // Of the subsets of k samples, those that hold one of the first c.
                    let subsets = (0u32..1 << n).filter(|s| s.count_ones() as usize == k);
                    let (hit, all) = subsets.fold((0, 0), |(hit, all), s| {
                        (hit + usize::from(s & ((1 << c) - 1) != 0), all + 1)
                    });
                    assert!(
                        close(pass_at_k(n, c, k), hit as f64 / all as f64),
                        "{n} {c} {k}"
                    );
                }
            }
        }
        assert_eq!(pass_at_k(3, 1, 4), None);
        assert_eq!(pass_at_k(3, 4, 1), None);
        assert_eq!(pass_at_k(3, 1, 0), None);
        assert!(close(mean_pass_at_k(&[(4, 1), (2, 2)], 1), 0.625));
        assert_eq!(mean_pass_at_k(&[(4, 1), (2, 2)], 3), None);
        assert_eq!(mean_pass_at_k(&[], 1), None);
    }

    #[test]
    fn values_computed_by_hand() {
        let (t, f) = (true, false);
        assert!(close(pairwise_accuracy(&[t, f, t, f]), 0.75));
        assert_eq!(pairwise_accuracy(&[t, t]), None);
        assert!(close(ndcg(&[t, f, f, f]), 1.0));
        assert!(close(ndcg(&[f, t, f, f]), 1.0 / 3f64.log2()));
        assert!(close(
            ndcg(&[f, f, t, t]),
            (0.5 + 1.0 / 5f64.log2()) / (1.0 + 1.0 / 3f64.log2())
        ));
        assert!(close(ndcg(&[t, t]), 1.0));
        assert_eq!(ndcg(&[f, f]), None);
        assert_eq!(mean_std(&[]), None);
        assert_eq!(mean_std(&[2.0]), Some((2.0, None)));
        assert_eq!(mean_std(&[1.0, 3.0]), Some((2.0, Some(2f64.sqrt()))));
        let rankings: [&[usize]; 4] = [&[1, 0], &[1, 0], &[0, 1], &[]];
        assert_eq!(picked_first(rankings, 2), [1, 2]);
    }

    fn orders(labels: Vec<bool>) -> Vec<Vec<bool>> {
        if labels.is_empty() {
            return vec![labels];
        }
        (0..labels.len())
            .flat_map(|i| {
                let mut rest = labels.clone();
                let first = rest.remove(i);
                orders(rest).into_iter().map(move |mut order| {
                    order.insert(0, first);
                    order
                })
            })
            .collect()
    }

    #[test]
    fn a_random_order_is_worth_the_mean_over_all_orders() {
        for n in 1..=6 {
            for right in 0..=n {
                let labels: Vec<bool> = (0..n).map(|i| i < right).collect();
                let values: Vec<f64> = orders(labels).iter().filter_map(|o| ndcg(o)).collect();
                match mean(&values) {
                    Some(value) => assert!(close(random_ndcg(n, right), value), "{n} {right}"),
                    None => assert_eq!(random_ndcg(n, right), None),
                }
            }
        }
    }

    fn problem(id: &str, judgments: &[(&[u8], Option<&[usize]>)]) -> Problem {
        Problem {
            id: id.into(),
            difficulty: None,
            samples: 4,
            passed: 1,
            same: of(judgments),
            judgments: of(judgments),
        }
    }

    fn of(judgments: &[(&[u8], Option<&[usize]>)]) -> Vec<Judgment> {
        let judgment = |(labels, ranking): &(&[u8], Option<&[usize]>)| Judgment {
            labels: labels.iter().map(|&y| y == 1).collect(),
            ranking: ranking.map(<[usize]>::to_vec),
        };
        judgments.iter().map(judgment).collect()
    }

    #[test]
    fn each_metric_on_groups_of_every_kind() {
        let p = problem(
            "p",
            &[
                (&[1, 0, 0, 1], Some(&[1, 0, 3, 2])),
                (&[1, 1, 1, 1], Some(&[0, 1, 2, 3])),
                (&[0, 0, 0, 0], Some(&[0, 1, 2, 3])),
                (&[0, 1, 0, 0], None),
            ],
        );
        let first = (1.0 / 3f64.log2() + 0.5) / (1.0 + 1.0 / 3f64.log2());
        let random = 0.25 * (1.0 + 1.0 / 3f64.log2() + 0.5 + 1.0 / 5f64.log2());
        let of_two =
            0.5 * (1.0 + 1.0 / 3f64.log2() + 0.5 + 1.0 / 5f64.log2()) / (1.0 + 1.0 / 3f64.log2());
        let expected = [
            (Metric::Pass1, 0.25),
            (Metric::NdcgMixed, (first + random) / 2.0),
            (Metric::NdcgRandom, (of_two + random) / 2.0),
            (Metric::PairAccuracy, (0.5 + 0.5) / 2.0),
            (Metric::Invalid, 0.5),
            (Metric::Ndcg, (first + 1.0 + 0.0 + random) / 4.0),
            (Metric::BestOfN, (0.0 + 1.0 + 0.0 + 0.25) / 4.0),
            (Metric::Random, (0.5 + 1.0 + 0.0 + 0.25) / 4.0),
            (Metric::Oracle, 0.75),
            (Metric::AllRight, 0.25),
            (Metric::AllWrong, 0.25),
            (Metric::Mixed, 0.5),
        ];
        assert_eq!(expected.map(|(metric, _)| metric), Metric::ALL);
        for (metric, value) in expected {
            assert!(close(Some(metric.of(&p).sum), value), "{metric:?}");
        }
        let alike = problem("q", &[(&[1, 1], Some(&[0, 1]))]);
        assert_eq!(Metric::NdcgMixed.of(&alike).count, 0.0);
        // A ranking of other candidates is no ranking.
        for bad in [&[0, 0][..], &[0, 2], &[0], &[0, 1, 2]] {
            let p = problem("r", &[(&[1, 0], Some(bad))]);
            assert_eq!(Metric::Invalid.of(&p).sum, 1.0, "{bad:?}");
            assert_eq!(Metric::BestOfN.of(&p).sum, 0.5);
        }
    }

    fn ones(values: &[f64]) -> Vec<Ratio> {
        values
            .iter()
            .map(|&sum| Ratio { sum, count: 1.0 })
            .collect()
    }

    #[test]
    fn the_interval_is_that_of_the_normal_limit() {
        // 400 problems, half right: standard error 0.025, interval about 0.5 -+ 0.049.
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let e = bootstrap(&ones(&values), 1).unwrap();
        assert_eq!(e.value, 0.5);
        assert!(
            (e.low - 0.451).abs() < 0.005 && (e.high - 0.549).abs() < 0.005,
            "{e:?}"
        );
        assert_eq!(bootstrap(&ones(&values), 1), Some(e));
        let uneven: Vec<f64> = (1..50).map(|i| f64::from(i).ln()).collect();
        assert_ne!(bootstrap(&ones(&uneven), 1), bootstrap(&ones(&uneven), 2));
    }

    #[test]
    fn all_resamples_of_two_problems() {
        // Means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the interval is the whole range.
        let e = bootstrap(&ones(&[0.0, 1.0]), 3).unwrap();
        assert_eq!((e.value, e.low, e.high), (0.5, 0.0, 1.0));
        // Of (0 of 0) and (1 of 1) every resample that counts gives 1.
        let some = [
            Ratio {
                sum: 0.0,
                count: 0.0,
            },
            Ratio {
                sum: 1.0,
                count: 1.0,
            },
        ];
        let e = bootstrap(&some, 3).unwrap();
        assert_eq!((e.value, e.low, e.high), (1.0, 1.0, 1.0));
        assert_eq!(bootstrap(&[], 3), None);
        assert_eq!(bootstrap(&some[..1], 3), None);
    }

    #[test]
    fn pairing_removes_the_spread_between_problems() {
        let before: Vec<f64> = (0..100).map(|i| f64::from(i) / 100.0).collect();
        let after: Vec<f64> = before.iter().map(|x| x + 0.125).collect();
        let e = paired_bootstrap(&ones(&before), &ones(&after), 5).unwrap();
        for x in [e.value, e.low, e.high] {
            assert!((x - 0.125).abs() < 1e-9);
        }
        assert_eq!(
            paired_bootstrap(&ones(&before), &ones(&after[1..]), 5),
            None
        );
    }

    #[test]
    fn a_comparison_pairs_problems_by_name_and_has_strata() {
        let mut a = problem("a", &[(&[1, 0], Some(&[1, 0]))]);
        let mut b = problem("b", &[(&[1, 0], Some(&[0, 1]))]);
        a.difficulty = Some(Difficulty::Hard);
        b.difficulty = Some(Difficulty::Easy);
        let mut better = a.clone();
        better.judgments[0].ranking = Some(vec![0, 1]);
        let rows = compare(&[a, b.clone(), problem("only", &[])], &[b, better], 0);
        assert_eq!(rows.len(), 3 * Metric::ALL.len());
        let row = |d| {
            rows.iter()
                .find(|r| r.metric == Metric::BestOfN && r.difficulty == d)
                .unwrap()
        };
        assert_eq!(
            (row(None).problems, row(None).change.unwrap().value),
            (2, 0.5)
        );
        // Only one of these has a mixed group.
        let plain = problem("p", &[(&[1, 1], None)]);
        let mixed = problem("m", &[(&[1, 0], None)]);
        let rows = compare(&[plain.clone(), mixed.clone()], &[plain, mixed], 0);
        let counts = |metric| rows.iter().find(|r| r.metric == metric).unwrap().problems;
        assert_eq!((counts(Metric::NdcgMixed), counts(Metric::BestOfN)), (1, 2));
        assert_eq!(row(Some(Difficulty::Hard)).change.unwrap().value, 1.0);
        assert_eq!(row(Some(Difficulty::Easy)).change.unwrap().value, 0.0);
    }

    proptest! {
        #[test]
        fn pair_accuracy_is_the_count_of_pairs(ranked in proptest::collection::vec(any::<bool>(), 0..9)) {
            let pairs: Vec<bool> = (0..ranked.len())
                .flat_map(|i| (0..ranked.len()).map(move |j| (i, j)))
                .filter(|&(i, j)| ranked[i] && !ranked[j])
                .map(|(i, j)| i < j)
                .collect();
            let share = pairs.iter().filter(|&&x| x).count() as f64 / pairs.len() as f64;
            match pairwise_accuracy(&ranked) {
                Some(value) => prop_assert_eq!(value, share),
                None => prop_assert!(pairs.is_empty()),
            }
        }
    }
}
