//! The stages of DuST over a run folder: `run` for all of them, or one at a time.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use dust_kernels::Backend;

use crate::pipeline::{self, Config, RunFolder, train};
use crate::sandbox::Layer;

use super::InputError;

/// What every stage is told.
#[derive(Args)]
pub(super) struct StageArgs {
    /// The run folder; it is made if it is not there.
    #[arg(long = "run", value_name = "DIR")]
    folder: PathBuf,

    /// The configuration (TOML); left out: the one that the run folder was last opened with.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Overrides a field of the configuration, for example `train.steps=3`.
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    set: Vec<String>,

    /// `allow-weak=LAYER`: run programs although this layer of the sandbox is missing. Holds for this
    /// call; what was in force is recorded in the manifest.
    #[arg(long, value_name = "allow-weak=LAYER", value_parser = weak_layer)]
    sandbox: Vec<Layer>,
}

/// All stages of DuST: sample, label, group, eval, train, eval again, report.
///
/// A stage whose files are in the run folder is skipped, and one that was cut short goes on where it
/// stopped: Ctrl-C loses nothing but the answers at hand, and a crash at most the training steps of
/// the last ten minutes.
///
/// Example: dust-train run --config configs/demo.toml --run runs/demo
#[derive(Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    train: TrainArgs,
}

/// What training is told.
#[derive(Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    stage: StageArgs,

    /// Train on the groups of another run (its groups.jsonl), so that arms and seeds can be compared;
    /// no candidates are drawn.
    #[arg(long, value_name = "FILE")]
    groups: Option<PathBuf>,
}

/// Measures pass@1, NDCG and Best-of-N on the held-out problems.
#[derive(Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    stage: StageArgs,

    /// Measure the trained model instead of the one that training starts from.
    #[arg(long)]
    after: bool,
}

/// Shows the evaluations of several runs side by side.
///
/// The runs may be arms of one experiment or seeds of one arm. Runs that trained on other groups, or
/// were measured with other settings, are refused.
#[derive(Args)]
#[command(after_help = "Example:\n  dust-train compare runs/ranking runs/generation runs/sft")]
pub(super) struct CompareArgs {
    /// Run folders.
    #[arg(value_name = "DIR", required = true)]
    folders: Vec<PathBuf>,
}

/// Prints the comparison.
pub(super) fn compare(args: &CompareArgs) -> Result<()> {
    print!("{}", pipeline::comparison(&args.folders)?);
    Ok(())
}

/// A stage with its arguments.
pub(super) enum Stage {
    Sample(StageArgs),
    Label(StageArgs),
    Group(StageArgs),
    Train(TrainArgs),
    Eval(EvalArgs),
    Report(StageArgs),
    Run(RunArgs),
}

/// Runs a stage.
pub(super) fn run<B: Backend + Clone>(stage: &Stage, device: &B) -> Result<()> {
    let args = match stage {
        Stage::Sample(args) | Stage::Label(args) | Stage::Group(args) | Stage::Report(args) => args,
        Stage::Eval(args) => &args.stage,
        Stage::Train(args) | Stage::Run(RunArgs { train: args }) => &args.stage,
    };
    let (config, folder) = open(args)?;
    if let Stage::Train(args) | Stage::Run(RunArgs { train: args }) = stage
        && let Some(file) = &args.groups
    {
        pipeline::share_groups(&config, &folder, file)?;
    }
    match stage {
        Stage::Sample(_) => pipeline::sample(device, &config, &folder),
        Stage::Label(_) => pipeline::label(&config, &folder),
        Stage::Group(_) => pipeline::group(&config, &folder),
        Stage::Train(_) => train::train(device, &config, &folder),
        Stage::Eval(args) => {
            let checkpoint = args.after.then_some(train::FINAL);
            pipeline::eval(device, &config, &folder, checkpoint)
        }
        Stage::Report(_) => pipeline::report(&config, &folder),
        Stage::Run(_) => pipeline::run(device, &config, &folder),
    }
}

/// Prints the configuration with every default.
///
/// Redirect it to a file and change what you like; `model.path` has to be named.
#[derive(Args)]
pub(super) struct ConfigArgs {
    /// A configuration to complete with the defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Prints a complete configuration.
pub(super) fn print_config(args: &ConfigArgs) -> Result<()> {
    let config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    print!("{}", toml::to_string_pretty(&config)?);
    Ok(())
}

fn open(args: &StageArgs) -> Result<(Config, RunFolder)> {
    let own = args.folder.join(pipeline::CONFIG);
    let path = match &args.config {
        Some(path) => path.clone(),
        None if own.exists() => own,
        None => {
            return Err(InputError::new(
                args.folder.display(),
                "--config",
                "the folder has no configuration yet",
                "name one, for example --config configs/demo.toml",
            )
            .into());
        }
    };
    let mut config = Config::read_with(&path, &args.set)?;
    let folder = pipeline::open_run(&args.folder, &config)?;
    // Not part of the folder's configuration, so that no later call is weaker than it says.
    config.sandbox.allow_weak.extend(&args.sandbox);
    Ok((config, folder))
}

/// Reads `allow-weak=LAYER`.
pub(super) fn weak_layer(text: &str) -> Result<Layer, String> {
    let layer = text
        .strip_prefix("allow-weak=")
        .ok_or("say allow-weak=LAYER")?;
    layer.parse()
}
