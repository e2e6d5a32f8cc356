//! Stage 3: each problem's labelled candidates are cut into groups; the mixed ones are kept.

use super::bad_input;
use super::folder::parse_lines;
use super::label::VERDICTS;
use super::sample::CANDIDATES;
use super::session::derive_seed;
use super::stage::Stage;
use super::{Candidate, Config, GroupSettings, Labelled, Manifest, Problems, RunFolder, hex};
use crate::sandbox::Verdict;
use crate::shuffle::shuffle;
use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

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

/// A labelled program: its number, its text, whether it is right.
pub(super) type Member = (u32, String, bool);

/// Cuts a problem's pool, shuffled by a seed of its own, into groups; the mixed ones, and how many
/// were all wrong and all right.
pub(super) fn mixed_groups(
    problem: &str,
    mut pool: Vec<Member>,
    seed: u64,
    settings: &GroupSettings,
) -> (Vec<Group>, [usize; 2]) {
    if settings.distinct {
        let mut seen = HashSet::new();
        pool.retain(|(_, program, _)| seen.insert(program.clone()));
    }
    shuffle(&mut pool, &mut ChaCha8Rng::seed_from_u64(seed));
    let (mut groups, mut alike) = (Vec::new(), [0; 2]);
    for members in pool.chunks_exact(settings.size) {
        let right = members.iter().filter(|m| m.2).count();
        if right == 0 || right == members.len() {
            alike[usize::from(right > 0)] += 1;
        } else if settings.max_per_problem == 0 || groups.len() < settings.max_per_problem {
            groups.push(Group {
                id: format!("{problem}/{}", groups.len()),
                problem: problem.to_owned(),
                samples: members.iter().map(|m| m.0).collect(),
                labels: members.iter().map(|m| m.2).collect(),
                programs: members.iter().map(|m| m.1.clone()).collect(),
            });
        }
    }
    (groups, alike)
}

/// Reads `groups.jsonl` and refuses what training cannot use.
///
/// # Errors
/// No group; one that is not a mixed group of `group.size` programs for a training problem.
pub(super) fn read_groups(
    config: &Config,
    run: &RunFolder,
    problems: &Problems,
) -> Result<Vec<Group>> {
    let groups: Vec<Group> = run.read_lines(GROUPS, "group")?;
    check(config, &groups, problems, &run.file(GROUPS))?;
    Ok(groups)
}

fn check(config: &Config, groups: &[Group], problems: &Problems, file: &Path) -> Result<()> {
    let file = file.display();
    if groups.is_empty() {
        bad_input!("{file}: holds no group; remove it and run `dust-train group`");
    }
    let size = config.group.size;
    let trained = problems.train_by_id();
    for (i, group) in groups.iter().enumerate() {
        let line = i + 1;
        let right = group.labels.iter().filter(|&&y| y).count();
        if group.programs.len() != size || group.labels.len() != size {
            bad_input!(
                "{file}: line {line}: has {} programs and {} labels, group.size is {size}; set it to \
                 the size of the groups",
                group.programs.len(),
                group.labels.len()
            );
        }
        if right == 0 || right == size {
            bad_input!(
                "{file}: line {line}: labels: all are alike, which teaches nothing; remove the line"
            );
        }
        if !trained.contains_key(group.problem.as_str()) {
            bad_input!(
                "{file}: line {line}: problem: `{}` is no training problem of {} with seed = {}; use \
                 the `seed` and the [tasks] that the groups were made with",
                group.problem,
                config.tasks.source,
                config.seed
            );
        }
    }
    Ok(())
}

/// Takes the groups of another run: arms and seeds of one experiment train on the same file.
///
/// # Errors
/// Groups that training cannot use; a folder that has other groups.
pub fn share_groups(config: &Config, run: &RunFolder, file: &Path) -> Result<()> {
    let name = file.display();
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(e) => bad_input!("{name}: cannot be read: {e}; name the groups.jsonl of a run"),
    };
    let groups: Vec<Group> = parse_lines(file, &String::from_utf8_lossy(&bytes))?;
    check(config, &groups, &Problems::load(config)?, file)?;
    let hash = hex(&Sha256::digest(&bytes));
    if !run.has(GROUPS) {
        run.write(GROUPS, &bytes)?;
    } else if run.hash(GROUPS)? != hash {
        bad_input!(
            "{}: is there already and differs from {name}; choose another folder",
            run.file(GROUPS).display()
        );
    }
    Manifest::update(run, |m| m.groups_sha256 = Some(hash))
}

/// Groups `verdicts.jsonl` into `groups.jsonl`, and records its hash in the manifest.
///
/// # Errors
/// No mixed group.
pub fn group(config: &Config, run: &RunFolder) -> Result<()> {
    if run.has(GROUPS) {
        return Ok(());
    }
    Stage::Group.begin(run, config)?;
    let candidates: Vec<Candidate> = run.read_lines(CANDIDATES, "sample")?;
    let verdicts: Vec<Labelled> = run.read_lines(VERDICTS, "label")?;
    let programs: HashMap<(&str, u32), &str> = candidates
        .iter()
        .filter_map(|c| Some(((c.problem.as_str(), c.sample), c.program.as_deref()?)))
        .collect();
    let mut pools: BTreeMap<&str, Vec<Member>> = BTreeMap::new();
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
    for (problem, pool) in pools {
        let seed = derive_seed(config.seed, &["group", problem]);
        let (mixed, [wrong, right]) = mixed_groups(problem, pool, seed, &config.group);
        summary.all_wrong += wrong;
        summary.all_right += right;
        summary.mixed += mixed.len();
        summary.mixed_problems += usize::from(!mixed.is_empty());
        for group in &mixed {
            summary.by_right[group.labels.iter().filter(|&&y| y).count() - 1] += 1;
        }
        groups.extend(mixed);
    }
    if groups.is_empty() {
        bad_input!(
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
    Ok(())
}
