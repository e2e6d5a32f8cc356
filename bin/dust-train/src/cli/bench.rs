//! `bench`: how fast a model runs and trains on this machine.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use dust_kernels::Backend;
use dust_kernels::adamw::AdamWConfig;
use serde::Serialize;

use super::InputError;
use super::model::{Loaded, ModelArgs};
use crate::checkpoint::Checkpoint;
use crate::interrupt::{self, Interrupted};
use crate::model::{Batch, Model, Purpose, Storage, Workspace};
use crate::pipeline::train::Optimizer;
use crate::rollout::{Engine, EngineConfig, Event, Request, SamplingSettings, Stops};

/// Measure tokens per second: prefill, decode, training.
///
///   prefill      one forward pass over 512 tokens, the head on the last
///   decode B     B samples of different prompts in the rollout engine, context 96 to 160
///   train 4x512  forward, log-probabilities, backward, global norm and AdamW in f32
///
/// Each figure is the median of the rounds, after one round that does not count.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dust-train bench --model model.gguf --dtype bf16 --json")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Measurements of each figure.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// One line of JSON instead of a table.
    #[arg(long)]
    json: bool,

    /// Measure instead what sharing the prompt saves in training: one prompt of 512 tokens with 8
    /// answers of 64, against 8 whole sequences (layers recomputed in both).
    #[arg(long)]
    shared_prefix: bool,
}

const PREFILL: usize = 512;
const DECODE_PROMPT: usize = 96;
const DECODE_STEPS: usize = 64;
const TRAIN: (usize, usize) = (4, 512);
const GROUP: (usize, usize, usize) = (512, 8, 64);
/// The longest sequence among all of these.
const LONGEST: usize = GROUP.0 + GROUP.2;

/// Tokens per second.
#[derive(Serialize)]
struct Speeds {
    dtype: Storage,
    prefill_512: f64,
    decode_1: f64,
    decode_8: f64,
    decode_16: f64,
    train_4x512: f64,
}

/// Seconds of a training step.
#[derive(Serialize)]
struct SharedPrefix {
    shared_step_s: f64,
    unshared_step_s: f64,
    speedup: f64,
}

pub(super) fn run<B: Backend>(args: &Args, device: &B) -> Result<()> {
    let rounds = usize::from(args.rounds);
    let mut out = io::stdout();
    let checkpoint = Checkpoint::open(&args.model.model)?;
    let context = checkpoint.config().max_positions;
    if context < LONGEST {
        let problem = format!("the model's context is {context}, the figures need {LONGEST}");
        let remedy = "measure a model with a longer context";
        return Err(InputError::new(&args.model.model, "context", problem, remedy).into());
    }
    if args.shared_prefix {
        let found = shared_prefix(device, &checkpoint, rounds)?;
        return if args.json {
            print_json(&found)
        } else {
            writeln!(
                out,
                "one training step, {} answers of {} tokens to a prompt of {}:",
                GROUP.1, GROUP.2, GROUP.0
            )?;
            writeln!(out, "  prompt shared    {:8.2} s", found.shared_step_s)?;
            writeln!(out, "  prompt repeated  {:8.2} s", found.unshared_step_s)?;
            writeln!(out, "  speed-up         {:8.2}", found.speedup)?;
            Ok(())
        };
    }

    let dtype = Storage::on::<B>(args.model.dtype)?;
    let loaded = args.model.load(device)?;
    let prefill_512 = prefill(device, &loaded.model, rounds)?;
    let [decode_1, decode_8, decode_16] = [
        decode(device, &loaded, rounds, 1)?,
        decode(device, &loaded, rounds, 8)?,
        decode(device, &loaded, rounds, 16)?,
    ];
    drop(loaded.model);
    let train_4x512 = train(device, &checkpoint, rounds)?;
    let speeds = Speeds {
        dtype,
        prefill_512,
        decode_1,
        decode_8,
        decode_16,
        train_4x512,
    };
    if args.json {
        return print_json(&speeds);
    }
    let dtype = serde_json::to_value(dtype)?;
    writeln!(out, "{} on {}, tokens/s", args.model.model, device.name())?;
    for (name, dtype, value) in [
        ("prefill 512", dtype.as_str(), prefill_512),
        ("decode 1", dtype.as_str(), decode_1),
        ("decode 8", dtype.as_str(), decode_8),
        ("decode 16", dtype.as_str(), decode_16),
        ("train 4x512", Some("f32"), train_4x512),
    ] {
        writeln!(
            out,
            "  {name:<12} {:<5} {value:9.1}",
            dtype.unwrap_or_default()
        )?;
    }
    Ok(())
}

fn print_json(value: &impl Serialize) -> Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string(value)?)?;
    Ok(())
}

fn prefill<B: Backend>(device: &B, model: &Model<B>, rounds: usize) -> Result<f64> {
    let mut workspace = Workspace::new(device, &model.config, PREFILL, Purpose::Forward)?;
    let mut batch = Batch::new();
    batch.push_group(&tokens(PREFILL, 0, model), &[[1]]);
    let time = median(rounds, || {
        let start = Instant::now();
        model.forward(device, &mut workspace, &batch)?;
        model.logprobs(device, &mut workspace, &batch, 1.0)?;
        Ok(start.elapsed())
    })?;
    Ok(PREFILL as f64 / time)
}

fn decode<B: Backend>(
    device: &B,
    loaded: &Loaded<B>,
    rounds: usize,
    samples: usize,
) -> Result<f64> {
    let model = &loaded.model;
    // Prompts start one step after the other; the clock runs while all samples do.
    let settings = SamplingSettings {
        max_tokens: DECODE_STEPS + 2 * samples,
        ..SamplingSettings::default()
    };
    let config = EngineConfig::for_length(samples, DECODE_PROMPT + settings.max_tokens);
    let mut engine = Engine::new(device, model, config)?;
    let requests: Vec<Request> = (0..samples)
        .map(|i| Request {
            prompt: tokens(DECODE_PROMPT, i, model),
            samples: 1,
            seed: i as u64,
        })
        .collect();
    let stops = Stops {
        tokens: &[],
        strings: &[],
        block: false,
        tokenizer: &loaded.tokenizer,
    };
    let time = median(rounds, || {
        let mut produced = vec![0usize; samples];
        let (mut started, mut counted, mut elapsed) = (None::<Instant>, 0, Duration::ZERO);
        engine.generate(device, model, &requests, &settings, stops, &mut |event| {
            let Event::Token(request, ..) = event else {
                // One sample less is another batch size.
                return ControlFlow::Break(());
            };
            produced[request] += 1;
            match started {
                Some(start) => {
                    counted += 1;
                    // Whole steps only.
                    if counted % samples == 0 {
                        elapsed = start.elapsed();
                    }
                }
                // A step reports its samples in the order of their prompts.
                None if request + 1 == samples && produced.iter().all(|&n| n >= 2) => {
                    started = Some(Instant::now());
                }
                None => {}
            }
            if counted == samples * DECODE_STEPS || interrupt::requested() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        let steps = (counted / samples).max(1);
        Ok(elapsed / steps as u32)
    })?;
    Ok(samples as f64 / time)
}

fn train<B: Backend>(device: &B, checkpoint: &Checkpoint, rounds: usize) -> Result<f64> {
    let mut trainer = Trainer::new(device, checkpoint, TRAIN.0 * TRAIN.1, false)?;
    let mut batch = Batch::new();
    for i in 0..TRAIN.0 {
        batch.push_text(&tokens(TRAIN.1 + 1, i, &trainer.model));
    }
    let time = median(rounds, || trainer.step(device, &batch))?;
    Ok((TRAIN.0 * TRAIN.1) as f64 / time)
}

fn shared_prefix<B: Backend>(
    device: &B,
    checkpoint: &Checkpoint,
    rounds: usize,
) -> Result<SharedPrefix> {
    let (prompt, answers, answer) = GROUP;
    let mut trainer = Trainer::new(device, checkpoint, answers * (prompt + answer), true)?;
    let prompt = tokens(prompt, 0, &trainer.model);
    let answers: Vec<_> = (1..=answers)
        .map(|i| tokens(answer, i, &trainer.model))
        .collect();
    let (mut shared, mut unshared) = (Batch::new(), Batch::new());
    shared.push_group(&prompt, &answers);
    for answer in &answers {
        unshared.push_group(&prompt, &[answer]);
    }
    let shared_step_s = median(rounds, || trainer.step(device, &shared))?;
    let unshared_step_s = median(rounds, || trainer.step(device, &unshared))?;
    Ok(SharedPrefix {
        shared_step_s,
        unshared_step_s,
        speedup: unshared_step_s / shared_step_s,
    })
}

/// What a training step needs.
struct Trainer<B: Backend> {
    model: Model<B>,
    workspace: Workspace<B>,
    optimizer: Optimizer<B>,
}

impl<B: Backend> Trainer<B> {
    fn new(device: &B, checkpoint: &Checkpoint, rows: usize, recompute: bool) -> Result<Self> {
        let model = Model::load(device, checkpoint, Storage::on::<B>(None)?, true)?;
        Ok(Self {
            workspace: Workspace::new(device, &model.config, rows, Purpose::Train { recompute })?,
            optimizer: Optimizer::new(device, &model)?,
            model,
        })
    }

    /// One step that raises the mean log-probability of the batch's targets.
    fn step(&mut self, device: &B, batch: &Batch) -> Result<Duration> {
        let start = Instant::now();
        self.model.forward(device, &mut self.workspace, batch)?;
        self.model
            .logprobs(device, &mut self.workspace, batch, 1.0)?;
        let targets = batch.targets.len();
        let slopes = vec![-1.0 / targets as f32; targets];
        device.write(&mut self.workspace.head.dlogprob, 0, &slopes)?;
        let (workspace, grads) = (&mut self.workspace, &mut self.optimizer.grads);
        self.model.backward(device, workspace, batch, grads)?;
        // So small a rate leaves the weights as they are, and the work with them.
        let config = AdamWConfig {
            learning_rate: 1e-9,
            ..AdamWConfig::default()
        };
        self.optimizer.step(device, &mut self.model, config, 1.0)?;
        Ok(start.elapsed())
    }
}

/// The median of `rounds` durations in seconds, after one that does not count.
fn median(rounds: usize, mut round: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let mut times = Vec::with_capacity(rounds);
    for i in 0..=rounds {
        let time = round()?;
        if interrupt::requested() {
            return Err(Interrupted.into());
        }
        if i > 0 {
            times.push(time.as_secs_f64());
        }
    }
    times.sort_unstable_by(f64::total_cmp);
    let middle = times.len() / 2;
    Ok(match times.len() % 2 {
        0 => (times[middle - 1] + times[middle]) / 2.0,
        _ => times[middle],
    })
}

/// Different tokens for every `stream`, the same in every run.
fn tokens<B: Backend>(len: usize, stream: usize, model: &Model<B>) -> Vec<u32> {
    let vocab = model.config.vocab_size as u64;
    let mut state = stream as u64 + 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab) as u32
        })
        .collect()
}
