//! Stage 2: the sandbox runs every candidate on its problem's tests.

use super::progress::Progress;
use super::sample::CANDIDATES;
use super::stage::Stage;
use super::{Candidate, Config, Manifest, Problems, RunFolder};
use crate::interrupt;
use crate::sandbox::{self, Outcome, Sandbox, SandboxConfig, Verdict};
use crate::tasks::{self, Task};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The stage's file.
pub const VERDICTS: &str = "verdicts.jsonl";

/// A candidate's verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Labelled {
    /// The problem's name.
    pub problem: String,
    /// The candidate's number.
    pub sample: u32,
    /// What became of it. `infra_error` is no label: the candidate is then left out.
    pub verdict: Verdict,
    /// The first test that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_test: Option<usize>,
}

/// The sandbox's form of a task with a program.
pub(super) fn program(task: &Task, code: &str) -> sandbox::Program {
    sandbox::Program {
        source: task.program(code),
        mode: match task.mode {
            tasks::Mode::Stdin => sandbox::Mode::Stdin,
            tasks::Mode::Function => sandbox::Mode::Function,
            tasks::Mode::Assert => sandbox::Mode::Assert,
        },
        entry_point: task.entry_point.clone(),
        tests: task
            .tests
            .iter()
            .map(|test| match task.mode {
                tasks::Mode::Stdin => {
                    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
                    sandbox::Test::stdin(text(&test.input), text(&test.output))
                }
                _ => sandbox::Test {
                    input: test.input.to_string(),
                    output: test.output.to_string(),
                },
            })
            .collect(),
        test_code: task.test_code.clone(),
    }
}

/// A sandbox as `config` asks for. The manifest tells what is in force.
pub(super) fn open_sandbox(config: &Config, run: &RunFolder) -> Result<Sandbox> {
    let sandbox = Sandbox::new(SandboxConfig {
        allow_weak: config.sandbox.allow_weak.clone(),
        workers: config.sandbox.workers,
        grading: config.sandbox.grading,
        ..SandboxConfig::default()
    })?;
    let effective = serde_json::to_value(sandbox.effective())?;
    Manifest::update(run, |m| m.sandbox = Some(effective))?;
    Ok(sandbox)
}

/// Runs programs in pieces, so that an interrupt is heard, and hands each outcome over.
pub(super) fn run_programs(
    sandbox: &Sandbox,
    config: &Config,
    programs: &[sandbox::Program],
    mut on_done: impl FnMut(usize, Outcome) -> Result<()> + Send,
) -> Result<()> {
    let bar = Progress::new("label", programs.len() as u64);
    let mut result = Ok(());
    for (piece, start) in programs.chunks(64).zip((0..).step_by(64)) {
        sandbox.run_all(piece, &config.sandbox.limits, |i, outcome| {
            bar.advance(1, String::new);
            if result.is_ok() {
                result = on_done(start + i, outcome);
            }
        });
        if result.is_err() || interrupt::requested() {
            break;
        }
    }
    bar.finish();
    result?;
    Ok(interrupt::check()?)
}

/// Labels `candidates.jsonl` into `verdicts.jsonl`.
///
/// # Errors
/// A sandbox that cannot be had as strict as asked for, or that gives no verdict for most programs; a
/// candidate whose problem is gone.
pub fn label(config: &Config, run: &RunFolder) -> Result<()> {
    if run.has(VERDICTS) {
        return Ok(());
    }
    Stage::Label.begin(run, config)?;
    let candidates: Vec<Candidate> = run.read_lines(CANDIDATES, "sample")?;
    let problems = Problems::load(config)?;
    let by_id = problems.by_id();
    let mut partial = run.resume::<Labelled>(VERDICTS)?;
    // A program without a verdict is run again: what was in its way may be mended.
    partial.lines.retain(|l| l.verdict != Verdict::InfraError);
    let done: HashSet<(String, u32)> = partial
        .lines
        .iter()
        .map(|l| (l.problem.clone(), l.sample))
        .collect();
    let (mut todo, mut programs) = (Vec::new(), Vec::new());
    for candidate in &candidates {
        let Some(code) = &candidate.program else {
            continue;
        };
        if done.contains(&(candidate.problem.clone(), candidate.sample)) {
            continue;
        }
        let task = by_id.get(candidate.problem.as_str()).with_context(|| {
            format!(
                "{}: problem `{}` is not in {}",
                run.file(CANDIDATES).display(),
                candidate.problem,
                config.tasks.source
            )
        })?;
        programs.push(program(task, code));
        todo.push(candidate);
    }
    let sandbox = open_sandbox(config, run)?;
    run_programs(&sandbox, config, &programs, |i, outcome| {
        partial.push(Labelled {
            problem: todo[i].problem.clone(),
            sample: todo[i].sample,
            verdict: outcome.verdict,
            failed_test: outcome.failed_test,
        })
    })?;
    let count = |verdict| {
        partial
            .lines
            .iter()
            .filter(|l| l.verdict == verdict)
            .count()
    };
    let (all, passed) = (partial.lines.len(), count(Verdict::Passed));
    let trouble = count(Verdict::InfraError);
    if trouble * 2 > all {
        bail!(
            "{}: the sandbox gave no verdict for {trouble} of {all} programs: see `dust-train \
             doctor`; the same command runs them again",
            run.file(VERDICTS).display()
        );
    }
    run.finish(VERDICTS, partial, |l| (l.problem.clone(), l.sample))?;
    eprintln!("label: {all} programs, {passed} passed, {trouble} without a verdict");
    Ok(())
}
