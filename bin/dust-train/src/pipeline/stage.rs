//! What each stage depends on. A stage records the settings that its files were made with, and a
//! setting may be changed as long as no stage has used it.

use super::eval::{AFTER, BEFORE};
use super::group::GROUPS;
use super::label::VERDICTS;
use super::sample::CANDIDATES;
use super::train::{FINAL, METRICS, STATE};
use super::{Arm, Config, MANIFEST, Manifest, RunFolder, bad_input, hex};
use crate::tasks::Task;
use anyhow::Result;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Settings by name (`train.steps`), with their values; null is one that was left out.
pub type Settings = BTreeMap<String, Value>;

/// A stage that leaves files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Sample,
    Label,
    Group,
    EvalBefore,
    Train,
    EvalAfter,
}

/// The model and how it is asked.
const MODEL: &[&str] = &["model.path", "model.storage", "model.thinking", "seed"];
/// Which problems are trained on.
const PROBLEMS: &[&str] = &[
    "tasks.source",
    "tasks.eval_source",
    "tasks.held_out",
    "tasks.max_train",
];
/// What programs have to do to be right.
const RULES: &[&str] = &["sandbox.limits", "sandbox.grading"];
/// What the figures of an evaluation depend on, besides the weights.
const MEASURED: &[&[&str]] = &[
    MODEL,
    &[
        "tasks.source",
        "tasks.eval_source",
        "tasks.held_out",
        "tasks.max_eval",
        "sample.extract",
        "sample.sampling.max_tokens",
        "group.size",
        "judge",
        "eval",
    ],
    RULES,
];
const TRAINED: &[&[&str]] = &[MODEL, PROBLEMS, &["group.size", "judge", "train"]];
/// Besides [`TRAINED`], in the arms that write programs.
const WRITTEN: &[&[&str]] = &[&["sample", "group"], RULES];
/// Has no bearing on the result.
const FREE: &str = "train.checkpoint_every";
/// May be raised as long as training goes on.
const STEPS: &str = "train.steps";

impl Stage {
    const ALL: [Self; 6] = [
        Self::Sample,
        Self::Label,
        Self::Group,
        Self::EvalBefore,
        Self::Train,
        Self::EvalAfter,
    ];

    fn command(self) -> &'static str {
        match self {
            Self::Sample => "sample",
            Self::Label => "label",
            Self::Group => "group",
            Self::EvalBefore => "eval",
            Self::Train => "train",
            Self::EvalAfter => "eval --after",
        }
    }

    /// What it leaves, finished or not.
    fn files(self) -> Vec<String> {
        let partial = |name: &str| format!("{name}.partial");
        let eval = |file: &str, when: &str| {
            vec![
                file.to_owned(),
                format!("eval-{when}-candidates.jsonl.partial"),
                format!("eval-{when}-judgments.jsonl.partial"),
            ]
        };
        match self {
            Self::Sample => vec![CANDIDATES.to_owned(), partial(CANDIDATES)],
            Self::Label => vec![VERDICTS.to_owned(), partial(VERDICTS)],
            Self::Group => vec![GROUPS.to_owned()],
            Self::EvalBefore => eval(BEFORE, "before"),
            Self::Train => vec![
                FINAL.to_owned(),
                METRICS.to_owned(),
                partial(METRICS),
                STATE.to_owned(),
            ],
            Self::EvalAfter => eval(AFTER, "after"),
        }
    }

    /// The files that are there. An empty one was begun, but nothing went into it.
    fn present(self, run: &RunFolder) -> Vec<String> {
        let mut files = self.files();
        files.retain(|name| run.file(name).metadata().is_ok_and(|m| m.len() > 0));
        files
    }

    /// The settings that its files depend on: names, or the sections that hold them.
    fn fields(self, config: &Config) -> Vec<&'static str> {
        let train = || {
            let writes = config.train.arm != Arm::Ranking;
            [
                TRAINED.concat(),
                WRITTEN[..if writes { 2 } else { 0 }].concat(),
            ]
            .concat()
        };
        match self {
            Self::Sample => [MODEL, PROBLEMS, &["sample"]].concat(),
            Self::Label => [&Self::Sample.fields(config)[..], RULES].concat(),
            Self::Group => [&Self::Label.fields(config)[..], &["group"]].concat(),
            Self::EvalBefore => MEASURED.concat(),
            Self::Train => train(),
            Self::EvalAfter => [MEASURED.concat(), train()].concat(),
        }
    }

    fn depends_on(self, config: &Config, setting: &str) -> bool {
        let within = |field: &&str| {
            let rest = setting.strip_prefix(*field);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        setting != FREE && self.fields(config).iter().any(within)
    }

    /// Records the settings that the stage is about to use.
    pub fn begin(self, run: &RunFolder, config: &Config) -> Result<()> {
        let mut used = settings(config)?;
        used.retain(|name, _| self.depends_on(config, name));
        Manifest::update(run, |m| {
            m.stages.insert(self.command().to_owned(), used);
        })
    }
}

/// Refuses settings that differ from those that a stage has used.
pub(super) fn check(run: &RunFolder, config: &Config) -> Result<()> {
    if !run.has(MANIFEST) {
        return Ok(());
    }
    let manifest: Manifest = run.read_json(MANIFEST)?;
    let now = settings(config)?;
    let mut changed: Option<(&String, &Value, &Value)> = None;
    let (mut commands, mut files) = (Vec::new(), Vec::new());
    for stage in Stage::ALL {
        let present = stage.present(run);
        let Some(used) = manifest.stages.get(stage.command()) else {
            continue;
        };
        if present.is_empty() {
            continue;
        }
        // Only names that both know: a later version may have more of them.
        let difference = used
            .iter()
            .filter_map(|(name, was)| Some((name, was, now.get(name)?)))
            .filter(|(name, was, is)| was != is && (*name != STEPS || run.has(FINAL)))
            .find(|(name, ..)| changed.is_none_or(|(first, ..)| first == *name));
        if difference.is_some() {
            changed = difference;
            commands.push(format!("`{}`", stage.command()));
            files.extend(present);
        }
    }
    if let Some((name, was, is)) = changed {
        let text = |value: &Value| match value {
            Value::Null => "left out".to_owned(),
            value => value.to_string(),
        };
        bad_input!(
            "{}: {name} was {} when {} ran and is {} now; choose another folder, or remove {} from \
             this one",
            run.path().display(),
            text(was),
            commands.join(", "),
            text(is),
            files.join(", ")
        );
    }
    Ok(())
}

/// All that the figures of an evaluation depend on besides the weights: its settings, and the
/// problems with their tests. Evaluations that differ in it cannot be compared.
pub(super) fn measurement(config: &Config, problems: &[Task]) -> Result<String> {
    let mut text = String::new();
    for (name, value) in settings(config)? {
        if Stage::EvalBefore.depends_on(config, &name) {
            let _ = writeln!(text, "{name} = {value}");
        }
    }
    let mut problems: Vec<&Task> = problems.iter().collect();
    problems.sort_by(|a, b| a.id.cmp(&b.id));
    let hash = Sha256::digest(serde_json::to_vec(&problems)?);
    let _ = writeln!(text, "problems = {}", hex(&hash));
    Ok(text)
}

/// Every setting of a configuration, by its full name.
fn settings(config: &Config) -> Result<Settings> {
    fn flatten(prefix: &str, value: Value, into: &mut Settings) {
        match value {
            Value::Object(section) => {
                for (key, value) in section {
                    flatten(&format!("{prefix}.{key}"), value, into);
                }
            }
            value => drop(into.insert(prefix[1..].to_owned(), value)),
        }
    }
    let mut all = Settings::new();
    // Through the text, where an f32 has its own shortest digits.
    let text = serde_json::to_string(config)?;
    flatten("", serde_json::from_str(&text)?, &mut all);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder() -> (tempfile::TempDir, RunFolder) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        (dir, run)
    }

    fn refusal(run: &RunFolder, config: &Config) -> String {
        check(run, config).unwrap_err().to_string()
    }

    #[test]
    fn a_setting_is_frozen_by_the_stages_that_used_it() {
        let (_dir, run) = folder();
        let config = Config::default();
        Stage::Sample.begin(&run, &config).unwrap();
        Stage::Label.begin(&run, &config).unwrap();
        let mut other = config.clone();
        other.sample.sampling.temperature = 0.6;
        // Begun, but nothing was made.
        fs::write(run.file("candidates.jsonl.partial"), "").unwrap();
        check(&run, &other).unwrap();
        fs::write(run.file(CANDIDATES), "{}\n").unwrap();
        fs::write(run.file("verdicts.jsonl.partial"), "{}\n").unwrap();
        check(&run, &config).unwrap();
        let text = refusal(&run, &other);
        for word in [
            "sample.sampling.temperature was 1.0 when `sample`, `label` ran and is 0.6 now",
            "candidates.jsonl, verdicts.jsonl.partial",
        ] {
            assert!(text.contains(word), "{text}");
        }
        fs::remove_file(run.file("verdicts.jsonl.partial")).unwrap();
        other = config.clone();
        other.sandbox.limits.cpu_s = 1.0;
        other.train.steps = 1;
        other.tasks.max_eval = 3;
        other.model.batch = 1;
        check(&run, &other).unwrap();
    }

    #[test]
    fn steps_may_be_added_until_training_is_done() {
        let (_dir, run) = folder();
        let config = Config::default();
        Stage::Train.begin(&run, &config).unwrap();
        fs::write(run.file(STATE), "x").unwrap();
        let mut other = config.clone();
        other.train.steps += 1;
        other.train.checkpoint_every += 1;
        other.sample.candidates += 1;
        check(&run, &other).unwrap();
        fs::create_dir(run.file(FINAL)).unwrap();
        assert!(refusal(&run, &other).contains("train.steps was 100"));
        other = config.clone();
        other.train.dual_clip = Some(10.0);
        assert!(refusal(&run, &other).contains("train.dual_clip was left out"));
        // The new arm uses settings that the old one did not.
        other = config;
        other.train.arm = Arm::Generation;
        other.sample.candidates += 1;
        assert!(refusal(&run, &other).contains("train.arm"));
    }

    #[test]
    fn a_folder_of_an_earlier_version_knows_fewer_settings() {
        let (_dir, run) = folder();
        let config = Config::default();
        Stage::Train.begin(&run, &config).unwrap();
        Manifest::update(&run, |m| {
            let used = m.stages.get_mut("train").unwrap();
            assert!(used.remove("train.refill").is_some());
        })
        .unwrap();
        fs::write(run.file(STATE), "x").unwrap();
        check(&run, &config).unwrap();
    }

    #[test]
    fn every_field_is_a_setting() {
        let mut config = Config::default();
        config.train.arm = Arm::Iterative;
        let all = settings(&config).unwrap();
        for stage in Stage::ALL {
            for field in stage.fields(&config) {
                let section = format!("{field}.");
                assert!(
                    all.keys().any(|n| n == field || n.starts_with(&section)),
                    "{field}"
                );
            }
        }
        assert!(all.contains_key(FREE) && all.contains_key(STEPS));
    }

    #[test]
    fn a_measurement_depends_on_the_tests_and_not_on_training() {
        let tasks = crate::tasks::builtin().unwrap();
        let mut config = Config::default();
        let one = measurement(&config, &tasks[..3]).unwrap();
        config.train.learning_rate = 1.0;
        config.train.seed = Some(7);
        config.model.batch = 1;
        assert_eq!(one, measurement(&config, &tasks[..3]).unwrap());
        assert_ne!(one, measurement(&config, &tasks[..2]).unwrap());
        let mut other = tasks[..3].to_vec();
        other[1].tests.pop();
        assert_ne!(one, measurement(&config, &other).unwrap());
        config.judge.prefix = "Ranking:".into();
        assert_ne!(one, measurement(&config, &tasks[..3]).unwrap());
    }
}
