//! A model with what belongs to it, and the arguments that several commands share.

use std::time::Instant;

use anyhow::Result;
use clap::ValueEnum;
use dust_kernels::Backend;

use super::InputError;
use crate::checkpoint::Checkpoint;
use crate::model::{Model, Storage};
use crate::rollout::SamplingSettings;
use crate::text::{ChatOptions, Message, Tokenizer, encode_chat};

/// Which model, and how its matrices are stored.
#[derive(clap::Args)]
pub(super) struct ModelArgs {
    /// Hugging Face folder, .gguf file, or ORG/NAME on the model hub.
    #[arg(long, value_name = "MODEL")]
    pub model: String,

    /// How matrices are stored; sums are f32 in both cases [default: f32 on the CPU, bf16 on a GPU].
    #[arg(long, value_enum)]
    pub dtype: Option<Storage>,
}

/// A model that is ready to run.
pub(super) struct Loaded<B: Backend> {
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    pub model: Model<B>,
}

impl ModelArgs {
    /// Opens the checkpoint and puts it onto the device.
    pub fn load<B: Backend>(&self, device: &B) -> Result<Loaded<B>> {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(&self.model)?;
        let tokenizer = checkpoint.tokenizer()?;
        let model = Model::load(device, &checkpoint, Storage::on::<B>(self.dtype)?, false)?;
        tracing::info!(
            "{}: {} with {:.1} million parameters on {}, loaded in {:.1} s",
            self.model,
            checkpoint.config().architecture.name(),
            model.parameter_count() as f64 / 1e6,
            device.name(),
            start.elapsed().as_secs_f64()
        );
        Ok(Loaded {
            checkpoint,
            tokenizer,
            model,
        })
    }
}

impl<B: Backend> Loaded<B> {
    /// The prompt for a conversation, by the model's own template.
    pub fn chat(&self, messages: &[Message], thinking: Option<Thinking>) -> Result<Vec<u32>> {
        let template = self.checkpoint.chat_template(&self.tokenizer)?;
        let options = ChatOptions {
            enable_thinking: thinking.map(|t| t == Thinking::On),
            ..ChatOptions::default()
        };
        Ok(encode_chat(&template, &self.tokenizer, messages, &options)?)
    }

    /// Refuses a prompt that leaves no room for an answer.
    pub fn check_prompt(&self, place: &str, prompt: &[u32]) -> Result<()> {
        let (have, limit) = (prompt.len(), self.model.max_positions());
        if have == 0 {
            return Err(InputError::new(place, "text", "is empty", "give some text").into());
        }
        if have >= limit {
            let problem = format!("{have} tokens leave no room in the model's context of {limit}");
            return Err(InputError::new(place, "text", problem, "shorten it").into());
        }
        Ok(())
    }
}

/// Whether the model thinks before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Thinking {
    /// It does.
    On,
    /// It answers at once.
    Off,
}

/// How tokens are drawn.
#[derive(clap::Args)]
pub(super) struct SamplingArgs {
    /// Softmax temperature; 0 always takes the most probable token.
    #[arg(long, value_name = "T", default_value_t = 0.7, value_parser = non_negative)]
    pub temperature: f32,

    /// Keep the most probable tokens whose probabilities sum to P; 1 keeps all.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = nucleus)]
    pub top_p: f32,

    /// Keep the K most probable tokens; 0 keeps all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u32,

    /// Keep tokens at least P times as probable as the most probable one; 0 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    pub min_p: f32,

    /// Longest answer in tokens.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,

    /// Seed of the random numbers: the same seed gives the same answer.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// As the rollout engine takes them.
    pub fn settings(&self) -> SamplingSettings {
        SamplingSettings {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            max_tokens: self.max_tokens as usize,
        }
    }
}

fn number(text: &str, rule: &str, holds: impl Fn(f32) -> bool) -> Result<f32, String> {
    match text.parse() {
        Ok(value) if holds(value) => Ok(value),
        _ => Err(format!("it has to be {rule}")),
    }
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, "a number from 0 on", |x| x >= 0.0 && x.is_finite())
}

fn nucleus(text: &str) -> Result<f32, String> {
    number(text, "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

fn share(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 1", |x| (0.0..=1.0).contains(&x))
}
