//! Stage 4: GRPO trains the model to rank its own candidates.
//!
//! A step draws G judgments for each of its groups from the current policy, rewards them, turns the
//! rewards into advantages inside of each group, and goes over the judgments `epochs` times in
//! mini-batches. All random numbers are keyed by (seed, step, group), so a step depends on nothing but
//! the state after the step before: a run that was killed goes on to the same bits.

mod metrics;
mod optimizer;
mod rollout;
mod state;
mod update;

pub use metrics::StepMetrics;
pub use optimizer::Optimizer;

use super::group::{GROUPS, Group};
use super::session::{derive_seed, progress};
use super::{Config, Problems, RunFolder, Session};
use crate::checkpoint::Dtype;
use crate::interrupt;
use crate::model::{Purpose, Workspace, freeze};
use crate::tasks::Task;
use anyhow::{Context, Result};
use dust_kernels::Backend;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashMap;
use update::Updater;

/// The stage's log.
pub const METRICS: &str = "metrics.jsonl";
/// The trained model, as a Hugging Face folder.
pub const FINAL: &str = "model";

/// Trains on `groups.jsonl`; leaves `metrics.jsonl` and the folder `model`.
///
/// # Errors
/// What loading, sampling and the kernels report; an interrupt, after which the same call goes on.
pub fn train<B: Backend + Clone>(device: &B, config: &Config, run: &RunFolder) -> Result<()> {
    if run.has(FINAL) {
        return Ok(());
    }
    let groups: Vec<Group> = run.read_lines(GROUPS, "group")?;
    let hash = run.hash(GROUPS)?;
    let problems = Problems::load(config)?;
    let tasks = problems.by_id();
    let mut session = Session::load(device.clone(), config, None, true)?;
    // The reference is the model as it was loaded, before a checkpoint is read.
    let reference = freeze(device, &session.model)?;
    let mut optimizer = Optimizer::new(device, &session.model)?;
    let done = state::load(device, run, &mut session.model, &mut optimizer, &hash)?;
    let mut log = run.resume::<StepMetrics>(METRICS)?;
    if log.lines.len() > done {
        // Steps after the checkpoint are made again, to the same bits.
        let kept = log.lines[..done].to_vec();
        drop(log);
        run.write_lines(&format!("{METRICS}.partial"), &kept)?;
        log = run.resume(METRICS)?;
    }

    let purpose = Purpose::Train {
        recompute: config.model.recompute,
    };
    let rows = config.model.micro_batch_tokens;
    let mut updater = Updater {
        workspace: Workspace::new(device, &session.model.config, rows, purpose)?,
        reference,
    };
    let mut engine = None;
    let bar = progress("train", config.train.steps as u64);
    bar.set_position(done as u64);
    for step in done..config.train.steps {
        let chosen = choose(&groups, config, step);
        let rolled = match rollout::roll(&session, config, &mut engine, step, &chosen, &tasks) {
            // The weights are those after the last whole step: nothing but this rollout is lost.
            Err(error) if interrupt::requested() => {
                state::save(device, run, &session.model, &optimizer, step, &hash)?;
                return Err(error);
            }
            other => other?,
        };
        // Updates are not broken off: an interrupt waits for the end of the step.
        let line = updater.update(&mut session, &mut optimizer, config, step, rolled)?;
        bar.inc(1);
        bar.set_message(format!(
            "reward {:+.3}  invalid {:.0}%  |g| {:.2}",
            line.reward_mean,
            100.0 * line.invalid,
            line.grad_norm
        ));
        log.push(line)?;
        let last = step + 1 == config.train.steps;
        if last || interrupt::requested() || (step + 1) % config.train.checkpoint_every == 0 {
            state::save(device, run, &session.model, &optimizer, step + 1, &hash)?;
        }
        interrupt::check()?;
    }
    bar.finish_and_clear();
    session
        .model
        .save(device, &run.file(FINAL), Dtype::F32, &session.text_files)?;
    run.finish(METRICS, log, |m| m.step)?;
    // The folder holds the weights now; the moments have no further use.
    std::fs::remove_file(run.file(state::STATE))
        .with_context(|| format!("{}: cannot be removed", run.file(state::STATE).display()))?;
    eprintln!(
        "train: {} steps, model in {}",
        config.train.steps,
        run.file(FINAL).display()
    );
    Ok(())
}

/// The groups of a step: each pass over all groups has a random order of its own.
fn choose<'a>(groups: &'a [Group], config: &Config, step: usize) -> Vec<&'a Group> {
    let n = groups.len();
    let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
    (step * config.train.prompts..(step + 1) * config.train.prompts)
        .map(|at| {
            let pass = at / n;
            if order.0 != pass {
                let seed = derive_seed(config.seed, &["order", &pass.to_string()]);
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut list: Vec<usize> = (0..n).collect();
                for i in (1..n).rev() {
                    let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
                    list.swap(i, j as usize);
                }
                order = (pass, list);
            }
            &groups[order.1[at % n]]
        })
        .collect()
}

type Tasks<'a> = HashMap<&'a str, &'a Task>;
