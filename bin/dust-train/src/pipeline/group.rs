//! Stage 3: each problem's labelled candidates are cut into groups; the mixed ones are kept.

use super::label::VERDICTS;
use super::sample::CANDIDATES;
use super::session::derive_seed;
use super::{Candidate, Config, Labelled, Manifest, RunFolder};
use crate::sandbox::Verdict;
use anyhow::{Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};

/// The stage's file.
pub const GROUPS: &str = "groups.jsonl";

/// Candidates of one problem, right and wrong ones among them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// `PROBLEM/NUMBER`.
    pub id: String,
    /// The problem's name.
    pub problem: String,
    /// The candidates' numbers.
    pub samples: Vec<u32>,
    /// The programs.
    pub programs: Vec<String>,
    /// Whether each passed every test.
    pub labels: Vec<bool>,
}

/// What grouping gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// Problems that have candidates.
    pub problems: usize,
    /// Problems that have a mixed group.
    pub mixed_problems: usize,
    /// Groups whose candidates are all wrong, all right, and both.
    pub all_wrong: usize,
    /// All right.
    pub all_right: usize,
    /// Both: those that are kept.
    pub mixed: usize,
    /// Mixed groups by their number of right candidates, from 1.
    pub by_right: Vec<usize>,
}

/// Cuts a problem's pool, shuffled by a seed of its own, into groups of `size`.
fn cut(pool: &mut [(u32, String, bool)], seed: u64, size: usize) -> Vec<Vec<(u32, String, bool)>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for i in (1..pool.len()).rev() {
        let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
        pool.swap(i, j as usize);
    }
    pool.chunks_exact(size).map(<[_]>::to_vec).collect()
}

/// Groups `verdicts.jsonl` into `groups.jsonl`, and records its hash in the manifest.
///
/// # Errors
/// No mixed group.
pub fn group(config: &Config, run: &RunFolder) -> Result<GroupSummary> {
    let candidates: Vec<Candidate> = run.read_lines(CANDIDATES, "sample")?;
    let verdicts: Vec<Labelled> = run.read_lines(VERDICTS, "label")?;
    let programs: HashMap<(&str, u32), &str> = candidates
        .iter()
        .filter_map(|c| Some(((c.problem.as_str(), c.sample), c.program.as_deref()?)))
        .collect();
    let mut pools: BTreeMap<&str, Vec<(u32, String, bool)>> = BTreeMap::new();
    for v in &verdicts {
        if v.verdict == Verdict::InfraError {
            continue;
        }
        if let Some(program) = programs.get(&(v.problem.as_str(), v.sample)) {
            let pool = pools.entry(&v.problem).or_default();
            pool.push((
                v.sample,
                (*program).to_owned(),
                v.verdict == Verdict::Passed,
            ));
        }
    }
    let mut summary = GroupSummary {
        problems: pools.len(),
        mixed_problems: 0,
        all_wrong: 0,
        all_right: 0,
        mixed: 0,
        by_right: vec![0; config.group.size - 1],
    };
    let mut groups = Vec::new();
    for (problem, pool) in &mut pools {
        if config.group.distinct {
            let mut seen = HashSet::new();
            pool.retain(|(_, program, _)| seen.insert(program.clone()));
        }
        let seed = derive_seed(config.seed, &["group", problem]);
        let mut kept = 0;
        for members in cut(pool, seed, config.group.size) {
            let right = members.iter().filter(|m| m.2).count();
            if right == 0 {
                summary.all_wrong += 1;
            } else if right == members.len() {
                summary.all_right += 1;
            } else if config.group.max_per_problem == 0 || kept < config.group.max_per_problem {
                summary.mixed += 1;
                summary.by_right[right - 1] += 1;
                groups.push(Group {
                    id: format!("{problem}/{kept}"),
                    problem: (*problem).to_owned(),
                    samples: members.iter().map(|m| m.0).collect(),
                    labels: members.iter().map(|m| m.2).collect(),
                    programs: members.into_iter().map(|m| m.1).collect(),
                });
                kept += 1;
            }
        }
        summary.mixed_problems += usize::from(kept > 0);
    }
    if groups.is_empty() {
        bail!(
            "{}: no group of {} holds both right and wrong programs ({} all wrong, {} all right); \
             draw more candidates (sample.candidates) or choose problems nearer to the model's level",
            run.file(VERDICTS).display(),
            config.group.size,
            summary.all_wrong,
            summary.all_right
        );
    }
    run.write_lines(GROUPS, &groups)?;
    run.write_json("groups.summary.json", &summary)?;
    let hash = run.hash(GROUPS)?;
    Manifest::update(run, |m| m.groups_sha256 = Some(hash))?;
    eprintln!(
        "group: {} mixed groups from {} of {} problems ({} all wrong, {} all right)",
        summary.mixed,
        summary.mixed_problems,
        summary.problems,
        summary.all_wrong,
        summary.all_right
    );
    Ok(summary)
}
