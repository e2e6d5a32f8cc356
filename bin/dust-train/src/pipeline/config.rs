//! One TOML file for a whole run, every default stated; `dust-train config` prints them.

use super::BadInput;
use crate::judge::Parse;
use crate::model::Storage;
use crate::rollout::SamplingSettings;
use crate::sandbox::{Grading, Layer, Limits};
use crate::tasks::extract::Rule;
use anyhow::Result;
use dust_kernels::{grpo, ranking};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// All settings of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Key of the random numbers of data and measurement: the split, the candidates, the groups, the
    /// evaluation.
    pub seed: u64,
    /// The model.
    pub model: ModelSettings,
    /// The problems.
    pub tasks: TaskSettings,
    /// Drawing the candidate programs.
    pub sample: SampleSettings,
    /// Running them.
    pub sandbox: SandboxSettings,
    /// Putting them into groups.
    pub group: GroupSettings,
    /// Asking for rankings.
    pub judge: JudgeSettings,
    /// Training.
    pub train: TrainSettings,
    /// Measuring.
    pub eval: EvalSettings,
}

/// The model and how it is held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// A Hugging Face folder, a `.gguf` file, or a hub repository `ORG/NAME`.
    pub path: String,
    /// How matrices are stored: `f32`, or `bf16` with f32 master weights; left out: f32 on the CPU,
    /// bf16 on a GPU.
    pub storage: Option<Storage>,
    /// Thinking on or off, for templates that have the switch; left out: as the template says.
    pub thinking: Option<bool>,
    /// Keep one layer's activations in training and compute the others again.
    pub recompute: bool,
    /// Samples that run at a time.
    pub batch: usize,
    /// Rows (tokens) of one forward and backward pass. Groups are cut to fit; only a prompt with a
    /// single answer that is longer runs in a pass of its own length.
    pub micro_batch_tokens: usize,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            path: String::new(),
            storage: None,
            thinking: None,
            recompute: false,
            batch: 32,
            micro_batch_tokens: 2048,
        }
    }
}

/// Which problems, and how they are split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskSettings {
    /// `builtin`, `humaneval`, `humaneval:FILE`, `livecodebench:FILE[@FROM..TO]` or a JSONL file.
    pub source: String,
    /// Problems to evaluate on, if they are another set; left out: the held-out part of `source`.
    pub eval_source: Option<String>,
    /// Share of problems that are held out, where the problems do not say themselves.
    pub held_out: f64,
    /// At most this many training problems, chosen by a hash of `seed` and their names; 0 for all.
    pub max_train: usize,
    /// At most this many held-out problems, chosen alike; 0 for all.
    pub max_eval: usize,
}

impl Default for TaskSettings {
    fn default() -> Self {
        Self {
            source: "builtin".into(),
            eval_source: None,
            held_out: 0.2,
            max_train: 0,
            max_eval: 0,
        }
    }
}

/// Drawing the candidate programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSettings {
    /// Candidates a problem (M).
    pub candidates: u32,
    /// Which fenced block of an answer is the program. With `first` an answer ends with its first
    /// block, unless the model can reason.
    pub extract: Rule,
    /// How tokens are drawn: `temperature`, `top_p`, `top_k`, `min_p`, `max_tokens`.
    pub sampling: SamplingSettings,
}

impl Default for SampleSettings {
    fn default() -> Self {
        Self {
            candidates: 64,
            extract: Rule::LastFence,
            sampling: SamplingSettings {
                max_tokens: 2048,
                ..SamplingSettings::default()
            },
        }
    }
}

/// Running the programs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxSettings {
    /// What a program may use, each test for itself.
    pub limits: Limits,
    /// Whose rules decide: `process`, or `lcb-strict` for LiveCodeBench's (docs/benchmarks.md).
    pub grading: Grading,
    /// Layers that may be missing; labelling refuses to start where another one is.
    pub allow_weak: Vec<Layer>,
    /// Programs that run at a time; left out: one a core.
    pub workers: Option<usize>,
}

/// Putting candidates into groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupSettings {
    /// Candidates a group (K).
    pub size: usize,
    /// Use each program text once a problem.
    pub distinct: bool,
    /// At most this many groups a problem; 0 for all.
    pub max_per_problem: usize,
}

impl Default for GroupSettings {
    fn default() -> Self {
        Self {
            size: 4,
            distinct: false,
            max_per_problem: 0,
        }
    }
}

/// Asking for rankings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JudgeSettings {
    /// How the ranking is read: `strict` or `lenient`.
    pub parse: Parse,
    /// Words that are put into the judge's mouth: the answer continues them. `Ranking:` makes a
    /// small model answer without reasoning; empty leaves the answer to the model.
    pub prefix: String,
    /// Example rankings in the prompt, at random and of other numbers of candidates: a small model
    /// needs to see the form, and copies what it sees.
    pub examples: usize,
    /// Strings that end the answer, besides the model's stop tokens.
    pub stop: Vec<String>,
    /// Longest judgment in tokens.
    pub max_tokens: usize,
}

impl Default for JudgeSettings {
    fn default() -> Self {
        Self {
            parse: Parse::Strict,
            prefix: String::new(),
            examples: 0,
            stop: Vec::new(),
            max_tokens: 2048,
        }
    }
}

/// What a judgment is rewarded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reward {
    /// Share of the (correct, incorrect) pairs in the right order.
    #[default]
    PairAccuracy,
    /// Normalised discounted cumulative gain.
    Ndcg,
    /// 1 if the candidate ranked first is correct.
    Selection,
}

impl Reward {
    /// The kernel's name for it.
    pub fn kernel(self) -> ranking::RankingReward {
        match self {
            Reward::PairAccuracy => ranking::RankingReward::PairwiseAccuracy,
            Reward::Ndcg => ranking::RankingReward::Ndcg,
            Reward::Selection => ranking::RankingReward::Selection,
        }
    }
}

/// What training teaches: the arms that the paper compares. All of them are measured alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// Ranking the candidates of `groups.jsonl` (off-policy): DuST.
    #[default]
    Ranking,
    /// Ranking candidates that the current policy writes for the step.
    OnPolicyRanking,
    /// Writing programs, rewarded by their tests (RLVR).
    Generation,
    /// Writing programs and ranking those of `groups.jsonl` in turn, `alternate` steps each.
    Iterative,
}

/// How the tokens' losses become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Every token of the mini-batch weighs the same.
    #[default]
    TokenMean,
    /// Every judgment weighs the same, and inside of it every token.
    SequenceMean,
}

/// Training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSettings {
    /// Key of training's random numbers; left out: `seed`. Runs that differ in it alone are seeds of
    /// one arm.
    pub seed: Option<u64>,
    /// What is taught: `ranking`, `on_policy_ranking`, `generation` or `iterative`.
    pub arm: Arm,
    /// Steps of one kind before the other, in the arm `iterative`.
    pub alternate: usize,
    /// The first steps repeat right rankings of `groups.jsonl` word for word (supervised
    /// fine-tuning) before the arm begins.
    pub sft_steps: usize,
    /// Steps: rollouts followed by updates, `sft_steps` among them.
    pub steps: usize,
    /// Groups a step; in the arm `generation` problems.
    pub prompts: usize,
    /// Answers a prompt (G): judgments of a group, or programs.
    pub judgments: u32,
    /// Leave out groups whose answers all got the same reward, and draw for others instead.
    pub refill: bool,
    /// Groups an update.
    pub mini_batch: usize,
    /// Passes over a step's judgments.
    pub epochs: usize,
    /// What a judgment is rewarded for.
    pub reward: Reward,
    /// Reward of an answer without a valid ranking.
    pub invalid_reward: f32,
    /// Divide advantages by the group's standard deviation.
    pub std_advantages: bool,
    /// Added to that standard deviation.
    pub advantage_eps: f32,
    /// Softmax temperature of the judgments; programs are written at `sample.sampling.temperature`.
    pub temperature: f32,
    /// Learning rate after the warm-up.
    pub learning_rate: f32,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// Decoupled weight decay of the matrices.
    pub weight_decay: f32,
    /// Decay of Adam's first moment.
    pub beta1: f32,
    /// Decay of Adam's second moment.
    pub beta2: f32,
    /// Adam's epsilon.
    pub adam_eps: f32,
    /// Largest global gradient norm.
    pub max_grad_norm: f32,
    /// Ratios below `1 - clip_low` are clipped.
    pub clip_low: f32,
    /// Ratios above `1 + clip_high` are clipped.
    pub clip_high: f32,
    /// Dual clip for negative advantages; left out: none.
    pub dual_clip: Option<f32>,
    /// Weight of the KL term to the frozen start of training; 0 spares the pass through it.
    pub kl_coef: f32,
    /// How token losses are averaged.
    pub aggregation: Aggregation,
    /// Steps between two checkpoints. The last step has one, and so has a step that ends ten minutes
    /// after the last checkpoint.
    pub checkpoint_every: usize,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            seed: None,
            arm: Arm::Ranking,
            alternate: 50,
            sft_steps: 0,
            steps: 100,
            prompts: 64,
            judgments: 8,
            refill: false,
            mini_batch: 16,
            epochs: 3,
            reward: Reward::PairAccuracy,
            invalid_reward: -1.0,
            std_advantages: true,
            advantage_eps: 1e-6,
            temperature: 1.0,
            learning_rate: 1e-6,
            warmup_steps: 10,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            adam_eps: 1e-8,
            max_grad_norm: 1.0,
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: None,
            kl_coef: 0.001,
            aggregation: Aggregation::TokenMean,
            checkpoint_every: 10,
        }
    }
}

impl TrainSettings {
    /// The loss's settings, for the kernel.
    pub fn grpo(&self) -> grpo::GrpoConfig {
        grpo::GrpoConfig {
            clip_low: self.clip_low,
            clip_high: self.clip_high,
            dual_clip: self.dual_clip,
            kl_coef: self.kl_coef,
            ..grpo::GrpoConfig::default()
        }
    }

    /// The advantages' settings, for the kernel.
    pub fn advantages(&self) -> grpo::AdvantageConfig {
        grpo::AdvantageConfig {
            divide_by_std: self.std_advantages,
            eps: self.advantage_eps,
        }
    }
}

/// Measuring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSettings {
    /// Times that a problem gets `group.size` fresh candidates.
    pub repeats: u32,
    /// Orders in which each group is shown to the judge.
    pub permutations: usize,
    /// How programs and judgments are drawn; the longest lengths are those of `sample` and `judge`.
    pub sampling: EvalSampling,
}

/// How tokens are drawn in the evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSampling {
    /// Softmax temperature.
    pub temperature: f32,
    /// Nucleus mass.
    pub top_p: f32,
    /// Most probable tokens kept.
    pub top_k: u32,
}

impl Default for EvalSampling {
    fn default() -> Self {
        Self {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
        }
    }
}

impl EvalSampling {
    /// With a longest length, for the engine.
    pub fn settings(&self, max_tokens: usize) -> SamplingSettings {
        SamplingSettings {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: 0.0,
            max_tokens,
        }
    }
}

impl Default for EvalSettings {
    fn default() -> Self {
        Self {
            repeats: 10,
            permutations: 1,
            sampling: EvalSampling::default(),
        }
    }
}

impl Config {
    /// Reads a file; what it leaves out has its default.
    ///
    /// # Errors
    /// [`BadInput`](super::BadInput): what the file system or the TOML parser reports, and settings
    /// that contradict each other.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_with(path, &[])
    }

    /// As [`Config::read`], with fields overridden by `FIELD=VALUE` in TOML's syntax; a value that is
    /// no TOML is taken as a string.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn read_with(path: &Path, set: &[String]) -> Result<Self> {
        let file = path.display();
        let bad = |why: String| BadInput(format!("{file}: {}", one_line(&why)));
        let text =
            std::fs::read_to_string(path).map_err(|e| bad(format!("cannot be read: {e}")))?;
        let mut table: toml::Table = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
        for assignment in set {
            override_field(&mut table, assignment)?;
        }
        let config: Self = table
            .try_into()
            .map_err(|e: toml::de::Error| bad(e.to_string()))?;
        config.check().map_err(|e| bad(e.to_string()))?;
        Ok(config)
    }

    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`BadInput`](super::BadInput) that names the field.
    pub fn check(&self) -> Result<(), BadInput> {
        let t = &self.train;
        let (drawn, measured) = (&self.sample.sampling, &self.eval.sampling);
        let writes = matches!(t.arm, Arm::Generation | Arm::Iterative);
        let share = |x: f32| x > 0.0 && x <= 1.0;
        let at_least = |x: f32, least: f32| x.is_finite() && x >= least;
        let rules = [
            (
                !self.model.path.is_empty(),
                "model.path: name a model (folder, .gguf file or hub repository)",
            ),
            (self.model.batch > 0, "model.batch: must be at least 1"),
            (
                (2..=64).contains(&self.group.size),
                "group.size: must be from 2 to 64",
            ),
            (
                self.model.micro_batch_tokens > 0,
                "model.micro_batch_tokens: must be at least 1",
            ),
            (
                self.sample.candidates as usize >= self.group.size,
                "sample.candidates: must be at least group.size",
            ),
            (
                at_least(drawn.temperature, 0.0),
                "sample.sampling.temperature: must not be negative",
            ),
            (
                !writes || drawn.temperature > 0.0,
                "sample.sampling.temperature: must be above 0 where train.arm writes programs",
            ),
            (
                share(drawn.top_p),
                "sample.sampling.top_p: must be above 0 and at most 1",
            ),
            (
                (0.0..=1.0).contains(&drawn.min_p),
                "sample.sampling.min_p: must be from 0 to 1",
            ),
            (
                drawn.max_tokens > 0,
                "sample.sampling.max_tokens: must be at least 1",
            ),
            (
                (0.0..1.0).contains(&self.tasks.held_out),
                "tasks.held_out: must be at least 0 and below 1",
            ),
            (
                self.judge.max_tokens > 0,
                "judge.max_tokens: must be at least 1",
            ),
            (t.prompts > 0, "train.prompts: must be at least 1"),
            (
                t.judgments > 1,
                "train.judgments: must be at least 2, since advantages compare them",
            ),
            (t.mini_batch > 0, "train.mini_batch: must be at least 1"),
            (t.alternate > 0, "train.alternate: must be at least 1"),
            (t.epochs > 0, "train.epochs: must be at least 1"),
            (
                t.invalid_reward.is_finite(),
                "train.invalid_reward: must be a number",
            ),
            (
                at_least(t.advantage_eps, 0.0),
                "train.advantage_eps: must not be negative",
            ),
            (
                t.temperature.is_finite() && t.temperature > 0.0,
                "train.temperature: must be above 0",
            ),
            (
                at_least(t.learning_rate, 0.0),
                "train.learning_rate: must not be negative",
            ),
            (
                at_least(t.weight_decay, 0.0),
                "train.weight_decay: must not be negative",
            ),
            (
                (0.0..1.0).contains(&t.beta1),
                "train.beta1: must be at least 0 and below 1",
            ),
            (
                (0.0..1.0).contains(&t.beta2),
                "train.beta2: must be at least 0 and below 1",
            ),
            (
                t.adam_eps.is_finite() && t.adam_eps > 0.0,
                "train.adam_eps: must be above 0",
            ),
            (
                at_least(t.kl_coef, 0.0),
                "train.kl_coef: must not be negative",
            ),
            (
                t.max_grad_norm > 0.0,
                "train.max_grad_norm: must be above 0",
            ),
            (
                (0.0..=1.0).contains(&t.clip_low),
                "train.clip_low: must be from 0 to 1",
            ),
            (
                at_least(t.clip_high, 0.0),
                "train.clip_high: must not be negative",
            ),
            (
                t.dual_clip.is_none_or(|c| c > 1.0),
                "train.dual_clip: must be above 1",
            ),
            (
                t.checkpoint_every > 0,
                "train.checkpoint_every: must be at least 1",
            ),
            (self.eval.repeats > 0, "eval.repeats: must be at least 1"),
            (
                self.eval.permutations > 0,
                "eval.permutations: must be at least 1",
            ),
            (
                at_least(measured.temperature, 0.0),
                "eval.sampling.temperature: must not be negative",
            ),
            (
                share(measured.top_p),
                "eval.sampling.top_p: must be above 0 and at most 1",
            ),
        ];
        if let Some((_, rule)) = rules.iter().find(|(holds, _)| !holds) {
            return Err(BadInput((*rule).to_owned()));
        }
        let limits = self.sandbox.limits.check();
        limits.map_err(|error| BadInput(format!("sandbox.{error}")))
    }
}

fn override_field(table: &mut toml::Table, assignment: &str) -> Result<(), BadInput> {
    let (field, value) = assignment
        .split_once('=')
        .ok_or_else(|| BadInput(format!("--set {assignment}: say FIELD=VALUE")))?;
    let value = toml::from_str::<toml::Table>(&format!("value = {value}"))
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut parts: Vec<&str> = field.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut at = table;
    for part in parts {
        at = at
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| BadInput(format!("--set {assignment}: `{part}` is no section")))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_would_fail_later_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.toml");
        std::fs::write(&file, "model.path = \"m\"\n").unwrap();
        Config::read(&file).unwrap();
        for set in [
            "model.micro_batch_tokens=0",
            "sample.candidates=3",
            "sample.sampling.temperature=-1.0",
            "sample.sampling.top_p=0.0",
            "sample.sampling.min_p=2.0",
            "sample.sampling.max_tokens=0",
            "train.invalid_reward=nan",
            "train.advantage_eps=-1.0",
            "train.weight_decay=-0.1",
            "train.beta1=1.0",
            "train.beta2=nan",
            "train.adam_eps=0.0",
            "train.kl_coef=-0.1",
            "train.clip_high=nan",
            "eval.sampling.temperature=nan",
            "eval.sampling.top_p=1.5",
        ] {
            let field = set.split_once('=').unwrap().0;
            let error = Config::read_with(&file, &[set.to_owned()]).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(&format!("{field}: must")), "{set}: {text}");
        }
        let greedy = "sample.sampling.temperature=0.0".to_owned();
        Config::read_with(&file, std::slice::from_ref(&greedy)).unwrap();
        let arm = "train.arm=iterative".to_owned();
        assert!(Config::read_with(&file, &[greedy, arm]).is_err());
    }
}
