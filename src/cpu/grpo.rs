//! GRPO in f64, one task a sequence: its inputs are one number a token, so exactness costs nothing.
//!
//! Log-ratios are cut to [`LIMIT`] before they are raised, and where they are cut the derivative is
//! 0, so that a token whose probability collapsed costs a large finite loss and not a NaN.

use super::Cpu;
use super::pool::SharedMut;
use crate::grpo::{
    AdvantageConfig, Grpo, GrpoConfig, KlEstimator, RatioLevel, SequenceStats, check_advantages,
    check_grpo_loss,
};
use crate::{Error, Result};

/// The largest magnitude of a log-ratio, in nats.
const LIMIT: f64 = 20.0;

/// A log-ratio after the cut, and the derivative of the cut.
fn cut(log_ratio: f64) -> (f64, f64) {
    let outside = log_ratio.abs() > LIMIT;
    (log_ratio.clamp(-LIMIT, LIMIT), f64::from(!outside))
}

/// Where a ratio fell.
enum Region {
    Free,
    Low,
    High,
    Dual,
}

/// The surrogate's constants in f64.
struct Clip {
    low: f64,
    high: f64,
    dual: f64,
}

impl Clip {
    /// The surrogate and its derivative with respect to the log-ratio. On a boundary itself the
    /// ratio still counts as unclipped. NaN comes through.
    fn surrogate(&self, ratio: f64, advantage: f64) -> (f64, f64, Region) {
        if advantage > 0.0 && ratio > self.high {
            (self.high * advantage, 0.0, Region::High)
        } else if advantage < 0.0 && ratio < self.low {
            (self.low * advantage, 0.0, Region::Low)
        } else if advantage < 0.0 && ratio > self.dual {
            (self.dual * advantage, 0.0, Region::Dual)
        } else {
            (ratio * advantage, ratio * advantage, Region::Free)
        }
    }
}

/// An estimate of KL(policy, reference) and its derivative with respect to `log policy`, from
/// `log ref - log policy`.
fn kl_estimate(estimator: KlEstimator, log_ratio: f64) -> (f64, f64) {
    let (d, inside) = cut(log_ratio);
    let (kl, slope) = match estimator {
        KlEstimator::K1 => (-d, 1.0),
        KlEstimator::K2 => (d * d / 2.0, -d),
        KlEstimator::K3 => (d.exp_m1() - d, -d.exp_m1()),
    };
    (kl, slope * inside)
}

/// The tokens of one sequence.
struct Sequence<'a> {
    weight: f64,
    advantage: f64,
    new: &'a [f32],
    old: &'a [f32],
    reference: Option<&'a [f32]>,
}

impl Sequence<'_> {
    fn loss(&self, config: &GrpoConfig, dlogprob: &mut [f32]) -> SequenceStats {
        let clip = Clip {
            low: 1.0 - f64::from(config.clip_low),
            high: 1.0 + f64::from(config.clip_high),
            dual: config.dual_clip.map_or(f64::INFINITY, f64::from),
        };
        let kl_coef = f64::from(config.kl_coef);
        let log_ratio = |t: usize| f64::from(self.new[t]) - f64::from(self.old[t]);
        // A sequence's ratio depends on each token by 1 / tokens, and its surrogate counts once a
        // token, so that token's derivative is what it is with a ratio of its own.
        let whole = match config.ratio {
            RatioLevel::Token => None,
            RatioLevel::Sequence => {
                let sum: f64 = (0..self.new.len()).map(log_ratio).sum();
                Some(sum / self.new.len() as f64)
            }
        };
        let (mut loss, mut kl_sum, mut moved, mut ratios) = (0.0, 0.0, 0.0, 0.0);
        let mut stats = SequenceStats::default();
        for (t, dlogprob) in dlogprob.iter_mut().enumerate() {
            let own = log_ratio(t);
            let (d, inside) = cut(whole.unwrap_or(own));
            let ratio = d.exp();
            let (surrogate, slope, region) = clip.surrogate(ratio, self.advantage);
            match region {
                Region::Free => {}
                Region::Low => stats.clipped_low += 1.0,
                Region::High => stats.clipped_high += 1.0,
                Region::Dual => stats.clipped_dual += 1.0,
            }
            let (mut kl, mut kl_slope) = (0.0, 0.0);
            if let Some(reference) = self.reference {
                let d = f64::from(reference[t]) - f64::from(self.new[t]);
                (kl, kl_slope) = kl_estimate(config.kl, d);
            }
            let (mut penalty, mut penalty_slope) = (0.0, 0.0);
            if kl_coef != 0.0 {
                (penalty, penalty_slope) = (kl_coef * kl, kl_coef * kl_slope);
            }
            *dlogprob = (self.weight * (penalty_slope - slope * inside)) as f32;
            loss += penalty - surrogate;
            kl_sum += kl;
            let own = cut(own).0;
            moved += own.exp_m1() - own;
            ratios += ratio;
            let deviation = (ratio - 1.0).abs() as f32;
            if deviation > stats.ratio_deviation || deviation.is_nan() {
                stats.ratio_deviation = deviation;
            }
        }
        stats.loss = (self.weight * loss) as f32;
        stats.kl = kl_sum as f32;
        stats.moved = moved as f32;
        stats.ratio = ratios as f32;
        stats
    }
}

fn group_advantages(config: AdvantageConfig, rewards: &[f32], advantages: &mut [f32]) {
    if rewards.iter().all(|&r| r == rewards[0]) {
        advantages.fill(0.0);
        return;
    }
    let n = rewards.len() as f64;
    let mean = rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / n;
    let variance = rewards
        .iter()
        .map(|&r| (f64::from(r) - mean).powi(2))
        .sum::<f64>()
        / n;
    let divisor = if config.divide_by_std {
        variance.sqrt() + f64::from(config.eps)
    } else {
        1.0
    };
    for (advantage, &reward) in advantages.iter_mut().zip(rewards) {
        *advantage = ((f64::from(reward) - mean) / divisor) as f32;
    }
}

/// Refuses offsets that are not ascending from 0 to at most `tokens`.
fn check_offsets(op: &'static str, offsets: &[u32], tokens: usize) -> Result<()> {
    if offsets[0] != 0 {
        return Err(Error::invalid(
            op,
            format!("`offsets`[0] is {}, not 0", offsets[0]),
        ));
    }
    if let Some(s) = offsets.windows(2).position(|w| w[1] < w[0]) {
        return Err(Error::invalid(
            op,
            format!(
                "`offsets`[{}] is {}, below the one before",
                s + 1,
                offsets[s + 1]
            ),
        ));
    }
    let last = offsets[offsets.len() - 1];
    if last as usize > tokens {
        return Err(Error::invalid(
            op,
            format!("`offsets` ends at {last}, there are {tokens} tokens"),
        ));
    }
    Ok(())
}

impl Grpo for Cpu {
    fn advantages(
        &self,
        groups: usize,
        group_size: usize,
        config: AdvantageConfig,
        rewards: &Self::Buf<f32>,
        advantages: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let len = check_advantages(groups, group_size, rewards.len(), advantages.len())?;
        self.pool
            .chunks_mut(&mut advantages[..len], group_size, |g, advantages| {
                group_advantages(config, &rewards[g * group_size..][..group_size], advantages);
            });
        Ok(())
    }

    fn grpo_loss(
        &self,
        config: &GrpoConfig,
        sequences: usize,
        tokens: usize,
        offsets: &Self::Buf<u32>,
        weights: &Self::Buf<f32>,
        advantages: &Self::Buf<f32>,
        new: &Self::Buf<f32>,
        old: &Self::Buf<f32>,
        reference: Option<&Self::Buf<f32>>,
        dlogprob: &mut Self::Buf<f32>,
        stats: &mut Self::Buf<SequenceStats>,
    ) -> Result<()> {
        let inputs = [
            offsets.len(),
            weights.len(),
            advantages.len(),
            new.len(),
            old.len(),
        ];
        let outputs = [dlogprob.len(), stats.len()];
        let with = reference.map(|r| r.len());
        check_grpo_loss(config, sequences, tokens, inputs, with, outputs)?;
        let offsets = &offsets[..=sequences];
        check_offsets("grpo_loss", offsets, tokens)?;
        dlogprob[offsets[sequences] as usize..tokens].fill(0.0);
        let dlogprob = SharedMut::new(dlogprob);
        self.pool
            .chunks_mut(&mut stats[..sequences], 1, |s, stats| {
                let range = offsets[s] as usize..offsets[s + 1] as usize;
                let sequence = Sequence {
                    weight: f64::from(weights[s]),
                    advantage: f64::from(advantages[s]),
                    new: &new[range.clone()],
                    old: &old[range.clone()],
                    reference: reference.map(|r| &r[range.clone()]),
                };
                // SAFETY: ascending offsets give sequences disjoint ranges, and each runs once.
                let dlogprob = unsafe { dlogprob.slice(range.start, range.len()) };
                stats[0] = sequence.loss(config, dlogprob);
            });
        Ok(())
    }
}
