//! Ranking rewards and losses in f64, one task a ranking. Lists are short, so sums over pairs and
//! suffixes are plain double loops.

use super::Cpu;
use super::pool::SharedMut;
use crate::ranking::{Ranking, RankingReward, check_list_loss, check_ranking_reward};
use crate::{Error, Result};

fn is_permutation(order: &[u32], seen: &mut Vec<bool>) -> bool {
    seen.clear();
    seen.resize(order.len(), false);
    order.iter().all(|&i| match seen.get_mut(i as usize) {
        Some(seen) => !std::mem::replace(seen, true),
        None => false,
    })
}

/// The reward of one ranking, from the labels in the order of the ranking.
fn reward_of(reward: RankingReward, ranked: &[f32]) -> f32 {
    match reward {
        RankingReward::Selection => f32::from(ranked[0] > 0.0),
        RankingReward::PairwiseAccuracy => {
            let (mut right, mut pairs) = (0u32, 0u32);
            for (i, upper) in ranked.iter().enumerate() {
                for lower in &ranked[i + 1..] {
                    pairs += u32::from(upper != lower);
                    right += u32::from(upper > lower);
                }
            }
            match pairs {
                0 => f32::from(ranked[0] > 0.0),
                _ => (f64::from(right) / f64::from(pairs)) as f32,
            }
        }
        RankingReward::Ndcg => {
            let gains = |labels: &[f32]| -> f64 {
                let ranks = labels.iter().zip(2u32..);
                ranks
                    .map(|(&y, next)| (f64::from(y).exp2() - 1.0) / f64::from(next).log2())
                    .sum()
            };
            let mut ideal = ranked.to_vec();
            ideal.sort_by(|a, b| b.total_cmp(a));
            match gains(&ideal) {
                0.0 => 0.0,
                best => (gains(ranked) / best) as f32,
            }
        }
    }
}

/// `ln(1 + exp(x))` and its derivative, without overflow.
fn softplus(x: f64) -> (f64, f64) {
    let e = (-x.abs()).exp();
    let slope = if x > 0.0 { 1.0 } else { e } / (1.0 + e);
    (x.max(0.0) + e.ln_1p(), slope)
}

fn plackett_luce(scores: &[f32], order: &[u32], grad: &mut [f64]) -> f64 {
    let n = order.len();
    let score = |rank: usize| f64::from(scores[order[rank] as usize]);
    let (mut top, mut loss) = (f64::NEG_INFINITY, 0.0);
    // From the last rank up: the choice at `rank` is among it and all below.
    for rank in (0..n).rev() {
        top = if score(rank) > top { score(rank) } else { top };
        let sum: f64 = (rank..n).map(|k| (score(k) - top).exp()).sum();
        loss += sum.ln() + (top - score(rank));
        for k in rank..n {
            grad[order[k] as usize] += (score(k) - top).exp() / sum;
        }
        grad[order[rank] as usize] -= 1.0;
    }
    loss
}

fn pairwise_logistic(scores: &[f32], labels: &[f32], grad: &mut [f64]) -> f64 {
    let (mut loss, mut pairs) = (0.0, 0u32);
    for (i, better) in labels.iter().enumerate() {
        for (j, worse) in labels.iter().enumerate() {
            if better > worse {
                let (value, slope) = softplus(f64::from(scores[j]) - f64::from(scores[i]));
                loss += value;
                grad[i] -= slope;
                grad[j] += slope;
                pairs += 1;
            }
        }
    }
    let share = 1.0 / f64::from(pairs.max(1));
    grad.iter_mut().for_each(|g| *g *= share);
    loss * share
}

impl Cpu {
    /// Runs `one(list, gradient)`, which returns a loss, for each list, and writes both, weighted.
    fn each_list(
        &self,
        items: usize,
        weight: f32,
        loss: &mut [f32],
        dscores: &mut [f32],
        one: impl Fn(usize, &mut [f64]) -> f64 + Sync,
    ) {
        let dscores = SharedMut::new(dscores);
        self.pool.chunks_mut(loss, 1, |list, loss| {
            let mut grad = vec![0.0f64; items];
            loss[0] = (f64::from(weight) * one(list, &mut grad)) as f32;
            // SAFETY: lists do not overlap, and each runs once.
            let dscores = unsafe { dscores.slice(list * items, items) };
            for (d, g) in dscores.iter_mut().zip(grad) {
                *d = (f64::from(weight) * g) as f32;
            }
        });
    }
}

impl Ranking for Cpu {
    fn ranking_reward(
        &self,
        rankings: usize,
        items: usize,
        reward: RankingReward,
        invalid: f32,
        order: &Self::Buf<u32>,
        labels: &Self::Buf<f32>,
        rewards: &mut Self::Buf<f32>,
    ) -> Result<()> {
        check_ranking_reward(rankings, items, [order.len(), labels.len(), rewards.len()])?;
        self.pool.chunks_mut(&mut rewards[..rankings], 1, |r, out| {
            let order = &order[r * items..][..items];
            let labels = &labels[r * items..][..items];
            out[0] = if is_permutation(order, &mut Vec::new()) {
                let ranked: Vec<f32> = order.iter().map(|&i| labels[i as usize]).collect();
                reward_of(reward, &ranked)
            } else {
                invalid
            };
        });
        Ok(())
    }

    fn plackett_luce_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &Self::Buf<f32>,
        order: &Self::Buf<u32>,
        loss: &mut Self::Buf<f32>,
        dscores: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let op = "plackett_luce_loss";
        let target = ("order", order.len());
        let outputs = [loss.len(), dscores.len()];
        check_list_loss(op, lists, items, scores.len(), target, outputs)?;
        let mut seen = Vec::new();
        for list in 0..lists {
            if !is_permutation(&order[list * items..][..items], &mut seen) {
                return Err(Error::invalid(
                    op,
                    format!("`order` of list {list} is no permutation of 0..{items}"),
                ));
            }
        }
        self.each_list(items, weight, &mut loss[..lists], dscores, |list, grad| {
            let list = list * items..(list + 1) * items;
            plackett_luce(&scores[list.clone()], &order[list], grad)
        });
        Ok(())
    }

    fn pairwise_logistic_loss(
        &self,
        lists: usize,
        items: usize,
        weight: f32,
        scores: &Self::Buf<f32>,
        labels: &Self::Buf<f32>,
        loss: &mut Self::Buf<f32>,
        dscores: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let op = "pairwise_logistic_loss";
        let target = ("labels", labels.len());
        let outputs = [loss.len(), dscores.len()];
        check_list_loss(op, lists, items, scores.len(), target, outputs)?;
        self.each_list(items, weight, &mut loss[..lists], dscores, |list, grad| {
            let list = list * items..(list + 1) * items;
            pairwise_logistic(&scores[list.clone()], &labels[list], grad)
        });
        Ok(())
    }
}
