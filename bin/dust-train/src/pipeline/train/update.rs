//! The second half of a step: the clipped surrogate over mini-batches, and the optimizer.

use super::super::config::Aggregation;
use super::super::progress::Progress;
use super::super::{Config, Session};
use super::metrics::{StepMetrics, mean, peak_memory_mib, worst};
use super::optimizer::Optimizer;
use super::rollout::{Answered, Lesson, Rolled};
use crate::metrics::mean_std;
use crate::model::{Batch, Model, Workspace};
use anyhow::{Result, ensure};
use dust_kernels::{Backend, adamw::AdamWConfig, grpo::SequenceStats};
use std::time::Instant;

/// What updates need besides the policy.
pub(super) struct Updater<B: Backend> {
    pub workspace: Workspace<B>,
    /// The policy as it was before training, for the KL term.
    pub reference: Model<B>,
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

/// A piece of a mini-batch that fits the workspace: groups with their reference log-probabilities.
struct Micro<'a> {
    groups: Vec<&'a Answered>,
    batch: Batch,
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
        let warm = (step + 1) as f32 / settings.warmup_steps.max(1) as f32;
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
        let mut references: Vec<Vec<Vec<f32>>> = Vec::new();
        for epoch in 0..settings.epochs {
            for (i, groups) in mini_batches.iter().enumerate() {
                let micros = self.pack(groups)?;
                if epoch == 0 {
                    let scored = micros
                        .iter()
                        .map(|m| self.score_reference(&session.device, m, settings.temperature))
                        .collect::<Result<_>>()?;
                    references.push(scored);
                }
                let tokens: usize = micros.iter().map(|m| m.batch.targets.len()).sum();
                let sequences: usize = micros.iter().map(|m| m.batch.answers.len()).sum();
                for (micro, reference) in micros.iter().zip(&references[i]) {
                    let before_any_update = epoch == 0 && i == 0;
                    self.micro_batch(
                        session,
                        optimizer,
                        config,
                        rolled.lesson,
                        micro,
                        reference,
                        tokens,
                        sequences,
                        epoch == 0,
                        before_any_update,
                        &mut sums,
                    )?;
                    bar.advance(micro.groups.len() as u64, String::new);
                }
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
        Ok(self.log(step, &rolled, &sums, adamw.learning_rate, start))
    }

    /// Cuts groups into batches of at most as many rows as the workspace has.
    fn pack<'a>(&self, groups: &'a [Answered]) -> Result<Vec<Micro<'a>>> {
        let room = self.workspace.rows();
        let mut micros: Vec<Micro<'a>> = Vec::new();
        for group in groups {
            let answers: Vec<&[u32]> = group.answers.iter().map(|a| a.tokens.as_slice()).collect();
            let rows = group.prompt.len() + answers.iter().map(|a| a.len()).sum::<usize>();
            ensure!(
                rows <= room,
                "a prompt and its {} judgments are {rows} tokens, model.micro_batch_tokens is {room}: \
                 raise it (with model.recompute = true if memory is short)",
                answers.len()
            );
            match micros.last_mut() {
                Some(micro) if micro.batch.rows() + rows <= room => {
                    micro.batch.push_group(&group.prompt, &answers);
                    micro.groups.push(group);
                }
                _ => {
                    let mut batch = Batch::new();
                    batch.push_group(&group.prompt, &answers);
                    micros.push(Micro {
                        groups: vec![group],
                        batch,
                    });
                }
            }
        }
        Ok(micros)
    }

    fn score_reference(
        &mut self,
        device: &B,
        micro: &Micro<'_>,
        temperature: f32,
    ) -> Result<Vec<f32>> {
        let ws = &mut self.workspace;
        self.reference.forward(device, ws, &micro.batch)?;
        self.reference
            .logprobs(device, ws, &micro.batch, temperature)?;
        let mut logprobs = vec![0.0; micro.batch.targets.len()];
        device.read(&ws.head.logprob, 0, &mut logprobs)?;
        Ok(logprobs)
    }

    /// Adds one micro-batch's gradient. `tokens` and `sequences` are the mini-batch's: the loss is a
    /// mean over all of it, not over the piece.
    fn micro_batch(
        &mut self,
        session: &Session<B>,
        optimizer: &mut Optimizer<B>,
        config: &Config,
        lesson: Lesson,
        micro: &Micro<'_>,
        reference: &[f32],
        tokens: usize,
        sequences: usize,
        first_epoch: bool,
        before_any_update: bool,
        sums: &mut Sums,
    ) -> Result<()> {
        let (device, model) = (&session.device, &session.model);
        let ws = &mut self.workspace;
        let batch = &micro.batch;
        model.forward(device, ws, batch)?;
        model.logprobs(device, ws, batch, config.train.temperature)?;

        let answers = || micro.groups.iter().flat_map(|g| &g.answers);
        let old: Vec<f32> = answers().flat_map(|a| a.logprobs.iter().copied()).collect();
        let advantages: Vec<f32> = micro
            .groups
            .iter()
            .flat_map(|g| g.advantages.iter().copied())
            .collect();
        let mut offsets = vec![0u32];
        offsets.extend(batch.answers.iter().map(|t| (t.start + t.len) as u32));
        let weights: Vec<f32> = batch
            .answers
            .iter()
            .map(|t| match config.train.aggregation {
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
        let mut old = old;
        if before_any_update || lesson == Lesson::Imitation {
            let mut new = vec![0.0f32; count];
            device.read(&ws.head.logprob, 0, &mut new)?;
            if lesson == Lesson::Imitation {
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
        let head = &mut ws.head;
        device.grpo_loss(
            &config.train.grpo(),
            weights.len(),
            count,
            &device.upload(&offsets)?,
            &device.upload(&weights)?,
            &device.upload(&advantages)?,
            &head.logprob,
            &device.upload(&old)?,
            Some(&device.upload(reference)?),
            &mut head.dlogprob,
            &mut stats,
        )?;
        // Without a KL term, groups whose rewards all agree have no gradient at all.
        let silent = lesson != Lesson::Imitation
            && config.train.kl_coef == 0.0
            && micro.groups.iter().all(|g| g.zero_variance());
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
        sums: &Sums,
        learning_rate: f32,
        start: Instant,
    ) -> StepMetrics {
        let rewards: Vec<f64> = rolled
            .groups
            .iter()
            .flat_map(|g| g.rewards.iter().map(|&r| f64::from(r)))
            .collect();
        let (reward_mean, reward_std) = mean_std(&rewards).unwrap_or((0.0, None));
        let answers = rewards.len();
        let per_token = |x: f32| f64::from(x) / sums.tokens.max(1) as f64;
        let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
        let update_seconds = start.elapsed().as_secs_f64();
        let prompt_tokens: usize = rolled.groups.iter().map(|g| g.prompt.len()).sum();
        let answer_tokens: usize = rolled.answers().map(|a| a.tokens.len()).sum();
        let stats = &sums.stats;
        let made = || sums.norms.iter().copied().filter(|norm| norm.is_finite());
        let made_count = made().count();
        StepMetrics {
            step: step + 1,
            lesson: rolled.lesson,
            reward_mean,
            reward_std: reward_std.unwrap_or(0.0),
            pair_accuracy: (!rolled.pair_accuracy.is_empty())
                .then(|| mean(rolled.pair_accuracy.iter().map(|&p| f64::from(p)))),
            zero_variance: share(
                rolled.groups.iter().filter(|g| g.zero_variance()).count(),
                rolled.groups.len(),
            ),
            invalid: share(rolled.drawn - rolled.valid, rolled.drawn),
            picked_first: rolled.picked_first.clone(),
            loss: f64::from(stats.loss) / sums.norms.len().max(1) as f64,
            entropy: sums.entropy / sums.first_tokens.max(1) as f64,
            kl: per_token(stats.kl),
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
            prompt_tokens: share(prompt_tokens, rolled.groups.len()),
            answer_tokens: share(answer_tokens, answers),
            truncated: share(rolled.truncated(), answers),
            rollout_tokens_per_s: (prompt_tokens + answer_tokens) as f64 / rolled.seconds,
            train_tokens_per_s: sums.rows as f64 / update_seconds,
            seconds: rolled.seconds + update_seconds,
            peak_memory_mib: peak_memory_mib(),
        }
    }
}
