//! Mini-batches for the policy loss, and the loss by its formulas in f64.

use dust_kernels::grpo::{
    AdvantageConfig, Grpo, GrpoConfig, KlEstimator, RatioLevel, SequenceStats,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A mini-batch.
#[derive(Clone)]
pub struct Batch {
    pub offsets: Vec<u32>,
    pub weights: Vec<f32>,
    pub advantages: Vec<f32>,
    pub new: Vec<f32>,
    pub old: Vec<f32>,
    pub reference: Option<Vec<f32>>,
}

impl Batch {
    /// Sequences of the given lengths whose policy moved by up to `step` nats a token.
    pub fn random(seed: u64, lengths: &[usize], step: f32) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut offsets = vec![0];
        for &length in lengths {
            offsets.push(offsets[offsets.len() - 1] + length as u32);
        }
        let tokens = offsets[lengths.len()] as usize;
        let old: Vec<f32> = (0..tokens).map(|_| rng.random_range(-6.0..0.0)).collect();
        let mut moved = || {
            old.iter()
                .map(|o| o + rng.random_range(-step..step))
                .collect()
        };
        let (new, reference) = (moved(), Some(moved()));
        let advantages = lengths
            .iter()
            .map(|_| rng.random_range(-2.0..2.0))
            .collect();
        let weights = lengths
            .iter()
            .map(|_| rng.random_range(0.01..1.0))
            .collect();
        Batch {
            offsets,
            weights,
            advantages,
            new,
            old,
            reference,
        }
    }

    /// Gradients, from a buffer that held something else before, and statistics.
    pub fn run<D: Grpo>(&self, device: &D, config: &GrpoConfig) -> (Vec<f32>, Vec<SequenceStats>) {
        let (sequences, tokens) = (self.weights.len(), self.new.len());
        let up = |x: &[f32]| device.upload(x).unwrap();
        let reference = self.reference.as_deref().map(up);
        let mut dlogprob = device.upload(&vec![7.0f32; tokens]).unwrap();
        let mut stats = device.zeros(sequences).unwrap();
        device
            .grpo_loss(
                config,
                sequences,
                tokens,
                &device.upload(&self.offsets).unwrap(),
                &up(&self.weights),
                &up(&self.advantages),
                &up(&self.new),
                &up(&self.old),
                reference.as_ref(),
                &mut dlogprob,
                &mut stats,
            )
            .unwrap();
        (
            device.download(&dlogprob).unwrap(),
            device.download(&stats).unwrap(),
        )
    }

    /// The tokens of sequence `s`.
    pub fn sequence(&self, s: usize) -> std::ops::Range<usize> {
        self.offsets[s] as usize..self.offsets[s + 1] as usize
    }

    /// The ratios of sequence `s` by the formulas, in f64.
    pub fn ratios(&self, config: &GrpoConfig, s: usize, new: &[f64]) -> Vec<f64> {
        let range = self.sequence(s);
        let n = range.len() as f64;
        let own: Vec<f64> = range.map(|t| new[t] - f64::from(self.old[t])).collect();
        match config.ratio {
            RatioLevel::Token => own.iter().map(|d| d.exp()).collect(),
            RatioLevel::Sequence => vec![(own.iter().sum::<f64>() / n).exp(); own.len()],
        }
    }

    /// The loss of sequence `s` by the formulas, in f64.
    pub fn loss(&self, config: &GrpoConfig, s: usize, new: &[f64]) -> f64 {
        let a = f64::from(self.advantages[s]);
        let (low, high) = (
            1.0 - f64::from(config.clip_low),
            1.0 + f64::from(config.clip_high),
        );
        let mut loss = 0.0;
        for (t, r) in self.sequence(s).zip(self.ratios(config, s, new)) {
            let mut surrogate = (r * a).min(r.clamp(low, high) * a);
            if let Some(c) = config.dual_clip
                && a < 0.0
            {
                surrogate = surrogate.max(f64::from(c) * a);
            }
            let kl = self.kl(config, t, new);
            loss -= f64::from(self.weights[s]) * (surrogate - f64::from(config.kl_coef) * kl);
        }
        loss
    }

    /// The KL estimate of a token by the formulas, in f64.
    pub fn kl(&self, config: &GrpoConfig, t: usize, new: &[f64]) -> f64 {
        let Some(reference) = &self.reference else {
            return 0.0;
        };
        let d = f64::from(reference[t]) - new[t];
        match config.kl {
            KlEstimator::K1 => -d,
            KlEstimator::K2 => d * d / 2.0,
            KlEstimator::K3 => d.exp() - d - 1.0,
        }
    }

    /// Holds a result to the formulas: loss and statistics of each sequence, and each gradient to
    /// the finite difference of the loss unless its ratio is next to a kink. Gives how many tokens
    /// each clip was in force for.
    pub fn check(
        &self,
        config: &GrpoConfig,
        dlogprob: &[f32],
        stats: &[SequenceStats],
    ) -> [f32; 3] {
        let new = widen(&self.new);
        let mut seen = [0.0f32; 3];
        let (low, high) = (1.0 - config.clip_low, 1.0 + config.clip_high);
        for (s, stats) in stats.iter().enumerate() {
            let range = self.sequence(s);
            let want = self.loss(config, s, &new);
            assert!((f64::from(stats.loss) - want).abs() < 1e-6 * (1.0 + want.abs()));
            let ratios = self.ratios(config, s, &new);
            let a = self.advantages[s];
            let count = |f: &dyn Fn(f64) -> bool| ratios.iter().filter(|&&r| f(r)).count() as f32;
            let clipped_low = count(&|r| a < 0.0 && r < f64::from(low));
            let clipped_high = count(&|r| a > 0.0 && r > f64::from(high));
            let dual = f64::from(config.dual_clip.unwrap_or(f32::INFINITY));
            let clipped_dual = count(&|r| a < 0.0 && r > dual);
            assert_eq!(stats.clipped_low, clipped_low);
            assert_eq!(stats.clipped_high, clipped_high);
            assert_eq!(stats.clipped_dual, clipped_dual);
            seen[0] += clipped_low;
            seen[1] += clipped_high;
            seen[2] += clipped_dual;
            let close =
                |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-5 * (1.0 + want.abs());
            assert!(close(stats.ratio, ratios.iter().sum()));
            assert!(close(
                stats.ratio_deviation,
                ratios.iter().map(|r| (r - 1.0).abs()).fold(0.0, f64::max)
            ));
            assert!(close(
                stats.kl,
                range.clone().map(|t| self.kl(config, t, &new)).sum()
            ));
            let moved = range.clone().map(|t| {
                let d = new[t] - f64::from(self.old[t]);
                d.exp() - d - 1.0
            });
            assert!(close(stats.moved, moved.sum()));

            for (t, ratio) in range.zip(ratios) {
                let kinks = [f64::from(low), f64::from(high), dual];
                if kinks.iter().any(|k| (ratio - k).abs() < 1e-3) {
                    continue;
                }
                let at = |h: f64| {
                    let mut new = new.clone();
                    new[t] += h;
                    self.loss(config, s, &new)
                };
                let want = (at(1e-5) - at(-1e-5)) / 2e-5;
                let got = f64::from(dlogprob[t]);
                assert!(
                    (got - want).abs() < 1e-6 * (1.0 + want.abs()),
                    "{config:?} {s} {t}: {got} {want}"
                );
            }
        }
        seen
    }
}

/// Widened.
pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Every combination of the options.
pub fn configs() -> Vec<GrpoConfig> {
    let mut configs = Vec::new();
    for ratio in [RatioLevel::Token, RatioLevel::Sequence] {
        for kl in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            for kl_coef in [0.0, 0.3] {
                for dual_clip in [None, Some(1.5)] {
                    let (clip_low, clip_high) = (0.1, 0.28);
                    configs.push(GrpoConfig {
                        clip_low,
                        clip_high,
                        dual_clip,
                        kl_coef,
                        kl,
                        ratio,
                    });
                }
            }
        }
    }
    configs
}

/// Standard scores of a group, by the formulas.
pub fn advantages_f64(rewards: &[f32], divide_by_std: bool, eps: f64) -> Vec<f64> {
    let rewards = widen(rewards);
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let variance = rewards.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>() / n;
    let divisor = if divide_by_std {
        variance.sqrt() + eps
    } else {
        1.0
    };
    rewards.iter().map(|r| (r - mean) / divisor).collect()
}

/// Advantages of groups of `size`.
pub fn advantages<D: Grpo>(
    device: &D,
    size: usize,
    config: AdvantageConfig,
    rewards: &[f32],
) -> Vec<f32> {
    let mut out = device.zeros(rewards.len()).unwrap();
    let groups = rewards.len() / size;
    let rewards = device.upload(rewards).unwrap();
    device
        .advantages(groups, size, config, &rewards, &mut out)
        .unwrap();
    device.download(&out).unwrap()
}
