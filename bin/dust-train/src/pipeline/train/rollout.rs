//! The first half of a step: answers from the current policy, their rewards and advantages.

use super::super::label::open_sandbox;
use super::super::{Config, Session};
use crate::rollout::{Completion, Engine, Finish, Request, SamplingSettings};
use crate::sandbox::Sandbox;
use anyhow::Result;
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What a step teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lesson {
    /// To rank programs.
    #[default]
    Ranking,
    /// To write programs.
    Generation,
    /// To repeat right rankings.
    Imitation,
}

/// The answers to one prompt.
pub(super) struct Answered {
    pub prompt: Vec<u32>,
    pub answers: Vec<Completion>,
    pub rewards: Vec<f32>,
    pub advantages: Vec<f32>,
}

impl Answered {
    /// Whether all answers got the same reward, so that they teach nothing.
    pub fn zero_variance(&self) -> bool {
        self.rewards.iter().all(|&r| r == self.rewards[0])
    }
}

/// The answers of a step.
#[derive(Default)]
pub(super) struct Rolled {
    pub lesson: Lesson,
    pub groups: Vec<Answered>,
    /// Answers that were drawn, those of groups left out included.
    pub drawn: usize,
    /// Answers that hold what was asked for: a ranking, a program.
    pub valid: usize,
    /// Programs without a verdict, which are not among the answers.
    pub no_verdict: usize,
    pub pair_accuracy: Vec<f32>,
    /// How often each shown position was ranked first.
    pub picked_first: Vec<usize>,
    pub seconds: f64,
}

impl Rolled {
    /// Takes in what another draw of the same step gave.
    pub fn add(&mut self, more: Rolled) {
        self.lesson = more.lesson;
        self.groups.extend(more.groups);
        self.drawn += more.drawn;
        self.valid += more.valid;
        self.no_verdict += more.no_verdict;
        self.pair_accuracy.extend(more.pair_accuracy);
        self.picked_first.resize(more.picked_first.len(), 0);
        for (sum, count) in self.picked_first.iter_mut().zip(more.picked_first) {
            *sum += count;
        }
        self.seconds = more.seconds;
    }

    pub fn answers(&self) -> impl Iterator<Item = &Completion> {
        self.groups.iter().flat_map(|g| &g.answers)
    }

    pub fn truncated(&self) -> usize {
        self.answers()
            .filter(|a| a.finish == Finish::Length)
            .count()
    }
}

/// Draws answers. Its engine is made once, and again only where prompts or answers outgrow it; its
/// sandbox when the first program is to be run.
pub(super) struct Roller<B: Backend> {
    engine: Option<(usize, Engine<B>)>,
    sandbox: Option<Sandbox>,
    /// When the step's rollout began.
    pub start: Instant,
}

impl<B: Backend> Roller<B> {
    pub fn new() -> Self {
        Self {
            engine: None,
            sandbox: None,
            start: Instant::now(),
        }
    }

    /// The sandbox, as `config` asks for it.
    pub fn sandbox(&mut self, config: &Config) -> Result<&Sandbox> {
        Ok(match &mut self.sandbox {
            Some(sandbox) => sandbox,
            slot => slot.insert(open_sandbox(config)?),
        })
    }

    /// The answers to each request, by their number.
    pub fn draw(
        &mut self,
        session: &Session<B>,
        config: &Config,
        what: &str,
        requests: &[Request],
        max_tokens: usize,
        stop: &[String],
    ) -> Result<Vec<Vec<Completion>>> {
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let needed = longest + max_tokens;
        let engine = match &mut self.engine {
            Some((room, engine)) if *room >= needed => engine,
            slot => {
                // The old one goes first, so that the two never stand side by side.
                *slot = None;
                let room = longest.next_multiple_of(256);
                let new = session.engine(room, max_tokens)?;
                &mut slot.insert((room + max_tokens, new)).1
            }
        };
        let settings = SamplingSettings {
            temperature: config.train.temperature,
            max_tokens,
            ..SamplingSettings::default()
        };
        let mut answers: Vec<Vec<Completion>> = requests.iter().map(|_| Vec::new()).collect();
        session.generate(engine, what, requests, &settings, stop, |completion| {
            answers[completion.request].push(completion);
            Ok(())
        })?;
        for answers in &mut answers {
            answers.sort_by_key(|a| a.sample);
        }
        Ok(answers)
    }
}

/// Puts requests, answers and rewards together, with the advantages that follow from them.
pub(super) fn answered<B: Backend>(
    session: &Session<B>,
    config: &Config,
    requests: Vec<Request>,
    answers: Vec<Vec<Completion>>,
    rewards: Vec<Vec<f32>>,
) -> Result<Vec<Answered>> {
    let device = &session.device;
    let mut groups = Vec::new();
    for ((request, answers), rewards) in requests.into_iter().zip(answers).zip(rewards) {
        // Groups differ in size where answers were left out.
        let mut advantages = device.zeros::<f32>(rewards.len())?;
        device.advantages(
            1,
            rewards.len(),
            config.train.advantages(),
            &device.upload(&rewards)?,
            &mut advantages,
        )?;
        groups.push(Answered {
            prompt: request.prompt,
            answers,
            rewards,
            advantages: device.download(&advantages)?,
        });
    }
    Ok(groups)
}
