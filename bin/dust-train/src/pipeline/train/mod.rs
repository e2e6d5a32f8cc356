//! Stage 4: GRPO trains the model to rank its own candidates; or, in other arms, to write programs.
//!
//! A step draws G answers to each of its prompts from the current policy, rewards them, turns the
//! rewards into advantages inside of each group of answers, and goes over the answers `epochs` times
//! in mini-batches. All random numbers are keyed by (seed, step, group), so a step depends on nothing but
//! the state after the step before: a run that was killed goes on to the same bits.

mod generation;
mod metrics;
mod optimizer;
mod ranking;
mod rollout;
mod state;
mod update;

pub use metrics::StepMetrics;
pub(super) use metrics::worst;
pub use optimizer::Optimizer;
pub use rollout::Lesson;
pub(super) use state::STATE;

use super::group::{GROUPS, Group, read_groups};
use super::progress::Progress;
use super::session::derive_seed;
use super::stage::Stage;
use super::{Arm, Config, Manifest, Partial, Problems, RunFolder, Session, bad_input};
use crate::checkpoint::Dtype;
use crate::interrupt;
use crate::model::freeze;
use crate::shuffle::shuffle;
use crate::tasks::Task;
use anyhow::Result;
use dust_kernels::Backend;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rollout::{Rolled, Roller};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use update::Updater;

/// The stage's log.
pub const METRICS: &str = "metrics.jsonl";
/// The trained model, as a Hugging Face folder.
pub const FINAL: &str = "model";

/// Longest time between two checkpoints, whatever `train.checkpoint_every` says: what a kill costs.
const CHECKPOINT_PAUSE: Duration = Duration::from_secs(600);

/// Trains on `groups.jsonl`; leaves `metrics.jsonl` and the folder `model`.
///
/// # Errors
/// What loading, sampling and the kernels report; an interrupt, after which the same call goes on.
pub fn train<B: Backend + Clone>(device: &B, config: &Config, run: &RunFolder) -> Result<()> {
    if run.has(FINAL) {
        // A kill may have come between the model and this.
        return state::remove(run);
    }
    Stage::Train.begin(run, config)?;
    let problems = Problems::load(config)?;
    let groups = read_groups(config, run, &problems)?;
    let hash = run.hash(GROUPS)?;
    Manifest::update(run, |m| {
        m.device = device.name();
        m.groups_sha256 = Some(hash.clone());
    })?;
    let tasks = problems.train_by_id();
    // All arms learn from the same problems, those that have a group.
    let grouped: HashSet<&str> = groups.iter().map(|g| g.problem.as_str()).collect();
    let grouped: Vec<&Task> = problems
        .train
        .iter()
        .filter(|t| grouped.contains(t.id.as_str()))
        .collect();
    // What follows draws by the seed of training.
    let config = &Config {
        seed: config.train.seed.unwrap_or(config.seed),
        ..config.clone()
    };
    let mut session = Session::load(device.clone(), config, None, true)?;
    // The reference is the model as it was loaded, before a checkpoint is read.
    let uses_kl = config.train.kl_coef > 0.0 && config.train.sft_steps < config.train.steps;
    let reference = match uses_kl {
        true => Some(freeze(device, &session.model)?),
        false => None,
    };
    let mut optimizer = Optimizer::new(device, &session.model)?;
    let done = state::load(device, run, &mut session.model, &mut optimizer, &hash)?;
    if done > config.train.steps {
        bad_input!(
            "{}: is after {done} steps, train.steps is {}; raise it, or remove the file to train from \
             the start",
            run.file(STATE).display(),
            config.train.steps
        );
    }
    let mut log = resume_log(run, done)?;

    let mut updater = Updater {
        workspace: None,
        reference,
    };
    let mut roller = Roller::new(run);
    let bar = Progress::new("train", config.train.steps as u64);
    bar.start_at(done as u64);
    let (mut saved, mut saved_at) = (done, Instant::now());
    for step in done..config.train.steps {
        if step > 0 && step == config.train.sft_steps {
            // What Adam learned about imitation says nothing about what follows.
            optimizer.reset(device)?;
        }
        let all = Material {
            groups: &groups,
            problems: &grouped,
            tasks: &tasks,
        };
        let rolled = match roll(&session, config, &mut roller, step, &all) {
            Ok(rolled) => rolled,
            Err(error) => {
                // The weights are those after the last whole step: nothing but this rollout is lost.
                if step > saved
                    && let Err(second) =
                        state::save(device, run, &session.model, &optimizer, step, &hash)
                {
                    eprintln!("train: the steps since the last checkpoint are lost: {second:#}");
                }
                return Err(error);
            }
        };
        // Updates are not broken off: an interrupt waits for the end of the step.
        let line = updater.update(&mut session, &mut optimizer, config, step, rolled)?;
        bar.advance(1, || {
            format!(
                "reward {:+.3}  invalid {:.0}%  |g| {:.2}",
                line.reward_mean,
                100.0 * line.invalid,
                line.grad_norm
            )
        });
        if line.groups < config.train.prompts {
            eprintln!(
                "train: step {}: {} groups to learn from, of {} drawn; train.prompts asks for {}",
                line.step, line.groups, line.groups_drawn, config.train.prompts
            );
        }
        if line.skipped_updates > 0 {
            eprintln!(
                "train: step {}: {} of {} updates were skipped, since a gradient was not finite",
                line.step, line.skipped_updates, line.updates
            );
        }
        log.push(line)?;
        let last = step + 1 == config.train.steps;
        if last
            || interrupt::requested()
            || (step + 1) % config.train.checkpoint_every == 0
            || saved_at.elapsed() >= CHECKPOINT_PAUSE
        {
            state::save(device, run, &session.model, &optimizer, step + 1, &hash)?;
            (saved, saved_at) = (step + 1, Instant::now());
        }
        interrupt::check()?;
    }
    bar.finish();
    // The folder comes last: where it is, training is done.
    run.finish(METRICS, log, |m| m.step)?;
    session
        .model
        .save(device, &run.file(FINAL), Dtype::F32, &session.text_files)?;
    // It holds the weights now; the moments have no further use.
    state::remove(run)?;
    eprintln!(
        "train: {} steps, model in {}",
        config.train.steps,
        run.file(FINAL).display()
    );
    Ok(())
}

/// The log up to the checkpoint, which is after `done` steps. Later ones are made again, to the same
/// bits.
fn resume_log(run: &RunFolder, done: usize) -> Result<Partial<StepMetrics>> {
    if run.has(METRICS) {
        // A kill came between the end of the log and the model.
        run.reopen(METRICS)?;
    }
    let log = run.resume::<StepMetrics>(METRICS)?;
    if log.lines.len() <= done {
        return Ok(log);
    }
    let kept = log.lines[..done].to_vec();
    drop(log);
    run.write_lines(&format!("{METRICS}.partial"), &kept)?;
    run.resume(METRICS)
}

/// What steps choose from.
struct Material<'a> {
    groups: &'a [Group],
    problems: &'a [&'a Task],
    tasks: &'a Tasks<'a>,
}

/// Times that a step draws for further prompts where too few teach something.
const REFILLS: usize = 8;

/// The rollout of a step. With `train.refill`, groups whose answers all got the same reward make
/// room for others (dynamic sampling: DAPO, arXiv 2503.14476).
fn roll<B: Backend>(
    session: &Session<B>,
    config: &Config,
    roller: &mut Roller<B>,
    step: usize,
    all: &Material<'_>,
) -> Result<Rolled> {
    let start = Instant::now();
    let imitates = step < config.train.sft_steps;
    let refill = config.train.refill && !imitates;
    // Fresh programs give as many mixed groups as they give.
    let fresh = config.train.arm == Arm::OnPolicyRanking && !imitates;
    let rounds = if refill || fresh { REFILLS } else { 1 };
    let mut rolled = Rolled::default();
    for round in 0..rounds {
        let wanted = config.train.prompts - rolled.groups.len();
        let number = step * rounds + round;
        let more = draw(session, config, roller, step, number, wanted, all)?;
        rolled.add(more);
        if refill {
            rolled.retain(|_, group| !group.zero_variance());
            rolled.retain(|i, _| i < config.train.prompts);
        }
        if rolled.groups.len() >= config.train.prompts {
            break;
        }
    }
    if fresh && rolled.drawn().next().is_none() {
        bad_input!(
            "no mixed group among the programs for {} problems: choose problems nearer to the \
             model's level",
            REFILLS * config.train.prompts
        );
    }
    rolled.seconds = start.elapsed().as_secs_f64();
    Ok(rolled)
}

/// Answers for the prompts number `number`, in the lesson of step `step`.
fn draw<B: Backend>(
    session: &Session<B>,
    config: &Config,
    roller: &mut Roller<B>,
    step: usize,
    number: usize,
    wanted: usize,
    all: &Material<'_>,
) -> Result<Rolled> {
    let prompts = config.train.prompts;
    let groups = || cycle(all.groups, config, "order", number, prompts);
    if step < config.train.sft_steps {
        return ranking::imitate(session, config, number, &groups(), all.tasks);
    }
    let writes = match config.train.arm {
        Arm::Ranking | Arm::OnPolicyRanking => false,
        Arm::Generation => true,
        Arm::Iterative => {
            let turn = (step - config.train.sft_steps) / config.train.alternate;
            turn.is_multiple_of(2)
        }
    };
    if writes {
        let tasks = cycle(all.problems, config, "problems", number, prompts);
        let tasks: Vec<&Task> = tasks.into_iter().copied().collect();
        return generation::write(session, config, roller, number, &tasks);
    }
    if config.train.arm == Arm::OnPolicyRanking {
        let groups = ranking::fresh_groups(session, config, roller, number, wanted, all.problems)?;
        let groups: Vec<&Group> = groups.iter().collect();
        return ranking::judge(session, config, roller, number, &groups, all.tasks);
    }
    ranking::judge(session, config, roller, number, &groups(), all.tasks)
}

/// The items of a step, `count` of them: each pass over all items has a random order of its own.
fn cycle<'a, T>(
    items: &'a [T],
    config: &Config,
    what: &str,
    step: usize,
    count: usize,
) -> Vec<&'a T> {
    let n = items.len();
    let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
    (step * count..(step + 1) * count)
        .map(|at| {
            let pass = at / n;
            if order.0 != pass {
                let seed = derive_seed(config.seed, &[what, &pass.to_string()]);
                let mut list: Vec<usize> = (0..n).collect();
                shuffle(&mut list, &mut ChaCha8Rng::seed_from_u64(seed));
                order = (pass, list);
            }
            &items[order.1[at % n]]
        })
        .collect()
}

type Tasks<'a> = HashMap<&'a str, &'a Task>;
