//! Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): advantages inside a
//! group, the clipped surrogate with its variants, KL estimators, and the gradient with respect to
//! the log-probabilities.

use crate::error::check_len;
use crate::{Device, Error, Result};

/// How rewards of a group become advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdvantageConfig {
    /// Divide by the group's standard deviation (GRPO); without it only the mean is taken off
    /// (Dr. GRPO, arXiv 2503.20783).
    pub divide_by_std: bool,
    /// Added to the standard deviation.
    pub eps: f32,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        AdvantageConfig {
            divide_by_std: true,
            eps: 1e-6,
        }
    }
}

/// Estimator of KL(policy, reference) from a sampled token, with `d = log ref - log policy`
/// (Schulman 2020, "Approximating KL divergence").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlEstimator {
    /// `-d`: unbiased, high variance.
    K1,
    /// `d^2 / 2`.
    K2,
    /// `exp(d) - d - 1`: unbiased, never negative.
    #[default]
    K3,
}

/// What an importance ratio is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RatioLevel {
    /// One ratio a token (GRPO).
    #[default]
    Token,
    /// One ratio a sequence: `exp(mean over tokens of (new - old))` (GSPO, arXiv 2507.18071).
    Sequence,
}

/// The clipped surrogate and its regulariser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GrpoConfig {
    /// Ratios below `1 - clip_low` are clipped.
    pub clip_low: f32,
    /// Ratios above `1 + clip_high` are clipped.
    pub clip_high: f32,
    /// For negative advantages the surrogate is at least `dual_clip * advantage`
    /// (dual clip, arXiv 1912.09729); must exceed 1.
    pub dual_clip: Option<f32>,
    /// Weight of the KL term; 0 leaves it out of the loss.
    pub kl_coef: f32,
    /// Its estimator.
    pub kl: KlEstimator,
    /// What ratios are taken over.
    pub ratio: RatioLevel,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        GrpoConfig {
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: None,
            kl_coef: 0.0,
            kl: KlEstimator::K3,
            ratio: RatioLevel::Token,
        }
    }
}

/// What [`Grpo::grpo_loss`] reports for each sequence; sums over its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct SequenceStats {
    /// The sequence's share of the loss.
    pub loss: f32,
    /// Sum of the KL estimates to the reference; 0 without a reference.
    pub kl: f32,
    /// Sum of `k3(old, new)`: how far the policy has moved since the rollout.
    pub moved: f32,
    /// Sum of the ratios.
    pub ratio: f32,
    /// The largest `|ratio - 1|`.
    pub ratio_deviation: f32,
    /// Tokens clipped below.
    pub clipped_low: f32,
    /// Tokens clipped above.
    pub clipped_high: f32,
    /// Tokens where the dual clip was in force.
    pub clipped_dual: f32,
}

/// Advantages and the policy loss.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, grpo::{AdvantageConfig, Grpo, GrpoConfig}};
/// let cpu = Cpu::new();
/// // One group of two answers, the first is right.
/// let rewards = cpu.upload(&[1.0f32, 0.0])?;
/// let mut advantages = cpu.zeros(2)?;
/// let config = AdvantageConfig { eps: 0.0, ..Default::default() };
/// cpu.advantages(1, 2, config, &rewards, &mut advantages)?;
/// assert_eq!(cpu.download(&advantages)?, [1.0, -1.0]);
/// // Answers of 1 and 3 tokens, before the first update: every ratio is 1.
/// let offsets = cpu.upload(&[0u32, 1, 4])?;
/// let weights = cpu.upload(&[0.25f32; 2])?; // token mean
/// let logprob = cpu.upload(&[-1.0f32, -2.0, -0.5, -0.1])?;
/// let (mut dlogprob, mut stats) = (cpu.zeros(4)?, cpu.zeros(2)?);
/// cpu.grpo_loss(
///     &GrpoConfig::default(), 2, 4, &offsets, &weights, &advantages, &logprob, &logprob, None,
///     &mut dlogprob, &mut stats,
/// )?;
/// assert_eq!(cpu.download(&dlogprob)?, [-0.25, 0.25, 0.25, 0.25]);
/// assert_eq!(cpu.download(&stats)?[1].ratio, 3.0);
/// # Ok(())
/// # }
/// ```
pub trait Grpo: Device {
    /// `advantages[g, i] = (rewards[g, i] - mean_g) / (std_g + eps)` for `groups` groups of
    /// `group_size` rewards. The statistics are two-pass in f64, the standard deviation is the
    /// population's (divided by `group_size`). A group whose rewards are all equal, compared exactly,
    /// gets advantages of exactly 0. A NaN among the rewards makes its group's advantages NaN.
    ///
    /// # Errors
    /// Short buffers, an empty group.
    fn advantages(
        &self,
        groups: usize,
        group_size: usize,
        config: AdvantageConfig,
        rewards: &Self::Buf<f32>,
        advantages: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Loss and gradient of `sequences` sequences whose tokens are `offsets[s] .. offsets[s + 1]` of
    /// the `[tokens]` buffers (`offsets` has `sequences + 1` entries, ascending from 0).
    ///
    /// With `r = exp(new - old)`: `loss = - sum over tokens of weights[s] * (S - kl_coef * KL)`,
    /// `S = min(r A, clip(r, 1 - low, 1 + high) A)`, and `max(S, dual_clip * A)` where `A < 0`.
    /// `weights[s]` carries the aggregation, over the whole mini-batch and not the call: token mean
    /// `1 / tokens of the mini-batch`, sequence mean `1 / (sequences * tokens of s)`, and so on.
    /// `dlogprob` gets the derivative with respect to `new`, 0 for tokens after the last sequence.
    ///
    /// Log-ratios, to the rollout and to the reference, are cut to -20 ..= 20 before they are used,
    /// with a derivative of 0 where they are cut, so that no input but NaN makes NaN. Equal bits in
    /// `new` and `old` give a ratio of exactly 1. A ratio on a clip boundary is not clipped. With a
    /// sequence ratio every token has the sequence's surrogate, so that its derivative keeps the
    /// token's form, `-weights[s] * r * A`.
    ///
    /// # Errors
    /// Short buffers; offsets that are not ascending from 0 to at most `tokens`; a negative clip; a
    /// `dual_clip` that is not above 1; a `kl_coef` that is not finite, or without a reference.
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
    ) -> Result<()>;
}

impl GrpoConfig {
    /// The rules of the settings themselves.
    pub(crate) fn check(&self, has_reference: bool) -> Result<()> {
        let refuse = |rule: String| Err(Error::invalid("grpo_loss", rule));
        for (name, clip) in [("clip_low", self.clip_low), ("clip_high", self.clip_high)] {
            if clip.is_nan() || clip < 0.0 {
                return refuse(format!("`{name}` is {clip}, it must be at least 0"));
            }
        }
        if let Some(dual) = self.dual_clip
            && (dual.is_nan() || dual <= 1.0)
        {
            return refuse(format!("`dual_clip` is {dual}, it must be above 1"));
        }
        if !self.kl_coef.is_finite() {
            return refuse(format!("`kl_coef` is {}, it must be finite", self.kl_coef));
        }
        if self.kl_coef != 0.0 && !has_reference {
            return refuse(format!("`kl_coef` is {} without a reference", self.kl_coef));
        }
        Ok(())
    }
}

/// The lengths that [`Grpo::advantages`] needs; gives the number of rewards.
pub(crate) fn check_advantages(
    groups: usize,
    group_size: usize,
    rewards: usize,
    advantages: usize,
) -> Result<usize> {
    const OP: &str = "advantages";
    if group_size == 0 {
        return Err(Error::invalid(OP, "`group_size` is 0"));
    }
    let len = groups.saturating_mul(group_size);
    check_len(OP, "rewards", rewards, len)?;
    check_len(OP, "advantages", advantages, len)?;
    Ok(len)
}

/// What [`Grpo::grpo_loss`] asks of its arguments, the offsets' values left out; the lengths in
/// their order.
pub(crate) fn check_grpo_loss(
    config: &GrpoConfig,
    sequences: usize,
    tokens: usize,
    [offsets, weights, advantages, new, old]: [usize; 5],
    reference: Option<usize>,
    [dlogprob, stats]: [usize; 2],
) -> Result<()> {
    const OP: &str = "grpo_loss";
    check_len(OP, "offsets", offsets, sequences.saturating_add(1))?;
    check_len(OP, "weights", weights, sequences)?;
    check_len(OP, "advantages", advantages, sequences)?;
    check_len(OP, "new", new, tokens)?;
    check_len(OP, "old", old, tokens)?;
    if let Some(reference) = reference {
        check_len(OP, "reference", reference, tokens)?;
    }
    check_len(OP, "dlogprob", dlogprob, tokens)?;
    check_len(OP, "stats", stats, sequences)?;
    config.check(reference.is_some())
}
