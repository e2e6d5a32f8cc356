//! Rankings as answers: judgments of groups, rewarded by their labels; and right rankings to repeat.

use super::super::group::{Group, mixed_groups};
use super::super::judging::Question;
use super::super::label::{program, run_programs};
use super::super::session::{Until, derive_seed};
use super::super::{Config, Session};
use super::rollout::{Answered, Lesson, Rolled, Roller, answered, temperature};
use super::{Tasks, cycle};
use crate::rollout::{Completion, Finish, Request};
use crate::sandbox::Verdict;
use crate::shuffle::shuffle;
use crate::tasks::Task;
use anyhow::{Context, Result};
use dust_kernels::{Backend, ranking::RankingReward};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::collections::{BTreeMap, HashSet};

/// Draws `train.judgments` judgments for each group.
pub(super) fn judge<B: Backend>(
    session: &Session<B>,
    config: &Config,
    roller: &mut Roller<B>,
    step: usize,
    groups: &[&Group],
    tasks: &Tasks<'_>,
) -> Result<Rolled> {
    if groups.is_empty() {
        return Ok(Rolled::default());
    }
    let k = config.group.size;
    let (questions, requests) = ask(session, config, step, groups, tasks)?;
    let answers = roller.draw(
        session,
        "judge",
        &requests,
        temperature(config, Lesson::Ranking),
        config.judge.max_tokens,
        Until::Strings(&config.judge.stop),
    )?;

    let thinking = session.opens_thought()?;
    let (mut order, mut labels, mut picked_first) = (Vec::new(), Vec::new(), vec![0; k]);
    let mut valid = Vec::new();
    for ((group, question), answers) in groups.iter().zip(&questions).zip(&answers) {
        for answer in answers {
            let text = session.text(&answer.tokens);
            let read = question.read(config, thinking, &text, answer.finish);
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
    let n = valid.len();
    let (order, labels) = (device.upload(&order)?, device.upload(&labels)?);
    let mut rewards = device.zeros::<f32>(n)?;
    let mut reward = |kind| -> Result<Vec<f32>> {
        let invalid = config.train.invalid_reward;
        device.ranking_reward(n, k, kind, invalid, &order, &labels, &mut rewards)?;
        Ok(device.download(&rewards)?)
    };
    let pairs = reward(RankingReward::PairwiseAccuracy)?;
    let values = reward(config.train.reward.kernel())?;
    let values = values
        .chunks(config.train.judgments as usize)
        .map(<[f32]>::to_vec)
        .collect();
    Ok(Rolled {
        lesson: Lesson::Ranking,
        groups: answered(session, config, requests, answers, values)?,
        valid: valid.iter().filter(|&&v| v).count(),
        pair_accuracy: pairs
            .iter()
            .zip(&valid)
            .filter_map(|(&p, &ok)| ok.then_some(p))
            .collect(),
        picked_first,
        ..Rolled::default()
    })
}

/// A right ranking for each group, to be repeated word for word: right candidates before wrong
/// ones, equals in random order.
pub(super) fn imitate<B: Backend>(
    session: &Session<B>,
    config: &Config,
    step: usize,
    groups: &[&Group],
    tasks: &Tasks<'_>,
) -> Result<Rolled> {
    let (questions, requests) = ask(session, config, step, groups, tasks)?;
    let end = session.end_of_turn()?;
    let mut answers = Vec::new();
    for (i, (group, question)) in groups.iter().zip(&questions).enumerate() {
        let mut best: Vec<usize> = (0..group.labels.len()).collect();
        let seed = derive_seed(config.seed, &["imitate", &step.to_string(), &group.id]);
        shuffle(&mut best, &mut ChaCha8Rng::seed_from_u64(seed));
        best.sort_by_key(|&c| !group.labels[c]);
        let text = question.answer(config, &best)?;
        let mut tokens = session.tokenizer.encode(&text, false)?;
        tokens.extend(end);
        answers.push(Completion {
            request: i,
            sample: 0,
            // Taken from the policy itself when it is updated.
            logprobs: vec![0.0; tokens.len()],
            kept: vec![1.0; tokens.len()],
            tokens,
            finish: Finish::StopToken,
        });
    }
    Ok(Rolled {
        lesson: Lesson::Imitation,
        groups: requests
            .into_iter()
            .zip(answers)
            .map(|(request, answer)| Answered {
                prompt: request.prompt,
                answers: vec![answer],
                rewards: vec![1.0],
                advantages: vec![1.0],
            })
            .collect(),
        valid: groups.len(),
        ..Rolled::default()
    })
}

/// The questions about the groups. A group that comes again is shown in another order.
fn ask<B: Backend>(
    session: &Session<B>,
    config: &Config,
    step: usize,
    groups: &[&Group],
    tasks: &Tasks<'_>,
) -> Result<(Vec<Question>, Vec<Request>)> {
    let (mut questions, mut requests) = (Vec::new(), Vec::new());
    for (i, group) in groups.iter().enumerate() {
        let task = tasks.get(group.problem.as_str()).with_context(|| {
            format!(
                "groups.jsonl: problem `{}` is not in {}",
                group.problem, config.tasks.source
            )
        })?;
        let question = Question::new(session, config, task, &group.programs, &group.id, step)?;
        requests.push(Request {
            prompt: question.tokens.clone(),
            samples: config.train.judgments,
            seed: derive_seed(
                config.seed,
                &["judge", &step.to_string(), &i.to_string(), &group.id],
            ),
        });
        questions.push(question);
    }
    Ok((questions, requests))
}

/// At most `wanted` mixed groups of candidates from the current policy, for the problems of draw
/// number `number`.
pub(super) fn fresh_groups<B: Backend>(
    session: &Session<B>,
    config: &Config,
    roller: &mut Roller<B>,
    number: usize,
    wanted: usize,
    problems: &[&Task],
) -> Result<Vec<Group>> {
    let name = format!("fresh {number}");
    let tasks = cycle(problems, config, "fresh", number, config.train.prompts);
    let mut seen = HashSet::new();
    let tasks: Vec<&Task> = tasks
        .into_iter()
        .copied()
        .filter(|t| seen.insert(&t.id))
        .collect();
    let by_id: Tasks<'_> = tasks.iter().map(|t| (t.id.as_str(), *t)).collect();
    let (mut programs, mut owners) = (Vec::new(), Vec::new());
    super::super::sample::draw(
        session,
        &mut roller.engine,
        config,
        &name,
        &tasks,
        config.sample.candidates,
        &config.sample.sampling,
        &HashSet::new(),
        |candidate| {
            if let (Some(code), Some(task)) =
                (candidate.program, by_id.get(candidate.problem.as_str()))
            {
                programs.push(program(task, &code));
                owners.push((candidate.problem, candidate.sample, code));
            }
            Ok(())
        },
    )?;
    let mut pools: BTreeMap<String, Vec<_>> = BTreeMap::new();
    run_programs(roller.sandbox(config)?, config, &programs, |i, outcome| {
        if outcome.verdict != Verdict::InfraError {
            let (problem, sample, code) = owners[i].clone();
            let right = outcome.verdict == Verdict::Passed;
            pools
                .entry(problem)
                .or_default()
                .push((sample, code, right));
        }
        Ok(())
    })?;
    let mut groups: Vec<Group> = Vec::new();
    for (problem, mut pool) in pools {
        // Programs come as they are ready; their order must not matter.
        pool.sort();
        let seed = derive_seed(config.seed, &[&name, &problem]);
        groups.extend(mixed_groups(&problem, pool, seed, &config.group).0);
    }
    // Not the first problems of the alphabet.
    let seed = derive_seed(config.seed, &[&name]);
    shuffle(&mut groups, &mut ChaCha8Rng::seed_from_u64(seed));
    groups.truncate(wanted);
    Ok(groups)
}
