//! Runs side by side: arms of one experiment, or seeds of one arm.

use super::bad_input;
use super::eval::{AFTER, BEFORE, EvalFile};
use super::reporting::cell;
use super::{CONFIG, Config, MANIFEST, Manifest, RunFolder};
use crate::metrics::{Row, compare, mean_std};
use crate::report;
use anyhow::Result;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// One run's figures, and what has to be the same in all of them.
struct Measured {
    groups: Option<String>,
    settings: String,
    size: usize,
    rows: Vec<Row>,
}

fn read(path: &Path) -> Result<Measured> {
    if !path.is_dir() {
        bad_input!("{}: no such run folder", path.display());
    }
    let run = RunFolder::open(path)?;
    for (name, stage) in [(BEFORE, "eval"), (AFTER, "eval --after")] {
        if !run.has(name) {
            bad_input!(
                "{}: is not there; run `dust-train {stage}` first",
                run.file(name).display()
            );
        }
    }
    let config = Config::read(&run.file(CONFIG))?;
    let manifest: Manifest = run.read_json(MANIFEST)?;
    let (before, after): (EvalFile, EvalFile) = (run.read_json(BEFORE)?, run.read_json(AFTER)?);
    Ok(Measured {
        groups: manifest.groups_sha256,
        settings: after.settings,
        size: config.group.size,
        rows: compare(&before.problems, &after.problems, config.seed),
    })
}

/// A table of what each run changed, with 95 % intervals over problems, and the mean and standard
/// deviation over the runs.
///
/// # Errors
/// A run that was not evaluated; runs that trained on different groups or were measured
/// differently, which no table makes comparable.
pub fn comparison(folders: &[PathBuf]) -> Result<String> {
    let runs = folders
        .iter()
        .map(|f| read(f))
        .collect::<Result<Vec<_>>>()?;
    let Some(first) = runs.first() else {
        bad_input!("name at least one run folder");
    };
    for (folder, run) in folders.iter().zip(&runs) {
        let differs = if run.groups != first.groups {
            "trained on other groups (groups_sha256)".to_owned()
        } else if run.settings != first.settings {
            let lines =
                |run: &Measured| run.settings.lines().map(str::to_owned).collect::<Vec<_>>();
            let theirs = lines(first);
            let line = lines(run).into_iter().find(|line| !theirs.contains(line));
            format!("was measured otherwise ({})", line.unwrap_or_default())
        } else {
            continue;
        };
        bad_input!(
            "{}: {differs} than {}; such runs cannot be compared",
            folder.display(),
            folders[0].display()
        );
    }
    let mut text = String::new();
    let problems = first.rows.first().map_or(0, |r| r.problems);
    let _ = write!(text, "{:<26}", format!("change on {problems}, %"));
    for folder in folders {
        let name = folder.file_name().unwrap_or(folder.as_os_str());
        let _ = write!(text, " {:>24.24}", name.to_string_lossy());
    }
    let _ = writeln!(text, " {:>16}", "mean ± std");
    for (i, row) in first.rows.iter().enumerate() {
        if row.difficulty.is_some() {
            continue;
        }
        let _ = write!(text, "{:<26}", report::name(row.metric, first.size));
        let mut values = Vec::new();
        for run in &runs {
            let change = run.rows.get(i).and_then(|row| row.change);
            values.extend(change.map(|e| 100.0 * e.value));
            let _ = write!(text, " {:>24}", cell(&change, true));
        }
        let spread = match mean_std(&values) {
            Some((mean, Some(std))) => format!("{mean:+.1} ± {std:.1}"),
            _ => "-".to_owned(),
        };
        let _ = writeln!(text, " {spread:>16}");
    }
    Ok(text)
}
