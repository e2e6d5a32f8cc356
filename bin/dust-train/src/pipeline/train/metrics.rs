//! What every training step logs.

use super::rollout::Lesson;
use serde::{Deserialize, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// What it taught.
    #[serde(default)]
    pub lesson: Lesson,
    /// Mean reward.
    pub reward_mean: f64,
    /// Standard deviation of the rewards.
    pub reward_std: f64,
    /// Mean pairwise accuracy of the valid rankings, whatever the reward is.
    pub pair_accuracy: Option<f64>,
    /// Share of groups whose judgments all got the same reward: they teach nothing.
    pub zero_variance: f64,
    /// Share of answers without a valid ranking, or without a program.
    pub invalid: f64,
    /// How often each shown position was ranked first.
    pub picked_first: Vec<usize>,
    /// Mean loss of the updates.
    pub loss: f64,
    /// Mean entropy of the judgments' tokens at the rollout, nats.
    pub entropy: f64,
    /// Mean KL estimate to the frozen start of training, per token.
    pub kl: f64,
    /// Mean `k3(old, new)`: how far the updates moved the policy from the rollout.
    pub moved: f64,
    /// Share of tokens clipped below, above, and by the dual clip, and their sum.
    pub clipped_low: f64,
    /// Clipped above.
    pub clipped_high: f64,
    /// By the dual clip.
    pub clipped_dual: f64,
    /// All of the clipping.
    pub clip_fraction: f64,
    /// Largest difference between a log-probability recorded in the rollout and the one that the
    /// training pass computes before the first update; must be 0.
    pub mismatch: f64,
    /// Mean global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Updates of this step.
    pub updates: usize,
    /// Mean tokens of a prompt.
    pub prompt_tokens: f64,
    /// Mean tokens of a judgment.
    pub answer_tokens: f64,
    /// Judgments that ended at their longest length.
    pub truncated: f64,
    /// Tokens a second in the rollout, prompts included.
    pub rollout_tokens_per_s: f64,
    /// Tokens a second in the updates: rows through forward and backward.
    pub train_tokens_per_s: f64,
    /// Seconds of the step.
    pub seconds: f64,
    /// Largest memory of the process so far, MiB.
    pub peak_memory_mib: f64,
}

/// Largest resident memory of this process so far, MiB.
pub(super) fn peak_memory_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|l| l.split_whitespace().next())
        .and_then(|kib| kib.parse::<f64>().ok())
        .map_or(f64::NAN, |kib| kib / 1024.0)
}

/// Mean of some numbers, 0 of none.
pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values
        .into_iter()
        .fold((0.0, 0usize), |(s, n), x| (s + x, n + 1));
    if n == 0 { 0.0 } else { sum / n as f64 }
}
