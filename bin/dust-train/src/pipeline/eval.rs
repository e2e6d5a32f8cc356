//! Stage 5: pass@1 of the generator, NDCG and Best-of-N of the judge, on the held-out problems.
//!
//! Each model writes fresh programs: pass@1, and Best-of-N of the judge on what it would be used on.
//! Whether the *judge* has changed shows on the same programs only: after training, the model also ranks
//! the groups that the model before training wrote.

use super::bad_input;
use super::judging::Question;
use super::label::{open_sandbox, program, run_programs};
use super::session::{KeptEngine, Until, derive_seed};
use super::stage::{Stage, measurement};
use super::{Candidate, Config, Problems, RunFolder, Session};
use crate::metrics::{Judgment, Problem};
use crate::rollout::Request;
use crate::sandbox::Verdict;
use crate::tasks::Task;
use anyhow::{Result, ensure};
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

/// The figures of the base model.
pub const BEFORE: &str = "eval-before.json";
/// The figures of the trained model.
pub const AFTER: &str = "eval-after.json";

/// A candidate of the evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The program; empty where the answer held none.
    pub program: String,
    /// What became of it.
    pub verdict: String,
    /// Whether it passed.
    pub right: bool,
}

/// A judgment with all that a reader wants to see.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgedGroup {
    /// The problem's name.
    pub problem: String,
    /// Which fresh group of the problem.
    pub repeat: u32,
    /// Which order of the candidates.
    pub permutation: usize,
    /// Whether the model before training wrote the candidates, and not this one.
    pub same: bool,
    /// The candidates.
    pub candidates: Vec<Shown>,
    /// The judge's answer; empty where it was not asked, because the candidates are all right or all
    /// wrong.
    pub text: String,
    /// The candidates from best to worst, if the answer is valid.
    pub ranking: Option<Vec<usize>>,
    /// The shown position that was ranked first.
    pub first: Option<usize>,
    /// Why the answer is not valid.
    pub invalid: Option<String>,
}

/// Everything that an evaluation measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalFile {
    /// The model that was measured.
    pub model: String,
    /// All that decides what is measured, a line each: settings, and a hash of the problems;
    /// evaluations that differ in it are not compared.
    pub settings: String,
    /// What the figures are computed from.
    pub problems: Vec<Problem>,
    /// Every judgment.
    pub judgments: Vec<JudgedGroup>,
}

/// Evaluates the base model, or `checkpoint` of the run folder, on the held-out problems.
///
/// # Errors
/// What loading, sampling and the sandbox report; no held-out problem.
pub fn eval<B: Backend + Clone>(
    device: &B,
    config: &Config,
    run: &RunFolder,
    checkpoint: Option<&str>,
) -> Result<()> {
    let name = if checkpoint.is_some() { AFTER } else { BEFORE };
    if run.has(name) {
        return Ok(());
    }
    let problems = Problems::load(config)?;
    let tasks = &problems.held_out;
    if tasks.is_empty() {
        bad_input!(
            "{}: no problem is held out; raise tasks.held_out or name tasks.eval_source",
            config.tasks.source
        );
    }
    let folder = checkpoint.map(|c| run.file(c));
    if let Some(folder) = &folder
        && !folder.exists()
    {
        bad_input!(
            "{}: is not there; run `dust-train train` first",
            folder.display()
        );
    }
    let before: Option<EvalFile> = match checkpoint {
        Some(_) if !run.has(BEFORE) => bad_input!(
            "{}: is not there; run `dust-train eval` first",
            run.file(BEFORE).display()
        ),
        Some(_) => Some(run.read_json(BEFORE)?),
        None => None,
    };
    match checkpoint {
        Some(_) => Stage::EvalAfter.begin(run, config)?,
        None => Stage::EvalBefore.begin(run, config)?,
    }
    let session = Session::load(device.clone(), config, folder.as_deref(), false)?;
    let stage = if checkpoint.is_some() {
        "after"
    } else {
        "before"
    };
    let candidates = candidates(&session, config, run, stage, tasks)?;
    let outcomes = verdicts(config, run, &candidates, &problems)?;
    let mut groups = groups(config, &candidates, &outcomes);
    if let Some(before) = &before {
        groups.extend(
            before
                .judgments
                .iter()
                .filter(|j| j.permutation == 0 && j.is_mixed())
                .map(|j| JudgedGroup {
                    same: true,
                    ..j.clone()
                }),
        );
    }
    let judgments = judge(&session, config, run, stage, tasks, groups)?;
    let file = EvalFile {
        model: folder.map_or_else(|| config.model.path.clone(), |f| f.display().to_string()),
        settings: measurement(config, tasks)?,
        problems: tasks
            .iter()
            .map(|task| summarise(task, &candidates, &outcomes, &judgments, before.is_none()))
            .collect(),
        judgments,
    };
    run.write_json(name, &file)?;
    for part in ["candidates", "judgments"] {
        // Only needed to go on after a kill; both are in the file now.
        let _ = std::fs::remove_file(run.file(&format!("eval-{stage}-{part}.jsonl.partial")));
    }
    Ok(())
}

/// Draws `group.size * eval.repeats` fresh programs for each problem.
fn candidates<B: Backend>(
    session: &Session<B>,
    config: &Config,
    run: &RunFolder,
    stage: &str,
    tasks: &[Task],
) -> Result<Vec<Candidate>> {
    let mut partial = run.resume::<Candidate>(&format!("eval-{stage}-candidates.jsonl"))?;
    let done: HashSet<(String, u32)> = partial
        .lines
        .iter()
        .map(|c| (c.problem.clone(), c.sample))
        .collect();
    let tasks: Vec<&Task> = tasks.iter().collect();
    super::sample::draw(
        session,
        &mut KeptEngine::new(),
        config,
        // The same seeds before and after: what differs is the model.
        "eval",
        &tasks,
        config.group.size as u32 * config.eval.repeats,
        &config
            .eval
            .sampling
            .settings(config.sample.sampling.max_tokens),
        &done,
        |candidate| partial.push(candidate),
    )?;
    let mut all = partial.lines;
    all.sort_by(|a, b| (&a.problem, a.sample).cmp(&(&b.problem, b.sample)));
    Ok(all)
}

/// The verdict of each candidate; an answer without a program is wrong.
fn verdicts(
    config: &Config,
    run: &RunFolder,
    candidates: &[Candidate],
    problems: &Problems,
) -> Result<Vec<Option<Verdict>>> {
    let by_id = problems.by_id();
    let mut verdicts = vec![None; candidates.len()];
    let (mut programs, mut owners) = (Vec::new(), Vec::new());
    for (i, candidate) in candidates.iter().enumerate() {
        if let (Some(code), Some(task)) =
            (&candidate.program, by_id.get(candidate.problem.as_str()))
        {
            programs.push(program(task, code));
            owners.push(i);
        }
    }
    let sandbox = open_sandbox(config, run)?;
    run_programs(&sandbox, config, &programs, |i, outcome| {
        verdicts[owners[i]] = Some(outcome.verdict);
        Ok(())
    })?;
    let trouble = verdicts.iter().filter(|&&v| is_trouble(v)).count();
    ensure!(
        2 * trouble <= programs.len(),
        "the sandbox could not run {trouble} of {} programs; `dust-train doctor` says what is wrong",
        programs.len()
    );
    if trouble > 0 {
        eprintln!(
            "eval: the sandbox could not run {trouble} of {} programs; they and their groups are left out",
            programs.len()
        );
    }
    Ok(verdicts)
}

/// Trouble of the sandbox is no label.
fn is_trouble(verdict: Option<Verdict>) -> bool {
    verdict == Some(Verdict::InfraError)
}

/// The groups of the candidates, not judged yet.
fn groups(
    config: &Config,
    candidates: &[Candidate],
    verdicts: &[Option<Verdict>],
) -> Vec<JudgedGroup> {
    let k = config.group.size;
    let members = candidates.chunks_exact(k).zip(verdicts.chunks_exact(k));
    members
        .filter(|(_, verdicts)| !verdicts.iter().any(|&v| is_trouble(v)))
        .map(|(members, verdicts)| JudgedGroup {
            problem: members[0].problem.clone(),
            repeat: members[0].sample / k as u32,
            permutation: 0,
            same: false,
            candidates: members
                .iter()
                .zip(verdicts)
                .map(|(candidate, verdict)| Shown {
                    program: candidate.program.clone().unwrap_or_default(),
                    right: *verdict == Some(Verdict::Passed),
                    verdict: match verdict {
                        Some(v) => serde_json::to_value(v)
                            .ok()
                            .and_then(|v| v.as_str().map(str::to_owned))
                            .unwrap_or_default(),
                        None => candidate.no_program.clone().unwrap_or_default(),
                    },
                })
                .collect(),
            text: String::new(),
            ranking: None,
            first: None,
            invalid: None,
        })
        .collect()
}

impl JudgedGroup {
    /// Whether a ranking decides anything.
    pub(super) fn is_mixed(&self) -> bool {
        let right = self.candidates.iter().filter(|c| c.right).count();
        (1..self.candidates.len()).contains(&right)
    }

    fn key(&self) -> (String, u32, bool, usize) {
        (
            self.problem.clone(),
            self.repeat,
            self.same,
            self.permutation,
        )
    }
}

/// Shows every mixed group to the judge, in every order asked for. The others come back as they are.
fn judge<B: Backend>(
    session: &Session<B>,
    config: &Config,
    run: &RunFolder,
    stage: &str,
    tasks: &[Task],
    groups: Vec<JudgedGroup>,
) -> Result<Vec<JudgedGroup>> {
    let mut partial = run.resume::<JudgedGroup>(&format!("eval-{stage}-judgments.jsonl"))?;
    let done: HashSet<_> = partial.lines.iter().map(JudgedGroup::key).collect();
    let by_id: BTreeMap<&str, &Task> = tasks.iter().map(|t| (t.id.as_str(), t)).collect();
    let (mixed, alike): (Vec<_>, Vec<_>) = groups.into_iter().partition(JudgedGroup::is_mixed);
    let (mut questions, mut requests) = (Vec::new(), Vec::new());
    for group in &mixed {
        let Some(task) = by_id.get(group.problem.as_str()) else {
            continue;
        };
        let programs: Vec<String> = group.candidates.iter().map(|c| c.program.clone()).collect();
        // The same name before and after: the same orders and seeds.
        let name = format!("eval/{}/{}", group.problem, group.repeat);
        for permutation in 0..config.eval.permutations {
            let group = JudgedGroup {
                permutation,
                ..group.clone()
            };
            if done.contains(&group.key()) {
                continue;
            }
            let question = Question::new(session, config, task, &programs, &name, permutation)?;
            requests.push(Request {
                prompt: question.tokens.clone(),
                samples: 1,
                seed: derive_seed(config.seed, &[&name, &permutation.to_string()]),
            });
            questions.push((question, group));
        }
    }
    if !requests.is_empty() {
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let mut engine = session.engine(longest, config.judge.max_tokens)?;
        let thinking = session.opens_thought()?;
        session.generate(
            &mut engine,
            "judge",
            &requests,
            &config.eval.sampling.settings(config.judge.max_tokens),
            Until::Strings(&config.judge.stop),
            |completion| {
                let (question, group) = &questions[completion.request];
                let text = session.text(&completion.tokens);
                let read = question.read(config, thinking, &text, completion.finish);
                partial.push(JudgedGroup {
                    text: format!("{}{text}", config.judge.prefix),
                    invalid: read.as_ref().err().map(ToString::to_string),
                    first: read.as_ref().ok().map(|r| r.1),
                    ranking: read.ok().map(|r| r.0),
                    ..group.clone()
                })
            },
        )?;
    }
    let mut all = partial.lines;
    all.extend(alike);
    all.sort_by_key(JudgedGroup::key);
    Ok(all)
}

fn summarise(
    task: &Task,
    candidates: &[Candidate],
    verdicts: &[Option<Verdict>],
    judgments: &[JudgedGroup],
    is_before: bool,
) -> Problem {
    let of = |same: bool| {
        let own = judgments
            .iter()
            .filter(|j| j.problem == task.id && j.same == same);
        own.map(|j| Judgment {
            labels: j.candidates.iter().map(|c| c.right).collect(),
            ranking: j.ranking.clone(),
        })
        .collect()
    };
    let own: Vec<bool> = candidates
        .iter()
        .zip(verdicts)
        .filter(|(c, v)| c.problem == task.id && !is_trouble(**v))
        .map(|(_, v)| *v == Some(Verdict::Passed))
        .collect();
    Problem {
        id: task.id.clone(),
        difficulty: task.difficulty,
        samples: own.len(),
        passed: own.iter().filter(|&&p| p).count(),
        judgments: of(false),
        same: of(!is_before),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_sandbox_could_not_run_is_left_out() {
        let task = crate::tasks::builtin().unwrap().swap_remove(0);
        let candidates: Vec<Candidate> = (0..4)
            .map(|sample| {
                serde_json::from_value(serde_json::json!({"problem": task.id, "sample": sample,
                    "program": "x", "tokens": 1, "finish": "stop_token", "mean_logprob": 0.0}))
                .unwrap()
            })
            .collect();
        let mut config = Config::default();
        config.group.size = 2;
        let (passed, trouble) = (Some(Verdict::Passed), Some(Verdict::InfraError));
        let verdicts = [passed, Some(Verdict::WrongAnswer), passed, trouble];
        let groups = groups(&config, &candidates, &verdicts);
        assert_eq!(groups.len(), 1);
        assert!(groups[0].repeat == 0 && groups[0].is_mixed());
        let problem = summarise(&task, &candidates, &verdicts, &groups, true);
        assert_eq!((problem.samples, problem.passed), (3, 2));
        assert_eq!((problem.judgments.len(), problem.same.len()), (1, 1));
    }
}
