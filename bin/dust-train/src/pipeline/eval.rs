//! Stage 5: pass@1 of the generator, NDCG and Best-of-N of the judge, on the held-out problems.

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
    /// The candidates.
    pub candidates: Vec<Shown>,
    /// The judge's answer.
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
    let judgments = judge(&session, config, run, stage, tasks, &candidates, &outcomes)?;
    let file = EvalFile {
        model: folder.map_or_else(|| config.model.path.clone(), |f| f.display().to_string()),
        settings: measurement(config, tasks)?,
        problems: tasks
            .iter()
            .map(|task| summarise(task, &candidates, &outcomes, &judgments))
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
    ensure!(
        !verdicts.contains(&Some(Verdict::InfraError)),
        "the sandbox could not run every program; the evaluation would be wrong: run it again"
    );
    Ok(verdicts)
}

/// Shows every group of candidates to the judge, in every order asked for.
fn judge<B: Backend>(
    session: &Session<B>,
    config: &Config,
    run: &RunFolder,
    stage: &str,
    tasks: &[Task],
    candidates: &[Candidate],
    verdicts: &[Option<Verdict>],
) -> Result<Vec<JudgedGroup>> {
    let name = format!("eval-{stage}-judgments.jsonl");
    let mut partial = run.resume::<JudgedGroup>(&name)?;
    let done: HashSet<(String, u32, usize)> = partial
        .lines
        .iter()
        .map(|j| (j.problem.clone(), j.repeat, j.permutation))
        .collect();
    let by_id: BTreeMap<&str, &Task> = tasks.iter().map(|t| (t.id.as_str(), t)).collect();
    let (mut questions, mut requests) = (Vec::new(), Vec::new());
    let k = config.group.size;
    for (members, verdicts) in candidates.chunks_exact(k).zip(verdicts.chunks_exact(k)) {
        let problem = &members[0].problem;
        let repeat = members[0].sample / k as u32;
        let Some(task) = by_id.get(problem.as_str()) else {
            continue;
        };
        let programs: Vec<String> = members
            .iter()
            .map(|c| c.program.clone().unwrap_or_default())
            .collect();
        let shown: Vec<Shown> = programs
            .iter()
            .zip(members.iter().zip(verdicts))
            .map(|(program, (candidate, verdict))| Shown {
                program: program.clone(),
                right: *verdict == Some(Verdict::Passed),
                verdict: match verdict {
                    Some(v) => serde_json::to_value(v)
                        .ok()
                        .and_then(|v| v.as_str().map(str::to_owned))
                        .unwrap_or_default(),
                    None => candidate.no_program.clone().unwrap_or_default(),
                },
            })
            .collect();
        let group = format!("eval/{problem}/{repeat}");
        for permutation in 0..config.eval.permutations {
            if done.contains(&(problem.clone(), repeat, permutation)) {
                continue;
            }
            let question = Question::new(session, config, task, &programs, &group, permutation)?;
            requests.push(Request {
                prompt: question.tokens.clone(),
                samples: 1,
                seed: derive_seed(config.seed, &[&group, &permutation.to_string()]),
            });
            questions.push((
                question,
                problem.clone(),
                repeat,
                permutation,
                shown.clone(),
            ));
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
                let (question, problem, repeat, permutation, candidates) =
                    &questions[completion.request];
                let text = session.text(&completion.tokens);
                let read = question.read(config, thinking, &text);
                partial.push(JudgedGroup {
                    problem: problem.clone(),
                    repeat: *repeat,
                    permutation: *permutation,
                    candidates: candidates.clone(),
                    text: format!("{}{text}", config.judge.prefix),
                    invalid: read.as_ref().err().map(ToString::to_string),
                    first: read.as_ref().ok().map(|r| r.1),
                    ranking: read.ok().map(|r| r.0),
                })
            },
        )?;
    }
    let mut all = partial.lines;
    all.sort_by(|a, b| {
        (&a.problem, a.repeat, a.permutation).cmp(&(&b.problem, b.repeat, b.permutation))
    });
    Ok(all)
}

fn summarise(
    task: &Task,
    candidates: &[Candidate],
    verdicts: &[Option<Verdict>],
    judgments: &[JudgedGroup],
) -> Problem {
    let own: Vec<bool> = candidates
        .iter()
        .zip(verdicts)
        .filter(|(c, _)| c.problem == task.id)
        .map(|(_, v)| *v == Some(Verdict::Passed))
        .collect();
    Problem {
        id: task.id.clone(),
        difficulty: task.difficulty,
        samples: own.len(),
        passed: own.iter().filter(|&&p| p).count(),
        judgments: judgments
            .iter()
            .filter(|j| j.problem == task.id)
            .map(|j| Judgment {
                labels: j.candidates.iter().map(|c| c.right).collect(),
                ranking: j.ranking.clone(),
            })
            .collect(),
    }
}
