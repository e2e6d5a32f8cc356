//! `tasks`: problem sets.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::Result;
use clap::Subcommand;

use crate::tasks::{Mode, Split, load};

/// Look at problem sets.
#[derive(Subcommand)]
pub(super) enum Command {
    Inspect(Inspect),
}

/// Read a problem set and say what it holds, what was refused, and why.
///
/// SPEC is `builtin`, `humaneval[:FILE]`, `humaneval+:FILE`, `mbpp:FILE`, `mbpp+:FILE`,
/// `rstar:FILE_OR_FOLDER`, `livecodebench:FILE_OR_FOLDER[@WINDOW]` (WINDOW is v5, v6, START..END
/// or release_vN), or a JSON Lines file with one problem a line.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  dust-train tasks inspect builtin\n  dust-train tasks inspect livecodebench:data/lcb@v6"
)]
pub(super) struct Inspect {
    /// What to read.
    #[arg(value_name = "SPEC")]
    spec: String,

    /// Share of the problems that is held out, where they do not say it themselves.
    #[arg(long, value_name = "SHARE", default_value_t = 0.3, value_parser = share)]
    held_out: f64,

    /// Seed of that choice.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

pub(super) fn run(command: &Command) -> Result<()> {
    let Command::Inspect(args) = command;
    let set = load(&args.spec)?;
    let mut out = io::stdout();
    writeln!(out, "{set}\n")?;
    writeln!(out, "{:<12} {:>6} {:>9}", "difficulty", "train", "held out")?;
    let mut strata: BTreeMap<_, [usize; 2]> = BTreeMap::new();
    let mut modes = [0usize; 3];
    let mut tests = 0;
    for task in &set.tasks {
        let counts = strata.entry(task.difficulty).or_default();
        counts[usize::from(task.split(args.seed, args.held_out) == Split::HeldOut)] += 1;
        modes[match task.mode {
            Mode::Function => 0,
            Mode::Stdin => 1,
            Mode::Assert => 2,
        }] += 1;
        tests += task.tests.len();
    }
    for (difficulty, [train, held_out]) in &strata {
        let name = difficulty.map_or("not given".to_owned(), |d| d.to_string());
        writeln!(out, "{name:<12} {train:>6} {held_out:>9}")?;
    }
    let total = |half: usize| strata.values().map(|counts| counts[half]).sum::<usize>();
    writeln!(out, "{:<12} {:>6} {:>9}\n", "all", total(0), total(1))?;
    let [function, stdin, assert] = modes;
    writeln!(
        out,
        "modes: {function} function, {stdin} stdin, {assert} assert; {tests} tests"
    )?;
    for error in &set.refused {
        writeln!(out, "refused: {error}")?;
    }
    Ok(())
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("it has to be from 0 to 1".to_owned()),
    }
}
