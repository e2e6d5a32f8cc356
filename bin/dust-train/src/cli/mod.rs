//! The command line: arguments in, an exit status out.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | a failure of the program or of the machine |
//! | 2 | bad input: one line on stderr names the file, the field and the remedy |
//! | 130 | interrupted by Ctrl-C |

mod bench;
mod device;
mod doctor;
mod error;
mod exec;
mod files;
mod generate;
mod judge;
mod model;
mod score;
mod stages;
mod tasks;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use anyhow::Result;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::interrupt::{self, Interrupted};
use device::{Place, on_device};
pub use error::InputError;
use stages::Stage;

/// Dual Self-Training of language models.
///
/// A model writes programs, a sandbox runs them, and the model learns to rank them: right ones
/// before wrong ones. The commands below work with a model and its problems one step at a time.
///
/// A model is a Hugging Face folder, a .gguf file, or ORG/NAME on the model hub (HF_ENDPOINT,
/// HF_HOME and HF_TOKEN are honoured). Start with `dust-train doctor`.
#[derive(Parser)]
#[command(name = "dust-train", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Where the model runs: cpu, cuda (or cuda:N), or emulated: the GPU's code on an emulator that
    /// checks every access, for tiny models [default: cpu].
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<Place>,

    /// Threads of the CPU that compute [default: all processors].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Say more on stderr: -v what is done, -vv every detail. RUST_LOG has the last word.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    Run(stages::RunArgs),
    /// Stage 1: draws candidate programs for the training problems.
    Sample(stages::StageArgs),
    /// Stage 2: runs the candidates in the sandbox.
    Label(stages::StageArgs),
    /// Stage 3: keeps the groups that hold right and wrong candidates.
    Group(stages::StageArgs),
    /// Stage 4: trains the model to rank the candidates of a group (GRPO).
    Train(stages::TrainArgs),
    Eval(stages::EvalArgs),
    /// Stage 6: writes report.html and prints the headline.
    Report(stages::StageArgs),
    Compare(stages::CompareArgs),
    Config(stages::ConfigArgs),
    Exec(exec::Args),
    Doctor(doctor::Args),
    Generate(generate::Args),
    Score(score::Args),
    Judge(judge::Args),
    Bench(bench::Args),
    #[command(subcommand)]
    Tasks(tasks::Command),
}

/// Runs the program with its arguments, the first of which is its own name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::command()
        .try_get_matches_from(args)
        .and_then(|matches| Cli::from_arg_matches(&matches))
    {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    log(cli.verbose);
    match dispatch(cli) {
        Ok(status) => status,
        Err(error) => report(&error),
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    interrupt::install()?;
    let device = || cli.device.unwrap_or_default().open(cli.threads);
    let stage = |stage: Stage| on_device!(device()?, |device| stages::run(&stage, &device));
    match cli.command {
        Command::Run(args) => stage(Stage::Run(args))?,
        Command::Sample(args) => stage(Stage::Sample(args))?,
        Command::Label(args) => stage(Stage::Label(args))?,
        Command::Group(args) => stage(Stage::Group(args))?,
        Command::Train(args) => stage(Stage::Train(args))?,
        Command::Eval(args) => stage(Stage::Eval(args))?,
        Command::Report(args) => stage(Stage::Report(args))?,
        Command::Compare(args) => stages::compare(&args)?,
        Command::Config(args) => stages::print_config(&args)?,
        Command::Exec(args) => exec::run(&args)?,
        Command::Doctor(args) => return doctor::run(&args, cli.threads),
        Command::Generate(args) => on_device!(device()?, |d| generate::run(&args, &d))?,
        Command::Score(args) => on_device!(device()?, |d| score::run(&args, &d))?,
        Command::Judge(args) => on_device!(device()?, |d| judge::run(&args, &d))?,
        Command::Bench(args) => on_device!(device()?, |d| bench::run(&args, &d))?,
        Command::Tasks(command) => tasks::run(&command)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Help goes out as it is; a bad argument becomes one line.
fn refuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr()
        || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        // A reader that closes the pipe early has seen enough.
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
    }
    let text = error.to_string();
    let end = ["\n\nUsage", "\n\nFor more information"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    let words: Vec<&str> = text[..end].split_whitespace().collect();
    eprintln!("{}; see --help", words.join(" "));
    ExitCode::from(2)
}

fn report(error: &anyhow::Error) -> ExitCode {
    let closed = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    if error.chain().any(|e| e.downcast_ref().is_some_and(closed)) {
        // Whoever read our output has had enough of it.
        return ExitCode::SUCCESS;
    }
    if error.is::<Interrupted>() {
        eprintln!("{Interrupted}");
        return ExitCode::from(130);
    }
    let text = format!("{error:#}");
    eprintln!("error: {}", text.replace(['\n', '\r'], " "));
    ExitCode::from(if error::is_input(error) { 2 } else { 1 })
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    // Fails only where a subscriber is set already, as in a test.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
