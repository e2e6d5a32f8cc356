//! DuST as stages over a run folder. Each reads and writes plain files, so that each can be run,
//! looked at, resumed and replaced alone.

mod comparison;
mod config;
mod eval;
mod folder;
mod group;
mod judging;
mod label;
mod progress;
mod reporting;
mod sample;
mod session;
pub mod train;

pub use comparison::comparison;
pub use config::{
    Aggregation, Arm, Config, EvalSampling, EvalSettings, GroupSettings, JudgeSettings,
    ModelSettings, Reward, SampleSettings, SandboxSettings, TaskSettings, TrainSettings,
};
pub use eval::{EvalFile, eval};
pub use folder::{Partial, RunFolder, hex};
pub use group::{Group, GroupSummary, group};
pub use label::{Labelled, label};
pub use reporting::{report, table};
pub use sample::{Candidate, sample};
pub use session::{Session, derive_seed};

use crate::tasks::{self, Split, Task};
use anyhow::{Context, Result};
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// Input that the user can mend: a file, a field, and the remedy, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadInput(pub String);

/// Returns a [`BadInput`] made from a format string.
macro_rules! bad_input {
    ($($words:tt)*) => {
        return Err(crate::pipeline::BadInput(format!($($words)*)).into())
    };
}
use bad_input;

/// The resolved configuration in a run folder.
pub const CONFIG: &str = "config.toml";
/// The facts of a run: versions, hashes, the sandbox that was in force.
pub const MANIFEST: &str = "manifest.json";

/// What makes two runs comparable, and one reproducible.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this program.
    pub version: String,
    /// The device's name.
    pub device: String,
    /// SHA-256 of the group file: runs whose hashes differ are not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups_sha256: Option<String>,
    /// What the sandbox had in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<serde_json::Value>,
    /// How many problems were read, by split.
    #[serde(default)]
    pub problems: HashMap<String, usize>,
}

impl Manifest {
    fn update(run: &RunFolder, change: impl FnOnce(&mut Self)) -> Result<()> {
        let mut manifest = if run.has(MANIFEST) {
            run.read_json(MANIFEST)?
        } else {
            Manifest::default()
        };
        manifest.version = env!("CARGO_PKG_VERSION").to_owned();
        change(&mut manifest);
        run.write_json(MANIFEST, &manifest)
    }
}

/// The problems of a run, by half.
pub struct Problems {
    /// For candidates and training.
    pub train: Vec<Task>,
    /// For the evaluation only.
    pub held_out: Vec<Task>,
}

impl Problems {
    /// Reads and splits the problems of `config`.
    ///
    /// # Errors
    /// What reading reports; an empty half.
    pub fn load(config: &Config) -> Result<Self> {
        let settings = &config.tasks;
        let set = tasks::load(&settings.source)?;
        let (mut train, mut held_out) = match &settings.eval_source {
            Some(source) => (set.tasks, tasks::load(source)?.tasks),
            None => set
                .tasks
                .into_iter()
                .partition(|t| t.split(config.seed, settings.held_out) == Split::Train),
        };
        let limit = |list: &mut Vec<Task>, most: usize| {
            if most > 0 {
                list.truncate(most);
            }
        };
        limit(&mut train, settings.max_train);
        limit(&mut held_out, settings.max_eval);
        if train.is_empty() {
            bad_input!(
                "{}: no problem is left for training; lower tasks.held_out",
                settings.source
            );
        }
        Ok(Self { train, held_out })
    }

    /// All of them by name.
    pub fn by_id(&self) -> HashMap<&str, &Task> {
        self.train
            .iter()
            .chain(&self.held_out)
            .map(|t| (t.id.as_str(), t))
            .collect()
    }
}

/// Opens a run folder for `config`. A folder that was begun with another configuration is refused,
/// since its files would not fit.
///
/// # Errors
/// Another configuration, with the first field that differs.
pub fn open_run(path: &Path, config: &Config) -> Result<RunFolder> {
    config.check()?;
    let run = RunFolder::open(path)?;
    if run.has(CONFIG) {
        let file = run.file(CONFIG);
        let old = std::fs::read_to_string(&file)
            .with_context(|| format!("{}: cannot be read", file.display()))?;
        let new = toml::to_string_pretty(config)?;
        if old != new {
            let line = old
                .lines()
                .zip(new.lines())
                .find(|(a, b)| a != b)
                .map_or_else(String::new, |(a, b)| format!(" (`{a}` there, `{b}` now)"));
            bad_input!(
                "{}: the folder was begun with another configuration{line}; \
                 choose another folder or go on with its own: --config {}",
                path.display(),
                file.display()
            );
        }
    } else {
        run.write(CONFIG, toml::to_string_pretty(config)?.as_bytes())?;
    }
    Ok(run)
}

/// All stages, each skipped where its files are there: before-evaluation, candidates, labels,
/// groups, training, after-evaluation, report.
///
/// # Errors
/// What the stages report.
pub fn run<B: Backend + Clone>(device: &B, config: &Config, run: &RunFolder) -> Result<()> {
    sample(device, config, run)?;
    label(config, run)?;
    group(config, run)?;
    eval(device, config, run, None)?;
    train::train(device, config, run)?;
    eval(device, config, run, Some(train::FINAL))?;
    report(config, run)
}
