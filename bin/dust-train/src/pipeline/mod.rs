//! DuST as stages over a run folder. Each reads and writes plain files, so that each can be run,
//! looked at, resumed and replaced alone.

mod comparison;
mod config;
mod eval;
mod folder;
mod group;
mod judging;
mod label;
mod problems;
mod progress;
mod reporting;
mod sample;
mod session;
mod stage;
pub mod train;

pub use comparison::comparison;
pub use config::{
    Aggregation, Arm, Config, EvalSampling, EvalSettings, GroupSettings, JudgeSettings,
    ModelSettings, Reward, SampleSettings, SandboxSettings, TaskSettings, TrainSettings,
};
pub use eval::{EvalFile, eval};
pub use folder::{Partial, RunFolder, hex};
pub use group::{Group, GroupSummary, group, share_groups};
pub use label::{Labelled, label};
pub use problems::Problems;
pub use reporting::{report, table};
pub use sample::{Candidate, sample};
pub use session::{Session, Until, derive_seed};
pub use stage::Settings;

use anyhow::Result;
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    pub problems: BTreeMap<String, usize>,
    /// The settings that each stage used, by its command.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub stages: BTreeMap<String, Settings>,
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

/// Opens a run folder for `config`, which becomes the folder's own. A setting that a stage has used
/// cannot be changed, since its files would not fit.
///
/// # Errors
/// Such a setting, with the stage and the remedy.
pub fn open_run(path: &Path, config: &Config) -> Result<RunFolder> {
    config.check()?;
    let run = RunFolder::open(path)?;
    stage::check(&run, config)?;
    run.write(CONFIG, toml::to_string_pretty(config)?.as_bytes())?;
    Ok(run)
}

/// All stages, each skipped where its files are there: candidates, labels and groups, unless the
/// folder has groups already; before-evaluation, training, after-evaluation, report.
///
/// # Errors
/// What the stages report.
pub fn run<B: Backend + Clone>(device: &B, config: &Config, run: &RunFolder) -> Result<()> {
    if !run.has(group::GROUPS) {
        sample(device, config, run)?;
        label(config, run)?;
        group(config, run)?;
    }
    eval(device, config, run, None)?;
    train::train(device, config, run)?;
    eval(device, config, run, Some(train::FINAL))?;
    report(config, run)
}
