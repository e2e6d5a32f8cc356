//! Stage 6: the report of a run, and its headline as a table on the terminal.

use super::bad_input;
use super::eval::{AFTER, BEFORE, EvalFile, JudgedGroup};
use super::train::{METRICS, StepMetrics, worst};
use super::{CONFIG, Config, MANIFEST, Manifest, Problems, RunFolder};
use crate::metrics::{Estimate, Row, compare, pairwise_accuracy, picked_first};
use crate::report::{self, Candidate, Example, ReportData, Shown, Step};
use anyhow::{Result, ensure};
use std::collections::HashMap;
use std::fmt::Write;

/// Judgments that the report shows.
const EXAMPLES: usize = 6;

/// Writes `report.html` and `report.svg`, and prints the headline.
///
/// # Errors
/// A stage that has not run; evaluations that were made with different settings.
pub fn report(config: &Config, run: &RunFolder) -> Result<()> {
    for (name, stage) in [
        (BEFORE, "eval"),
        (AFTER, "eval --after"),
        (METRICS, "train"),
    ] {
        if !run.has(name) {
            bad_input!(
                "{}: is not there; run `dust-train {stage}` first",
                run.file(name).display()
            );
        }
    }
    let before: EvalFile = run.read_json(BEFORE)?;
    let after: EvalFile = run.read_json(AFTER)?;
    ensure!(
        before.settings == after.settings,
        "{}: the two evaluations were made with different settings; remove them and run `eval` again",
        run.file(AFTER).display()
    );
    let steps: Vec<StepMetrics> = run.read_lines(METRICS, "train")?;
    let manifest: Manifest = if run.has(MANIFEST) {
        run.read_json(MANIFEST)?
    } else {
        Manifest::default()
    };
    let problems = Problems::load(config)?;
    let statements: HashMap<&str, &str> = problems
        .held_out
        .iter()
        .map(|t| (t.id.as_str(), t.statement.as_str()))
        .collect();
    let data = ReportData {
        title: format!("DuST: {}", config.model.path),
        subtitle: format!(
            "{} steps of {}, measured on {} held-out problems with {} x {} fresh programs each, \
             before and after.",
            steps.len(),
            taught(&steps),
            before.problems.len(),
            config.eval.repeats,
            config.group.size
        ),
        candidates: config.group.size,
        rows: compare(&before.problems, &after.problems, config.seed),
        steps: steps.iter().map(step).collect(),
        picked_first_before: histogram(&before, false, config.group.size),
        picked_first_after: histogram(&after, true, config.group.size),
        examples: examples(&before, &after, &statements),
        manifest: facts(config, &manifest, &steps)?,
    };
    run.write("report.html", report::html(&data)?.as_bytes())?;
    run.write("report.svg", report::svg(&data).as_bytes())?;
    print!("{}", table(&data.rows, config.group.size));
    println!("\nreport: {}", run.file("report.html").display());
    Ok(())
}

/// The headline over all problems, for the terminal: how many problems count, and percent with 95 %
/// intervals.
pub fn table(rows: &[Row], size: usize) -> String {
    let mut text = String::new();
    let problems = rows.first().map_or(0, |r| r.problems);
    let _ = writeln!(
        text,
        "{:<26} {:>4} {:>22} {:>22} {:>24}",
        format!("{problems} held-out problems, %"),
        "n",
        "before",
        "after",
        "change"
    );
    for row in rows.iter().filter(|r| r.difficulty.is_none()) {
        let name = report::name(row.metric, size);
        let _ = writeln!(
            text,
            "{name:<26} {:>4} {:>22} {:>22} {:>24}",
            row.problems,
            cell(&row.before, false),
            cell(&row.after, false),
            cell(&row.change, true)
        );
    }
    text
}

/// An estimate in percent with its interval, with a sign where it is a change.
pub(super) fn cell(estimate: &Option<Estimate>, sign: bool) -> String {
    let Some(e) = estimate else {
        return "-".to_owned();
    };
    let (v, l, h) = (100.0 * e.value, 100.0 * e.low, 100.0 * e.high);
    if sign {
        format!("{v:+.1} [{l:+.1}, {h:+.1}]")
    } else {
        format!("{v:.1} [{l:.1}, {h:.1}]")
    }
}

fn step(m: &StepMetrics) -> Step {
    Step {
        step: m.step,
        reward_mean: m.reward_mean,
        reward_std: m.reward_std,
        pair_accuracy: m.pair_accuracy,
        zero_variance: m.zero_variance,
        invalid: m.invalid,
        entropy: m.entropy,
        // A curve has no point there.
        kl: m.kl.unwrap_or(f64::NAN),
        clip_fraction: m.clip_fraction,
        grad_norm: m.grad_norm,
    }
}

/// How often each position was picked first, in the groups that the model before training wrote.
fn histogram(file: &EvalFile, same: bool, size: usize) -> Vec<usize> {
    let judgments = file.judgments.iter().filter(|j| j.same == same);
    let firsts: Vec<usize> = judgments.filter_map(|j| j.first).collect();
    picked_first(firsts.iter().map(std::slice::from_ref), size)
}

/// What the steps taught, in words.
fn taught(steps: &[StepMetrics]) -> String {
    let mut lessons: Vec<&str> = steps.iter().map(|s| s.lesson.describe()).collect();
    lessons.dedup();
    lessons.truncate(2);
    lessons.join(", then ")
}

/// Judgments of the same mixed groups, before and after side by side.
fn examples(before: &EvalFile, after: &EvalFile, statements: &HashMap<&str, &str>) -> Vec<Example> {
    let mut seen = std::collections::HashSet::new();
    before
        .judgments
        .iter()
        .filter(|b| b.is_mixed() && seen.insert(b.problem.as_str()))
        .filter_map(|b| {
            let a = after.judgments.iter().find(|a| {
                a.same
                    && (&a.problem, a.repeat, a.permutation)
                        == (&b.problem, b.repeat, b.permutation)
            })?;
            Some(Example {
                id: b.problem.clone(),
                statement: statements
                    .get(b.problem.as_str())
                    .copied()
                    .unwrap_or_default()
                    .to_owned(),
                before: shown(b),
                after: shown(a),
            })
        })
        .take(EXAMPLES)
        .collect()
}

fn shown(judged: &JudgedGroup) -> Shown {
    let reward = judged.ranking.as_ref().and_then(|ranking| {
        let ranked: Vec<bool> = ranking
            .iter()
            .map(|&c| judged.candidates[c].right)
            .collect();
        pairwise_accuracy(&ranked)
    });
    Shown {
        candidates: judged
            .candidates
            .iter()
            .map(|c| Candidate {
                program: c.program.clone(),
                verdict: c.verdict.clone(),
                right: c.right,
            })
            .collect(),
        text: judged.text.clone(),
        ranking: judged.ranking.clone(),
        reward: reward.unwrap_or(-1.0),
    }
}

fn facts(
    config: &Config,
    manifest: &Manifest,
    steps: &[StepMetrics],
) -> Result<Vec<(String, String)>> {
    let mismatch = steps.iter().map(|s| s.mismatch).fold(0.0, worst);
    let seconds: f64 = steps.iter().map(|s| s.seconds).sum();
    let mut facts = vec![
        ("dust-train".to_owned(), manifest.version.clone()),
        ("device".to_owned(), manifest.device.clone()),
        (
            "groups (SHA-256)".to_owned(),
            manifest.groups_sha256.clone().unwrap_or_default(),
        ),
        (
            "largest rollout-training mismatch".to_owned(),
            format!("{mismatch:e}"),
        ),
        ("training".to_owned(), format!("{seconds:.0} s")),
    ];
    if let Some(sandbox) = &manifest.sandbox {
        facts.push(("sandbox".to_owned(), sandbox.to_string()));
    }
    facts.push((CONFIG.to_owned(), toml::to_string_pretty(config)?));
    Ok(facts)
}
