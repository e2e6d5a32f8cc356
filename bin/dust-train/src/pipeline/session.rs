//! What every stage that runs the model shares: the device, the model, its tokenizer and template.

use super::Config;
use super::progress::Progress;
use crate::checkpoint::Checkpoint;
use crate::interrupt;
use crate::model::{Model, Storage};
use crate::rollout::{Completion, Engine, EngineConfig, Event, Request, SamplingSettings, Stops};
use crate::tasks::extract::Rule;
use crate::text::{ChatOptions, ChatTemplate, Message, Role, Tokenizer, encode_chat};
use anyhow::{Context, Result};
use dust_kernels::Backend;
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;
use std::time::{Duration, UNIX_EPOCH};

/// A model that is ready to talk.
pub struct Session<B: Backend> {
    /// Where it runs.
    pub device: B,
    /// The model.
    pub model: Model<B>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its files that are not weights, for checkpoints.
    pub text_files: Vec<(String, Vec<u8>)>,
    template: ChatTemplate,
    thinking: Option<bool>,
    batch: usize,
}

impl<B: Backend> Session<B> {
    /// Loads the model of `config`, or `checkpoint` in its place; `train` keeps master weights.
    ///
    /// # Errors
    /// What loading reports.
    pub fn load(
        device: B,
        config: &Config,
        checkpoint: Option<&std::path::Path>,
        train: bool,
    ) -> Result<Self> {
        let path = match checkpoint {
            Some(path) => path
                .to_str()
                .with_context(|| format!("{}: the path is not UTF-8", path.display()))?,
            None => &config.model.path,
        };
        let checkpoint = Checkpoint::open(path)?;
        let tokenizer = checkpoint.tokenizer()?;
        Ok(Self {
            model: Model::load(
                &device,
                &checkpoint,
                Storage::on::<B>(config.model.storage)?,
                train,
            )?,
            template: checkpoint.chat_template(&tokenizer)?,
            text_files: checkpoint.text_files()?,
            thinking: config.model.thinking,
            batch: config.model.batch,
            tokenizer,
            device,
        })
    }

    /// The tokens of a conversation whose answer is open and begins with `prefix`.
    ///
    /// # Errors
    /// What the template reports.
    pub fn encode(&self, messages: &[Message], prefix: &str) -> Result<Vec<u32>> {
        let options = self.chat_options();
        let mut tokens = encode_chat(&self.template, &self.tokenizer, messages, &options)?;
        if !prefix.is_empty() {
            tokens.extend(self.tokenizer.encode(prefix, false)?);
        }
        Ok(tokens)
    }

    /// Whether the template leaves the model inside of an open thought.
    ///
    /// # Errors
    /// What the template reports.
    pub fn opens_thought(&self) -> Result<bool> {
        let tokens = self.encode(&[Message::new(Role::User, "?")], "")?;
        Ok(self
            .tokenizer
            .decode(&tokens)
            .trim_end()
            .ends_with("<think>"))
    }

    /// The text of an answer, without its stop token.
    pub fn text(&self, tokens: &[u32]) -> String {
        let end = match tokens.last() {
            Some(last) if self.stop_tokens().contains(last) => tokens.len() - 1,
            _ => tokens.len(),
        };
        self.tokenizer.decode(&tokens[..end])
    }

    /// The token that ends the model's turn: the last stop token of a conversation that ends with an
    /// answer. A model may have several, of which the template uses one.
    ///
    /// # Errors
    /// What the template reports.
    pub fn end_of_turn(&self) -> Result<Option<u32>> {
        let messages = [
            Message::new(Role::User, "?"),
            Message::new(Role::Assistant, "!"),
        ];
        let options = ChatOptions {
            add_generation_prompt: false,
            ..self.chat_options()
        };
        let tokens = encode_chat(&self.template, &self.tokenizer, &messages, &options)?;
        let stops = self.stop_tokens();
        let last = tokens.iter().rev().find(|token| stops.contains(token));
        Ok(last.or(stops.first()).copied())
    }

    fn chat_options(&self) -> ChatOptions {
        ChatOptions {
            add_generation_prompt: true,
            enable_thinking: self.thinking,
            // One day for all runs, so that a prompt does not depend on when it was made.
            now: UNIX_EPOCH + Duration::from_secs(1_750_000_000),
        }
    }

    fn stop_tokens(&self) -> &[u32] {
        self.tokenizer.eos_ids()
    }

    /// An engine with room for `model.batch` samples of these requests.
    ///
    /// # Errors
    /// Out of memory.
    pub fn engine(&self, longest_prompt: usize, max_tokens: usize) -> Result<Engine<B>> {
        let longest = (longest_prompt + max_tokens).min(self.model.max_positions());
        Engine::new(
            &self.device,
            &self.model,
            EngineConfig::for_length(self.batch, longest),
        )
    }

    /// What ends an answer that holds a program. After the first block `sample.extract = "first"`
    /// reads nothing; only a model that can reason may still say that all of it was a thought.
    pub fn program_end(&self, config: &Config) -> Until<'static> {
        let reasons = self.tokenizer.id("</think>").is_some();
        if config.sample.extract == Rule::First && !reasons {
            Until::Block
        } else {
            Until::Strings(&[])
        }
    }

    /// Draws all samples under a progress bar. `on_done` hears of each; an interrupt breaks off.
    ///
    /// # Errors
    /// What the engine and `on_done` report.
    pub fn generate(
        &self,
        engine: &mut Engine<B>,
        what: &str,
        requests: &[Request],
        settings: &SamplingSettings,
        until: Until<'_>,
        mut on_done: impl FnMut(Completion) -> Result<()>,
    ) -> Result<()> {
        let total: u64 = requests.iter().map(|r| u64::from(r.samples)).sum();
        let bar = Progress::new(what, total);
        let (mut tokens, start) = (0u64, std::time::Instant::now());
        let mut failed = None;
        let stops = Stops {
            tokens: self.stop_tokens(),
            strings: match until {
                Until::Strings(strings) => strings,
                Until::Block => &[],
            },
            block: matches!(until, Until::Block),
            tokenizer: &self.tokenizer,
        };
        engine.generate(
            &self.device,
            &self.model,
            requests,
            settings,
            stops,
            &mut |event| {
                if interrupt::requested() {
                    return ControlFlow::Break(());
                }
                match event {
                    Event::Token(..) => tokens += 1,
                    Event::Done(completion) => {
                        let rate = tokens as f64 / start.elapsed().as_secs_f64();
                        bar.advance(1, || format!("{rate:.0} tokens/s"));
                        if let Err(error) = on_done(completion) {
                            failed = Some(error);
                            return ControlFlow::Break(());
                        }
                    }
                }
                ControlFlow::Continue(())
            },
        )?;
        bar.finish();
        match failed {
            Some(error) => Err(error),
            None => Ok(interrupt::check()?),
        }
    }
}

/// What ends an answer, besides the model's stop tokens and the longest length.
#[derive(Debug, Clone, Copy)]
pub enum Until<'a> {
    /// One of these strings.
    Strings(&'a [String]),
    /// The end of the first fenced block.
    Block,
}

/// An engine that is made once, and again only where prompts or answers outgrow it.
pub(super) struct KeptEngine<B: Backend>(Option<(usize, Engine<B>)>);

impl<B: Backend> KeptEngine<B> {
    pub fn new() -> Self {
        Self(None)
    }

    /// The engine, with room for such prompts and answers.
    pub fn with_room(
        &mut self,
        session: &Session<B>,
        longest_prompt: usize,
        max_tokens: usize,
    ) -> Result<&mut Engine<B>> {
        let kept = match self.0.take() {
            Some((room, engine)) if room >= longest_prompt + max_tokens => (room, engine),
            old => {
                // The old one goes first, so that the two never stand side by side.
                drop(old);
                let longest = longest_prompt.next_multiple_of(256);
                (longest + max_tokens, session.engine(longest, max_tokens)?)
            }
        };
        Ok(&mut self.0.insert(kept).1)
    }
}

/// A seed for one purpose of a run: equal parts give equal seeds, others unrelated ones.
pub fn derive_seed(seed: u64, parts: &[&str]) -> u64 {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finalize();
    digest[..8].iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Dtype, save};
    use crate::pipeline::ModelSettings;
    use dust_kernels::Cpu;
    use std::borrow::Cow;

    #[test]
    fn an_answer_to_imitate_ends_as_the_template_ends_a_turn() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/formats/tiny.gguf");
        let tiny = Checkpoint::open(file).unwrap();
        let end = tiny.tokenizer().unwrap().id("<|im_end|>").unwrap();
        // As Llama 3 has it: the end of a text before the end of a turn.
        let mut model = tiny.config().clone();
        model.eos = vec![end - 1, end];
        let files = tiny.text_files().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        save(&folder, &model, Dtype::F32, &files, |name| {
            Ok(Cow::Owned(tiny.tensor(name)?.data))
        })
        .unwrap();
        let config = Config {
            model: ModelSettings {
                path: folder.to_str().unwrap().to_owned(),
                ..ModelSettings::default()
            },
            ..Config::default()
        };
        let session = Session::load(Cpu::new(), &config, None, false).unwrap();
        assert_eq!(session.tokenizer.eos_ids()[0], end - 1);
        assert_eq!(session.end_of_turn().unwrap(), Some(end));
    }
}
