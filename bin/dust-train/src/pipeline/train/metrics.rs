//! What every training step logs.

use super::rollout::Lesson;
use serde::{Deserialize, Deserializer, Serialize};

/// One line of `metrics.jsonl`.
///
/// JSON has no number for what is not finite. Such a value is written as `null` and read as NaN, so
/// that a run that diverged can be resumed and looked at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: usize,
    /// What it taught.
    pub lesson: Lesson,
    /// Groups that the updates learned from.
    pub groups: usize,
    /// Groups that were drawn; with `train.refill` those that teach nothing are left out. The rewards
    /// and shares below are over all of them.
    pub groups_drawn: usize,
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
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Mean entropy of the answers' tokens in the first epoch, nats: at the rollout for the first
    /// mini-batch, after the updates before it for the others.
    #[serde(deserialize_with = "or_nan")]
    pub entropy: f64,
    /// Mean KL estimate to the frozen start of training, per token; left out where the loss has no
    /// such term.
    #[serde(
        deserialize_with = "some_or_nan",
        skip_serializing_if = "Option::is_none"
    )]
    pub kl: Option<f64>,
    /// Mean `k3(old, new)`: how far the updates moved the policy from the rollout.
    #[serde(deserialize_with = "or_nan")]
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
    #[serde(deserialize_with = "or_nan")]
    pub mismatch: f64,
    /// Mean global gradient norm before clipping, of the updates that were not skipped.
    #[serde(deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Updates of this step.
    pub updates: usize,
    /// Those of them that changed nothing, because a gradient was not finite.
    pub skipped_updates: usize,
    /// Programs that the sandbox gave no verdict for: they were left out.
    pub no_verdict: usize,
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
    #[serde(deserialize_with = "or_nan")]
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

fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn some_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    or_nan(deserializer).map(Some)
}

/// The larger of two distances; NaN if one of them is, which `f64::max` would hide.
pub(in super::super) fn worst(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Mean of some numbers, 0 of none.
pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values
        .into_iter()
        .fold((0.0, 0usize), |(s, n), x| (s + x, n + 1));
    if n == 0 { 0.0 } else { sum / n as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_diverged_can_be_read_again() {
        let step = StepMetrics {
            grad_norm: f64::INFINITY,
            loss: f64::NAN,
            mismatch: [0.0, f64::NAN, 1.0].into_iter().fold(0.0, worst),
            skipped_updates: 1,
            ..StepMetrics::default()
        };
        let text = serde_json::to_string(&step).unwrap();
        let again: StepMetrics = serde_json::from_str(&text).unwrap();
        assert!(again.grad_norm.is_nan() && again.loss.is_nan() && again.mismatch.is_nan());
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
        assert_eq!((again.skipped_updates, again.kl), (1, None));
    }

    #[test]
    fn logs_of_earlier_versions_are_read() {
        let step: StepMetrics = serde_json::from_str("{\"step\": 3, \"updates\": 2}").unwrap();
        assert_eq!((step.step, step.updates), (3, 2));
    }
}
