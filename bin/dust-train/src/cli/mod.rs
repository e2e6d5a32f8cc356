//! The command line: arguments in, an exit status out.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | a failure of the program or of the machine |
//! | 2 | bad input: one line on stderr names the file, the field and the remedy |
//! | 130 | interrupted by Ctrl-C |

mod bench;
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
use dust_kernels::Cpu;
use tracing_subscriber::EnvFilter;

use crate::interrupt::{self, Interrupted};
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

    /// Threads that compute [default: all processors].
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
    Train(stages::StageArgs),
    Eval(stages::EvalArgs),
    /// Stage 6: writes report.html and prints the headline.
    Report(stages::StageArgs),
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
    let cpu = || match cli.threads {
        Some(n) => Cpu::with_threads(n.into()),
        None => Cpu::new(),
    };
    match cli.command {
        Command::Run(args) => stages::run(&Stage::Run(args), &cpu())?,
        Command::Sample(args) => stages::run(&Stage::Sample(args), &cpu())?,
        Command::Label(args) => stages::run(&Stage::Label(args), &cpu())?,
        Command::Group(args) => stages::run(&Stage::Group(args), &cpu())?,
        Command::Train(args) => stages::run(&Stage::Train(args), &cpu())?,
        Command::Eval(args) => stages::run(&Stage::Eval(args), &cpu())?,
        Command::Report(args) => stages::run(&Stage::Report(args), &cpu())?,
        Command::Config(args) => stages::print_config(&args)?,
        Command::Exec(args) => exec::run(&args)?,
        Command::Doctor(args) => return doctor::run(&args, &cpu()),
        Command::Generate(args) => generate::run(&args, &cpu())?,
        Command::Score(args) => score::run(&args, &cpu())?,
        Command::Judge(args) => judge::run(&args, &cpu())?,
        Command::Bench(args) => bench::run(&args, &cpu())?,
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
