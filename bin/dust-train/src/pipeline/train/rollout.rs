//! The first half of a step: answers from the current policy, their rewards and advantages.

use super::super::label::open_sandbox;
use super::super::session::{KeptEngine, Until};
use super::super::{Config, RunFolder, Session};
use crate::rollout::{Completion, Request, SamplingSettings};
use crate::sandbox::Sandbox;
use anyhow::Result;
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};

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

impl Lesson {
    /// In the words of a report.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Ranking => "GRPO on rankings",
            Self::Generation => "GRPO on programs",
            Self::Imitation => "imitation of right rankings",
        }
    }
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
    /// The groups to learn from.
    pub groups: Vec<Answered>,
    /// Groups that were drawn too, and teach nothing or are not needed.
    pub left_out: Vec<Answered>,
    /// Answers, of both, that hold what was asked for: a ranking, a program.
    pub valid: usize,
    /// Programs without a verdict, which are not among the answers.
    pub no_verdict: usize,
    pub pair_accuracy: Vec<f32>,
    /// How often each shown position was ranked first.
    pub picked_first: Vec<usize>,
    /// What it took.
    pub seconds: f64,
}

impl Rolled {
    /// Takes in what another draw of the same step gave.
    pub fn add(&mut self, more: Rolled) {
        self.lesson = more.lesson;
        self.groups.extend(more.groups);
        self.left_out.extend(more.left_out);
        self.valid += more.valid;
        self.no_verdict += more.no_verdict;
        self.pair_accuracy.extend(more.pair_accuracy);
        let positions = self.picked_first.len().max(more.picked_first.len());
        self.picked_first.resize(positions, 0);
        for (sum, count) in self.picked_first.iter_mut().zip(more.picked_first) {
            *sum += count;
        }
    }

    /// Leaves out the groups that `keep` does not want.
    pub fn retain(&mut self, mut keep: impl FnMut(usize, &Answered) -> bool) {
        for (i, group) in std::mem::take(&mut self.groups).into_iter().enumerate() {
            if keep(i, &group) {
                self.groups.push(group);
            } else {
                self.left_out.push(group);
            }
        }
    }

    /// All groups that were drawn.
    pub fn drawn(&self) -> impl Iterator<Item = &Answered> {
        self.groups.iter().chain(&self.left_out)
    }

    /// All answers that were drawn.
    pub fn answers(&self) -> impl Iterator<Item = &Completion> {
        self.drawn().flat_map(|g| &g.answers)
    }
}

/// The temperature that a lesson's answers are drawn and trained at.
pub(super) fn temperature(config: &Config, lesson: Lesson) -> f32 {
    match lesson {
        Lesson::Generation => config.sample.sampling.temperature,
        Lesson::Ranking | Lesson::Imitation => config.train.temperature,
    }
}

/// Draws answers. Its engine and its sandbox serve all steps.
pub(super) struct Roller<B: Backend> {
    pub engine: KeptEngine<B>,
    sandbox: Option<Sandbox>,
    run: RunFolder,
}

impl<B: Backend> Roller<B> {
    pub fn new(run: &RunFolder) -> Self {
        Self {
            engine: KeptEngine::new(),
            sandbox: None,
            run: run.clone(),
        }
    }

    /// The sandbox, as `config` asks for it.
    pub fn sandbox(&mut self, config: &Config) -> Result<&Sandbox> {
        Ok(match &mut self.sandbox {
            Some(sandbox) => sandbox,
            slot => slot.insert(open_sandbox(config, &self.run)?),
        })
    }

    /// The answers to each request, by their number.
    pub fn draw(
        &mut self,
        session: &Session<B>,
        what: &str,
        requests: &[Request],
        temperature: f32,
        max_tokens: usize,
        until: Until<'_>,
    ) -> Result<Vec<Vec<Completion>>> {
        let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let engine = self.engine.with_room(session, longest, max_tokens)?;
        // No filters: the ratio of the loss is that of the whole distribution.
        let settings = SamplingSettings {
            temperature,
            max_tokens,
            ..SamplingSettings::default()
        };
        let mut answers: Vec<Vec<Completion>> = requests.iter().map(|_| Vec::new()).collect();
        session.generate(engine, what, requests, &settings, until, |completion| {
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
