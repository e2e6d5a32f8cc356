//! Stage 1: the frozen model draws candidate programs for every training problem.

use super::session::{KeptEngine, derive_seed};
use super::stage::Stage;
use super::{Config, Manifest, Problems, RunFolder, Session};
use crate::rollout::{Finish, Request, SamplingSettings};
use crate::tasks::{Task, extract::extract, prompt::generation};
use anyhow::Result;
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The stage's file.
pub const CANDIDATES: &str = "candidates.jsonl";

/// A sampled program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The problem's name.
    pub problem: String,
    /// Its number among the problem's samples.
    pub sample: u32,
    /// The program; nothing where the answer held none, with the reason in `text`'s stead.
    pub program: Option<String>,
    /// Why there is no program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_program: Option<String>,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Why the answer ended.
    pub finish: Finish,
    /// Mean log-probability of the answer's tokens.
    pub mean_logprob: f32,
}

/// Draws `samples` programs for each task, and hands each over as it is ready; those for which
/// `done` holds are left out.
pub(super) fn draw<B: Backend>(
    session: &Session<B>,
    engine: &mut KeptEngine<B>,
    config: &Config,
    what: &str,
    tasks: &[&Task],
    samples: u32,
    sampling: &SamplingSettings,
    done: &HashSet<(String, u32)>,
    mut on_done: impl FnMut(Candidate) -> Result<()>,
) -> Result<()> {
    let thinking = session.opens_thought()?;
    let mut requests = Vec::new();
    let mut owners: Vec<(&Task, Vec<u32>)> = Vec::new();
    for task in tasks {
        let missing: Vec<u32> = (0..samples)
            .filter(|&s| !done.contains(&(task.id.clone(), s)))
            .collect();
        if missing.is_empty() {
            continue;
        }
        let request = Request {
            prompt: session.encode(&generation(task), "")?,
            // A problem that was begun before is drawn again whole: a sample's number is its key.
            samples,
            seed: derive_seed(config.seed, &[what, &task.id]),
        };
        requests.push(request);
        owners.push((task, missing));
    }
    if requests.is_empty() {
        return Ok(());
    }
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let engine = engine.with_room(session, longest, sampling.max_tokens)?;
    let until = session.program_end(config);
    session.generate(engine, what, &requests, sampling, until, |completion| {
        let (task, missing) = &owners[completion.request];
        if !missing.contains(&completion.sample) {
            return Ok(());
        }
        let text = session.text(&completion.tokens);
        let code = extract(&text, thinking, config.sample.extract);
        let tokens = completion.tokens.len();
        on_done(Candidate {
            problem: task.id.clone(),
            sample: completion.sample,
            no_program: code.as_ref().err().map(ToString::to_string),
            program: code.ok(),
            tokens,
            finish: completion.finish,
            mean_logprob: completion.logprobs.iter().sum::<f32>() / tokens.max(1) as f32,
        })
    })
}

/// Draws the candidates of all training problems into `candidates.jsonl`.
///
/// # Errors
/// What loading and sampling report; an interrupt, after which the same call goes on.
pub fn sample<B: Backend + Clone>(device: &B, config: &Config, run: &RunFolder) -> Result<()> {
    if run.has(CANDIDATES) {
        return Ok(());
    }
    Stage::Sample.begin(run, config)?;
    let problems = Problems::load(config)?;
    Manifest::update(run, |m| {
        m.device = device.name();
        m.problems = [
            ("train".to_owned(), problems.train.len()),
            ("held-out".to_owned(), problems.held_out.len()),
            ("left-out".to_owned(), problems.left_out.len()),
        ]
        .into();
    })?;
    if !problems.left_out.is_empty() {
        eprintln!(
            "sample: these ask what held-out problems ask, and are left out: {}",
            problems.left_out.join(", ")
        );
    }
    let session = Session::load(device.clone(), config, None, false)?;
    let mut partial = run.resume::<Candidate>(CANDIDATES)?;
    let done = partial
        .lines
        .iter()
        .map(|c| (c.problem.clone(), c.sample))
        .collect();
    let tasks: Vec<&Task> = problems.train.iter().collect();
    let settings = &config.sample;
    draw(
        &session,
        &mut KeptEngine::new(),
        config,
        "sample",
        &tasks,
        settings.candidates,
        &settings.sampling,
        &done,
        |candidate| partial.push(candidate),
    )?;
    let all = run.finish(CANDIDATES, partial, |c| (c.problem.clone(), c.sample))?;
    let programs = all.iter().filter(|c| c.program.is_some()).count();
    eprintln!(
        "sample: {} answers to {} problems, {programs} hold a program",
        all.len(),
        tasks.len()
    );
    Ok(())
}
