//! The first half of a step: judgments from the current policy, their rewards and advantages.

use super::super::judging::Question;
use super::super::session::derive_seed;
use super::super::{Config, Session};
use super::{Group, Tasks};
use crate::rollout::{Completion, Engine, Finish, Request, SamplingSettings};
use anyhow::{Context, Result};
use dust_kernels::{Backend, ranking::RankingReward};
use std::time::Instant;

/// The judgments of one group.
pub(super) struct Judged {
    pub prompt: Vec<u32>,
    pub answers: Vec<Completion>,
    pub rewards: Vec<f32>,
    pub advantages: Vec<f32>,
}

impl Judged {
    /// Whether all judgments got the same reward, so that they teach nothing.
    pub fn zero_variance(&self) -> bool {
        self.rewards.iter().all(|&r| r == self.rewards[0])
    }
}

/// The judgments of a step.
pub(super) struct Rolled {
    pub groups: Vec<Judged>,
    pub valid: usize,
    pub pair_accuracy: Vec<f32>,
    pub picked_first: Vec<usize>,
    pub seconds: f64,
}

impl Rolled {
    pub fn answers(&self) -> impl Iterator<Item = &Completion> {
        self.groups.iter().flat_map(|g| &g.answers)
    }

    pub fn truncated(&self) -> usize {
        self.answers()
            .filter(|a| a.finish == Finish::Length)
            .count()
    }
}

/// Draws `train.judgments` judgments for each group. The engine is made once and again only where
/// prompts outgrow it.
pub(super) fn roll<B: Backend>(
    session: &Session<B>,
    config: &Config,
    engine: &mut Option<(usize, Engine<B>)>,
    step: usize,
    groups: &[&Group],
    tasks: &Tasks<'_>,
) -> Result<Rolled> {
    let start = Instant::now();
    let k = config.group.size;
    let samples = config.train.judgments;
    let mut questions = Vec::new();
    let mut requests = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        let task = tasks.get(group.problem.as_str()).with_context(|| {
            format!(
                "groups.jsonl: problem `{}` is not in {}",
                group.problem, config.tasks.source
            )
        })?;
        // A group that comes again is shown in another order.
        let question = Question::new(session, config, task, &group.programs, &group.id, step)?;
        requests.push(Request {
            prompt: question.tokens.clone(),
            samples,
            seed: derive_seed(
                config.seed,
                &["judge", &step.to_string(), &i.to_string(), &group.id],
            ),
        });
        questions.push(question);
    }
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let engine = match engine {
        Some((room, engine)) if *room >= longest => engine,
        slot => {
            // The old one goes first, so that the two never stand side by side.
            *slot = None;
            let room = longest.next_multiple_of(256);
            let new = session.engine(room, config.judge.max_tokens)?;
            &mut slot.insert((room, new)).1
        }
    };
    let settings = SamplingSettings {
        temperature: config.train.temperature,
        max_tokens: config.judge.max_tokens,
        ..SamplingSettings::default()
    };
    let mut answers: Vec<Vec<Completion>> = groups.iter().map(|_| Vec::new()).collect();
    session.generate(
        engine,
        "judge",
        &requests,
        &settings,
        &config.judge.stop,
        |completion| {
            answers[completion.request].push(completion);
            Ok(())
        },
    )?;

    let thinking = session.opens_thought()?;
    let (mut order, mut labels, mut picked_first) = (Vec::new(), Vec::new(), vec![0; k]);
    let mut valid = Vec::new();
    for ((group, question), answers) in groups.iter().zip(&questions).zip(&mut answers) {
        answers.sort_by_key(|a| a.sample);
        for answer in answers.iter() {
            let read = question.read(config, thinking, &session.text(&answer.tokens));
            valid.push(read.is_ok());
            match read {
                Ok((ranking, first)) => {
                    picked_first[first] += 1;
                    order.extend(ranking.iter().map(|&c| c as u32));
                }
                // No permutation, which the reward kernel takes as invalid.
                Err(_) => order.extend(std::iter::repeat_n(u32::MAX, k)),
            }
            labels.extend(group.labels.iter().map(|&y| f32::from(u8::from(y))));
        }
    }
    let device = &session.device;
    let (n, g) = (valid.len(), samples as usize);
    let (order, labels) = (device.upload(&order)?, device.upload(&labels)?);
    let mut rewards = device.zeros::<f32>(n)?;
    let mut reward = |kind| -> Result<Vec<f32>> {
        device.ranking_reward(
            n,
            k,
            kind,
            config.train.invalid_reward,
            &order,
            &labels,
            &mut rewards,
        )?;
        Ok(device.download(&rewards)?)
    };
    let pairs = reward(RankingReward::PairwiseAccuracy)?;
    let values = reward(config.train.reward.kernel())?;
    let mut advantages = device.zeros::<f32>(n)?;
    device.advantages(
        groups.len(),
        g,
        config.train.advantages(),
        &rewards,
        &mut advantages,
    )?;
    let advantages = device.download(&advantages)?;

    let groups = requests
        .into_iter()
        .zip(answers)
        .enumerate()
        .map(|(i, (request, answers))| Judged {
            prompt: request.prompt,
            answers,
            rewards: values[i * g..(i + 1) * g].to_vec(),
            advantages: advantages[i * g..(i + 1) * g].to_vec(),
        })
        .collect();
    let pair_accuracy = pairs
        .iter()
        .zip(&valid)
        .filter_map(|(&p, &ok)| ok.then_some(p))
        .collect();
    Ok(Rolled {
        groups,
        valid: valid.iter().filter(|&&v| v).count(),
        pair_accuracy,
        picked_first,
        seconds: start.elapsed().as_secs_f64(),
    })
}
