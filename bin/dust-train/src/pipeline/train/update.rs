//! The second half of a step: the clipped surrogate over mini-batches, and the optimizer.

use super::super::config::Aggregation;
use super::super::progress::Progress;
use super::super::{Config, Session};
use super::metrics::{StepMetrics, mean, peak_memory_mib, worst};
use super::optimizer::Optimizer;
use super::rollout::{Answered, Lesson, Rolled, temperature};
use crate::metrics::mean_std;
use crate::model::{Batch, Model, Purpose, Workspace};
use crate::rollout::Finish;
use anyhow::{Context, Result};
use dust_kernels::grpo::{GrpoConfig, SequenceStats};
use dust_kernels::{Backend, adamw::AdamWConfig};
use std::ops::Range;
use std::time::Instant;

/// What updates need besides the policy.
pub(super) struct Updater<B: Backend> {
    /// Made for the first step, and again where a longer answer comes.
    pub workspace: Option<Workspace<B>>,
    /// The policy as it was before training, if the loss has a KL term.
    pub reference: Option<Model<B>>,
}

/// How a step's loss is computed.
struct How {
    lesson: Lesson,
    temperature: f32,
    aggregation: Aggregation,
    grpo: GrpoConfig,
}

/// Sums over the updates of a step.
#[derive(Default)]
struct Sums {
    stats: SequenceStats,
    tokens: usize,
    rows: usize,
    entropy: f64,
    first_tokens: usize,
    mismatch: f64,
    norms: Vec<f64>,
}

/// A piece of a mini-batch that runs at a time: groups, or some of a group's answers.
#[derive(Default)]
struct Micro<'a> {
    pieces: Vec<(&'a Answered, Range<usize>)>,
    batch: Batch,
}

impl<'a> Micro<'a> {
    fn push(&mut self, group: &'a Answered, answers: Range<usize>) {
        let tokens: Vec<&[u32]> = group.answers[answers.clone()]
            .iter()
            .map(|a| a.tokens.as_slice())
            .collect();
        self.batch.push_group(&group.prompt, &tokens);
        self.pieces.push((group, answers));
    }
}

/// Rows of a prompt with some of its answers.
fn rows(group: &Answered, answers: Range<usize>) -> usize {
    let answers = &group.answers[answers];
    group.prompt.len() + answers.iter().map(|a| a.tokens.len()).sum::<usize>()
}

/// Rows that a pass needs at least: `micro_batch_tokens`, or the longest prompt with one answer.
fn room(groups: &[Answered], micro_batch_tokens: usize) -> usize {
    groups
        .iter()
        .flat_map(|g| (0..g.answers.len()).map(|i| rows(g, i..i + 1)))
        .fold(micro_batch_tokens, usize::max)
}

/// Cuts groups into batches of at most `room` rows. A group's answers stay together where they fit,
/// so that its prompt runs once.
fn pack(groups: &[Answered], room: usize) -> Vec<Micro<'_>> {
    let mut micros: Vec<Micro<'_>> = Vec::new();
    for group in groups {
        let all = group.answers.len();
        let mut from = 0;
        while from < all {
            match micros.last_mut() {
                Some(micro) if micro.batch.rows() + rows(group, from..all) <= room => {
                    micro.push(group, from..all);
                    from = all;
                }
                _ => {
                    let fits = |&to: &usize| rows(group, from..to) <= room;
                    let to = (from + 1..=all).take_while(fits).last().unwrap_or(from + 1);
                    let mut micro = Micro::default();
                    micro.push(group, from..to);
                    micros.push(micro);
                    from = to;
                }
            }
        }
    }
    micros
}

impl<B: Backend> Updater<B> {
    /// Runs all epochs over the judgments of a step.
    pub fn update(
        &mut self,
        session: &mut Session<B>,
        optimizer: &mut Optimizer<B>,
        config: &Config,
        step: usize,
        rolled: Rolled,
    ) -> Result<StepMetrics> {
        let start = Instant::now();
        let settings = &config.train;
        // The warm-up begins anew where imitation ends, as the moments do.
        let begun = step.checked_sub(settings.sft_steps).unwrap_or(step);
        let warm = (begun + 1) as f32 / settings.warmup_steps.max(1) as f32;
        let adamw = AdamWConfig {
            learning_rate: settings.learning_rate * warm.min(1.0),
            beta1: settings.beta1,
            beta2: settings.beta2,
            eps: settings.adam_eps,
            weight_decay: settings.weight_decay,
            step: 0,
        };
        let mut sums = Sums::default();
        let mini_batches: Vec<&[Answered]> = rolled.groups.chunks(settings.mini_batch).collect();
        let bar = Progress::new("update", (settings.epochs * rolled.groups.len()) as u64);
        let how = How {
            lesson: rolled.lesson,
            temperature: temperature(config, rolled.lesson),
            aggregation: settings.aggregation,
            grpo: GrpoConfig {
                // Imitation is the plain mean negative log-probability.
                kl_coef: match rolled.lesson {
                    Lesson::Imitation => 0.0,
                    _ => settings.kl_coef,
                },
                ..settings.grpo()
            },
        };
        let room = room(&rolled.groups, config.model.micro_batch_tokens);
        self.make_room(session, config, room)?;
        let mut references: Vec<Vec<Vec<f32>>> = Vec::new();
        for epoch in 0..settings.epochs {
            for (i, groups) in mini_batches.iter().enumerate() {
                let micros = pack(groups, room);
                if epoch == 0 {
                    references.push(self.score_reference(&session.device, &micros, &how)?);
                }
                let tokens: usize = micros.iter().map(|m| m.batch.targets.len()).sum();
                let sequences: usize = micros.iter().map(|m| m.batch.answers.len()).sum();
                for (m, micro) in micros.iter().enumerate() {
                    let before_any_update = epoch == 0 && i == 0;
                    self.micro_batch(
                        session,
                        optimizer,
                        &how,
                        micro,
                        references[i].get(m).map(Vec::as_slice),
                        tokens,
                        sequences,
                        epoch == 0,
                        before_any_update,
                        &mut sums,
                    )?;
                }
                bar.advance(groups.len() as u64, String::new);
                let norm = optimizer.step(
                    &session.device,
                    &mut session.model,
                    adamw,
                    settings.max_grad_norm,
                )?;
                sums.norms.push(f64::from(norm));
            }
        }
        bar.finish();
        Ok(self.log(step, &rolled, &how, &sums, adamw.learning_rate, start))
    }

    fn make_room(&mut self, session: &Session<B>, config: &Config, rows: usize) -> Result<()> {
        if self.workspace.as_ref().is_none_or(|w| w.rows() < rows) {
            // The old one goes first, so that the two never stand side by side.
            self.workspace = None;
            let recompute = config.model.recompute;
            self.workspace = Some(Workspace::new(
                &session.device,
                &session.model.config,
                rows,
                Purpose::Train { recompute },
            )?);
        }
        Ok(())
    }

    /// The reference's log-probabilities of each piece; none where the loss does not use them.
    fn score_reference(
        &mut self,
        device: &B,
        micros: &[Micro<'_>],
        how: &How,
    ) -> Result<Vec<Vec<f32>>> {
        let (Some(reference), Some(ws)) = (&self.reference, &mut self.workspace) else {
            return Ok(Vec::new());
        };
        if how.grpo.kl_coef == 0.0 {
            return Ok(Vec::new());
        }
        micros
            .iter()
            .map(|micro| {
                reference.forward(device, ws, &micro.batch)?;
                reference.logprobs(device, ws, &micro.batch, how.temperature)?;
                let mut logprobs = vec![0.0; micro.batch.targets.len()];
                device.read(&ws.head.logprob, 0, &mut logprobs)?;
                Ok(logprobs)
            })
            .collect()
    }

    /// Adds one micro-batch's gradient. `tokens` and `sequences` are the mini-batch's: the loss is a
    /// mean over all of it, not over the piece.
    fn micro_batch(
        &mut self,
        session: &Session<B>,
        optimizer: &mut Optimizer<B>,
        how: &How,
        micro: &Micro<'_>,
        reference: Option<&[f32]>,
        tokens: usize,
        sequences: usize,
        first_epoch: bool,
        before_any_update: bool,
        sums: &mut Sums,
    ) -> Result<()> {
        let (device, model) = (&session.device, &session.model);
        let ws = self.workspace.as_mut().context("no room was made")?;
        let batch = &micro.batch;
        model.forward(device, ws, batch)?;
        model.logprobs(device, ws, batch, how.temperature)?;

        let pieces = || {
            micro
                .pieces
                .iter()
                .map(|(group, range)| (*group, range.clone()))
        };
        let mut old: Vec<f32> = pieces()
            .flat_map(|(group, range)| &group.answers[range])
            .flat_map(|answer| answer.logprobs.iter().copied())
            .collect();
        let advantages: Vec<f32> = pieces()
            .flat_map(|(group, range)| group.advantages[range].iter().copied())
            .collect();
        let mut offsets = vec![0u32];
        offsets.extend(batch.answers.iter().map(|t| (t.start + t.len) as u32));
        let weights: Vec<f32> = batch
            .answers
            .iter()
            .map(|t| match how.aggregation {
                Aggregation::TokenMean => 1.0 / tokens as f32,
                Aggregation::SequenceMean => 1.0 / (sequences * t.len.max(1)) as f32,
            })
            .collect();
        let count = batch.targets.len();
        if first_epoch {
            let mut entropy = vec![0.0f32; count];
            device.read(&ws.head.entropy, 0, &mut entropy)?;
            sums.entropy += entropy.iter().map(|&h| f64::from(h)).sum::<f64>();
            sums.first_tokens += count;
        }
        if before_any_update || how.lesson == Lesson::Imitation {
            let mut new = vec![0.0f32; count];
            device.read(&ws.head.logprob, 0, &mut new)?;
            if how.lesson == Lesson::Imitation {
                // A ratio of 1 at every update makes the surrogate's gradient that of the mean
                // negative log-probability, which is also the loss to log.
                for (target, weight) in batch.answers.iter().zip(&weights) {
                    let logprobs = &new[target.start..target.start + target.len];
                    sums.stats.loss += weight * (target.len as f32 - logprobs.iter().sum::<f32>());
                }
                old = new;
            } else {
                let distances = new.iter().zip(&old).map(|(n, o)| f64::from((n - o).abs()));
                sums.mismatch = distances.fold(sums.mismatch, worst);
            }
        }
        let mut stats = device.zeros::<SequenceStats>(weights.len())?;
        let reference = reference.map(|r| device.upload(r)).transpose()?;
        let head = &mut ws.head;
        device.grpo_loss(
            &how.grpo,
            weights.len(),
            count,
            &device.upload(&offsets)?,
            &device.upload(&weights)?,
            &device.upload(&advantages)?,
            &head.logprob,
            &device.upload(&old)?,
            reference.as_ref(),
            &mut head.dlogprob,
            &mut stats,
        )?;
        // Without a KL term, groups whose rewards all agree have no gradient at all.
        let silent = how.lesson != Lesson::Imitation
            && how.grpo.kl_coef == 0.0
            && pieces().all(|(group, _)| group.zero_variance());
        if !silent {
            model.backward(device, ws, batch, &mut optimizer.grads)?;
        }
        for s in device.download(&stats)? {
            sums.stats.loss += s.loss;
            sums.stats.kl += s.kl;
            sums.stats.moved += s.moved;
            sums.stats.clipped_low += s.clipped_low;
            sums.stats.clipped_high += s.clipped_high;
            sums.stats.clipped_dual += s.clipped_dual;
        }
        sums.tokens += count;
        sums.rows += batch.rows();
        Ok(())
    }

    fn log(
        &self,
        step: usize,
        rolled: &Rolled,
        how: &How,
        sums: &Sums,
        learning_rate: f32,
        start: Instant,
    ) -> StepMetrics {
        let rewards: Vec<f64> = rolled
            .drawn()
            .flat_map(|g| g.rewards.iter().map(|&r| f64::from(r)))
            .collect();
        let (reward_mean, reward_std) = mean_std(&rewards).unwrap_or((0.0, None));
        let answers = rewards.len();
        let per_token = |x: f32| f64::from(x) / sums.tokens.max(1) as f64;
        let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
        let update_seconds = start.elapsed().as_secs_f64();
        let groups_drawn = rolled.drawn().count();
        let prompt_tokens: usize = rolled.drawn().map(|g| g.prompt.len()).sum();
        let answer_tokens: usize = rolled.answers().map(|a| a.tokens.len()).sum();
        let stats = &sums.stats;
        let made = || sums.norms.iter().copied().filter(|norm| norm.is_finite());
        let made_count = made().count();
        StepMetrics {
            step: step + 1,
            lesson: rolled.lesson,
            groups: rolled.groups.len(),
            groups_drawn,
            reward_mean,
            reward_std: reward_std.unwrap_or(0.0),
            pair_accuracy: (!rolled.pair_accuracy.is_empty())
                .then(|| mean(rolled.pair_accuracy.iter().map(|&p| f64::from(p)))),
            zero_variance: match rolled.lesson {
                // A ranking to repeat has nothing to differ from.
                Lesson::Imitation => 0.0,
                _ => share(
                    rolled.drawn().filter(|g| g.zero_variance()).count(),
                    groups_drawn,
                ),
            },
            invalid: share(answers - rolled.valid, answers),
            picked_first: rolled.picked_first.clone(),
            loss: f64::from(stats.loss) / sums.norms.len().max(1) as f64,
            entropy: sums.entropy / sums.first_tokens.max(1) as f64,
            kl: (how.grpo.kl_coef != 0.0).then(|| per_token(stats.kl)),
            moved: per_token(stats.moved),
            clipped_low: per_token(stats.clipped_low),
            clipped_high: per_token(stats.clipped_high),
            clipped_dual: per_token(stats.clipped_dual),
            clip_fraction: per_token(stats.clipped_low + stats.clipped_high + stats.clipped_dual),
            mismatch: sums.mismatch,
            grad_norm: if made_count == 0 {
                f64::NAN
            } else {
                mean(made())
            },
            learning_rate: f64::from(learning_rate),
            updates: sums.norms.len(),
            skipped_updates: sums.norms.len() - made_count,
            no_verdict: rolled.no_verdict,
            prompt_tokens: share(prompt_tokens, groups_drawn),
            answer_tokens: share(answer_tokens, answers),
            truncated: share(
                rolled
                    .answers()
                    .filter(|a| a.finish == Finish::Length)
                    .count(),
                answers,
            ),
            rollout_tokens_per_s: (prompt_tokens + answer_tokens) as f64 / rolled.seconds,
            train_tokens_per_s: sums.rows as f64 / update_seconds,
            seconds: rolled.seconds + update_seconds,
            peak_memory_mib: peak_memory_mib(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::Completion;

    fn group(prompt: usize, answers: &[usize]) -> Answered {
        let answer = |(i, &len): (usize, &usize)| Completion {
            request: 0,
            sample: i as u32,
            tokens: vec![1; len],
            logprobs: vec![0.0; len],
            kept: vec![1.0; len],
            finish: Finish::StopToken,
        };
        Answered {
            prompt: vec![1; prompt],
            answers: answers.iter().enumerate().map(answer).collect(),
            rewards: vec![0.0; answers.len()],
            advantages: vec![0.0; answers.len()],
        }
    }

    #[test]
    fn groups_are_cut_only_where_they_do_not_fit() {
        let groups = [group(4, &[3, 3]), group(4, &[1]), group(10, &[9, 2, 2, 30])];
        assert_eq!((room(&groups, 16), room(&groups, 64)), (40, 64));
        let cut = |room: usize| -> String {
            let micros = pack(&groups, room);
            assert!(micros.iter().all(|m| m.batch.rows() <= room));
            let pieces = |m: &Micro<'_>| -> Vec<String> {
                m.pieces.iter().map(|p| format!("{:?}", p.1)).collect()
            };
            let micros: Vec<String> = micros.iter().map(|m| pieces(m).join(" ")).collect();
            micros.join(", ")
        };
        assert_eq!(cut(100), "0..2 0..1 0..4");
        assert_eq!(cut(53), "0..2 0..1, 0..4");
        assert_eq!(cut(40), "0..2 0..1, 0..3, 3..4");
    }
}
