//! Sampling many sequences at once: continuous batching over a paged key/value cache.
//!
//! A request is a prompt and a number of samples. The prompt runs through the model once; all of
//! its samples share its full pages and copy the last, partly filled one. A sample starts by running
//! the prompt's last token itself, so every sample is an ordinary decode sequence from its first
//! step. Pages for the longest possible answer are reserved when a sample starts, so a running
//! sample is never thrown out.
//!
//! A sample depends on its prompt, its seed and its number alone, never on what else is running:
//! the kernels are batch-invariant and the random numbers are counted by (seed, sample, position).

mod pages;
mod stop;

use crate::model::{Attend, Model, Paged, Purpose, Workspace};
use crate::text::Tokenizer;
use anyhow::{Result, bail, ensure};
use dust_kernels::{
    Backend,
    attention::{PAGE, PagedBatch, PagedSequence},
    sampling::RowSampling,
};
use pages::Pages;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::rc::Rc;
use stop::StopStrings;

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSettings {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass; 1 keeps all tokens.
    pub top_p: f32,
    /// Most probable tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Least probability relative to the most probable token's; 0 keeps all.
    pub min_p: f32,
    /// Longest answer in tokens.
    pub max_tokens: usize,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_tokens: 512,
        }
    }
}

/// A prompt and how many answers to draw.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens; at least one.
    pub prompt: Vec<u32>,
    /// How many answers.
    pub samples: u32,
    /// Key of the random numbers.
    pub seed: u64,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token, which is the last of the tokens.
    StopToken,
    /// A stop string, which the text contains, or the end of its first fenced block.
    StopString,
    /// `max_tokens`, or the model's longest context.
    Length,
}

/// A finished answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Index of its request.
    pub request: usize,
    /// Its number among the request's samples.
    pub sample: u32,
    /// Its tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the unfiltered softmax.
    pub logprobs: Vec<f32>,
    /// Mass that the filters kept at each token.
    pub kept: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// What [`Engine::generate`] tells as it goes.
#[derive(Debug)]
pub enum Event {
    /// One more token of a running sample: request, sample, token.
    Token(usize, u32, u32),
    /// A sample is finished.
    Done(Completion),
}

/// Sizes of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most samples that run at a time.
    pub max_batch: usize,
    /// Prompt tokens that are run beside them in one step.
    pub prefill_tokens: usize,
    /// Tokens that the key/value cache holds.
    pub cache_tokens: usize,
}

impl EngineConfig {
    /// Room for `max_batch` samples of at most `longest` tokens each, prompt included, and for the
    /// next prompt.
    pub fn for_length(max_batch: usize, longest: usize) -> Self {
        Self {
            max_batch,
            prefill_tokens: 256,
            cache_tokens: (max_batch + 1) * longest.next_multiple_of(PAGE),
        }
    }
}

/// What ends an answer besides its length.
#[derive(Clone, Copy)]
pub struct Stops<'a> {
    /// Tokens that end it.
    pub tokens: &'a [u32],
    /// Strings that end it, looked for in the decoded text.
    pub strings: &'a [String],
    /// Whether the end of the answer's first fenced block ends it.
    pub block: bool,
    /// What decodes the text.
    pub tokenizer: &'a Tokenizer,
}

/// A prompt in the cache, held until its last sample has started.
struct Prompt {
    request: usize,
    tokens: Rc<[u32]>,
    samples: u32,
    seed: u64,
    pages: Vec<u32>,
    /// Tokens that are in the cache; the last token never is.
    cached: usize,
    next_sample: u32,
}

impl Prompt {
    fn to_cache(&self) -> usize {
        self.tokens.len() - 1
    }
}

/// A running sample.
struct Running {
    request: usize,
    sample: u32,
    seed: u64,
    prompt: Rc<[u32]>,
    pages: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    kept: Vec<f32>,
    limit: usize,
}

impl Running {
    fn input(&self) -> u32 {
        // A prompt has at least one token, which `generate` checks.
        *self
            .tokens
            .last()
            .unwrap_or(&self.prompt[self.prompt.len() - 1])
    }

    fn position(&self) -> usize {
        self.prompt.len() - 1 + self.tokens.len()
    }
}

/// The rollout engine: its buffers serve many calls.
pub struct Engine<B: Backend> {
    config: EngineConfig,
    workspace: Workspace<B>,
    pages: Pages<B>,
    sequences: B::Buf<PagedSequence>,
    table: B::Buf<u32>,
    slots: B::Buf<u32>,
    logits: B::Buf<f32>,
    params: B::Buf<RowSampling>,
    tokens: B::Buf<u32>,
    logprobs: B::Buf<f32>,
    kept: B::Buf<f32>,
}

impl<B: Backend> Engine<B> {
    /// Buffers for models of the shape of `model`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &B, model: &Model<B>, config: EngineConfig) -> Result<Self> {
        ensure!(
            config.max_batch > 0 && config.prefill_tokens > 0,
            "an engine needs room for one sample and one prompt token at least"
        );
        let pages = config.cache_tokens.div_ceil(PAGE);
        let rows = config.max_batch + config.prefill_tokens;
        let batch = config.max_batch;
        Ok(Self {
            workspace: Workspace::new(device, &model.config, rows, Purpose::Forward)?,
            pages: Pages::new(device, model, pages)?,
            // One more than the samples: the prompt that is run beside them.
            sequences: device.zeros(batch + 1)?,
            // Shared pages stand in the table of every sample that uses them.
            table: device.zeros((batch + 1) * pages)?,
            slots: device.zeros(rows)?,
            logits: device.zeros(batch * model.config.vocab_size)?,
            params: device.zeros(batch)?,
            tokens: device.zeros(batch)?,
            logprobs: device.zeros(batch)?,
            kept: device.zeros(batch)?,
            config,
        })
    }

    /// Draws every sample of every request; `on_event` hears of each token and each finished answer,
    /// in the order of their completion, and may break off.
    ///
    /// # Errors
    /// An empty prompt, a prompt that leaves no room for an answer, a cache that is too small for
    /// one sample, logits that are not finite.
    pub fn generate(
        &mut self,
        device: &B,
        model: &Model<B>,
        requests: &[Request],
        settings: &SamplingSettings,
        stops: Stops<'_>,
        on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<()> {
        for (i, request) in requests.iter().enumerate() {
            ensure!(!request.prompt.is_empty(), "prompt {i} is empty");
            ensure!(
                request.prompt.len() < model.max_positions(),
                "prompt {i} has {} tokens, the model's context is {}",
                request.prompt.len(),
                model.max_positions()
            );
        }
        let mut run = Run {
            engine: self,
            device,
            model,
            settings,
            stops: StopStrings::new(stops),
            requests,
            next: 0,
            prompts: VecDeque::new(),
            running: Vec::new(),
            recorded: HashMap::new(),
        };
        let result = run.go(on_event);
        run.release_all();
        result
    }
}

/// What a step's launches depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    /// Rows of the pass.
    rows: usize,
    /// Sequences that they belong to.
    sequences: usize,
    /// How many of the rows, the first ones, draw a token.
    batch: usize,
    /// At least every sequence's rows.
    max_q_len: usize,
    /// At least every sequence's context.
    max_context: usize,
}

impl<B: Backend> Engine<B> {
    /// Runs the rows and draws, from device memory to device memory.
    fn compute(&mut self, device: &B, model: &Model<B>, shape: Shape) -> Result<()> {
        let paged = Paged {
            batch: PagedBatch {
                sequences: &self.sequences,
                count: shape.sequences,
                rows: shape.rows,
                max_q_len: shape.max_q_len,
                max_context: shape.max_context,
                pages: &self.table,
            },
            slots: &self.slots,
            cache: &mut self.pages.cache,
        };
        let attend = &mut Attend::Paged(paged);
        model.run(device, &mut self.workspace, shape.rows, attend)?;
        if shape.batch == 0 {
            return Ok(());
        }
        let head = model.head_shape(shape.batch);
        let hidden = self.workspace.hidden();
        device.logits(head, hidden, model.head(), &mut self.logits)?;
        device.sample(
            shape.batch,
            head.vocab,
            &self.logits,
            &self.params,
            &mut self.tokens,
            &mut self.logprobs,
            &mut self.kept,
        )?;
        Ok(())
    }
}

/// One call of [`Engine::generate`].
struct Run<'a, B: Backend> {
    engine: &'a mut Engine<B>,
    device: &'a B,
    model: &'a Model<B>,
    settings: &'a SamplingSettings,
    stops: StopStrings<'a>,
    requests: &'a [Request],
    /// The first request that has not been taken in.
    next: usize,
    /// Prompts in the cache or on their way into it; only the last may be unfinished.
    prompts: VecDeque<Prompt>,
    running: Vec<Running>,
    /// Shapes that have run, and their recordings on devices that record.
    recorded: HashMap<Shape, Option<B::Graph>>,
}

impl<B: Backend> Run<'_, B> {
    fn go(&mut self, on_event: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<()> {
        loop {
            self.admit()?;
            if self.running.is_empty() && self.prompts.is_empty() {
                return Ok(());
            }
            self.step()?;
            if self.finish(on_event).is_break() {
                return Ok(());
            }
        }
    }

    /// Starts samples and takes in prompts while there is room.
    fn admit(&mut self) -> Result<()> {
        while self.running.len() < self.engine.config.max_batch {
            let Some(prompt) = self.prompts.front() else {
                if !self.take_prompt() {
                    break;
                }
                continue;
            };
            if prompt.cached < prompt.to_cache() {
                break;
            }
            let started = self.start_sample()?;
            if !started && (!self.running.is_empty() || !self.put_back_prompt()) {
                break;
            }
        }
        // The next prompt is run beside the samples, so that it is ready when one ends.
        if self.prompts.len() < 2 {
            self.take_prompt();
        }
        let stuck = match self.prompts.front() {
            None => self.next < self.requests.len(),
            Some(prompt) => prompt.cached == prompt.to_cache(),
        };
        ensure!(
            !(stuck && self.running.is_empty()),
            "the key/value cache of {} tokens has no room for one prompt and its answer: \
             ask for a larger cache or shorter answers",
            self.engine.config.cache_tokens
        );
        Ok(())
    }

    /// Gives up a prompt that was taken in ahead: it may hold the pages that the first one's sample
    /// waits for.
    fn put_back_prompt(&mut self) -> bool {
        if self.prompts.len() < 2 {
            return false;
        }
        let Some(prompt) = self.prompts.pop_back() else {
            return false;
        };
        self.engine.pages.release(&prompt.pages);
        self.next = prompt.request;
        true
    }

    fn take_prompt(&mut self) -> bool {
        let Some(request) = self.requests.get(self.next) else {
            return false;
        };
        let index = self.next;
        if request.samples == 0 {
            self.next += 1;
            return true;
        }
        let pages = (request.prompt.len() - 1).div_ceil(PAGE);
        let Some(pages) = self.engine.pages.take(pages) else {
            return false;
        };
        self.next += 1;
        self.prompts.push_back(Prompt {
            request: index,
            tokens: request.prompt.as_slice().into(),
            samples: request.samples,
            seed: request.seed,
            pages,
            cached: 0,
            next_sample: 0,
        });
        true
    }

    /// Starts the next sample of the first prompt, if its pages are free.
    fn start_sample(&mut self) -> Result<bool> {
        let Some(prompt) = self.prompts.front_mut() else {
            return Ok(false);
        };
        let engine = &mut *self.engine;
        let context = self.model.max_positions() - prompt.tokens.len();
        let limit = self.settings.max_tokens.min(context).max(1);
        // The last token of an answer is never run, so it needs no place.
        let total = (prompt.to_cache() + limit).div_ceil(PAGE);
        let shared = prompt.to_cache() / PAGE;
        let Some(own) = engine.pages.take(total - shared) else {
            return Ok(false);
        };
        let partial = prompt.to_cache() % PAGE;
        if partial > 0 {
            let width = self.model.heads().kv_width();
            engine
                .pages
                .copy(self.device, prompt.pages[shared], own[0], partial, width)?;
        }
        engine.pages.share(&prompt.pages[..shared]);
        let mut pages = prompt.pages[..shared].to_vec();
        pages.extend(own);
        self.running.push(Running {
            request: prompt.request,
            sample: prompt.next_sample,
            seed: prompt.seed,
            prompt: prompt.tokens.clone(),
            pages,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            kept: Vec::new(),
            limit,
        });
        prompt.next_sample += 1;
        if prompt.next_sample == prompt.samples {
            engine.pages.release(&prompt.pages);
            self.prompts.pop_front();
        }
        Ok(true)
    }

    /// Runs one token of every sample and a piece of the next prompt, and draws.
    fn step(&mut self) -> Result<()> {
        let engine = &mut *self.engine;
        let device = self.device;
        let batch = self.running.len();
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        let (mut slots, mut table, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let mut add = |pages: &[u32], inputs: &[u32], from: usize| {
            let to = from + inputs.len();
            sequences.push(PagedSequence {
                q_start: tokens.len() as u32,
                q_len: inputs.len() as u32,
                context: to as u32,
                first_page: table.len() as u32,
            });
            table.extend_from_slice(&pages[..to.div_ceil(PAGE)]);
            tokens.extend_from_slice(inputs);
            positions.extend((from..to).map(|p| p as u32));
            slots.extend((from..to).map(|p| pages[p / PAGE] * PAGE as u32 + (p % PAGE) as u32));
        };
        for run in &self.running {
            add(&run.pages, &[run.input()], run.position());
        }
        if let Some(prompt) = self.prompts.iter_mut().find(|p| p.cached < p.to_cache()) {
            let to = (prompt.cached + engine.config.prefill_tokens).min(prompt.to_cache());
            add(
                &prompt.pages,
                &prompt.tokens[prompt.cached..to],
                prompt.cached,
            );
            prompt.cached = to;
        }
        let most = |of: fn(&PagedSequence) -> u32| sequences.iter().map(of).max().unwrap_or(0);
        let shape = Shape {
            rows: tokens.len(),
            sequences: sequences.len(),
            batch,
            max_q_len: most(|s| s.q_len) as usize,
            // Rounded up, so that few recordings serve all lengths.
            max_context: PAGE
                * (most(|s| s.context) as usize)
                    .div_ceil(PAGE)
                    .next_power_of_two(),
        };
        let params: Vec<RowSampling> = self
            .running
            .iter()
            .map(|run| RowSampling {
                seed: run.seed,
                sequence: run.sample,
                position: run.position() as u32 + 1,
                temperature: self.settings.temperature,
                top_p: self.settings.top_p,
                min_p: self.settings.min_p,
                top_k: self.settings.top_k,
            })
            .collect();
        self.model
            .set_rows(device, &mut engine.workspace, &tokens, &positions)?;
        device.write(&mut engine.sequences, 0, &sequences)?;
        device.write(&mut engine.table, 0, &table)?;
        device.write(&mut engine.slots, 0, &slots)?;
        device.write(&mut engine.params, 0, &params)?;
        self.compute(shape)?;
        if batch == 0 {
            return Ok(());
        }
        let engine = &*self.engine;
        let mut drawn = vec![0u32; batch];
        let (mut logprobs, mut kept) = (vec![0f32; batch], vec![0f32; batch]);
        device.read(&engine.tokens, 0, &mut drawn)?;
        device.read(&engine.logprobs, 0, &mut logprobs)?;
        device.read(&engine.kept, 0, &mut kept)?;
        for (i, run) in self.running.iter_mut().enumerate() {
            if drawn[i] == u32::MAX {
                bail!(
                    "the logits of prompt {} are not finite: the weights are damaged or training diverged",
                    run.request
                );
            }
            run.tokens.push(drawn[i]);
            run.logprobs.push(logprobs[i]);
            run.kept.push(kept[i]);
        }
        Ok(())
    }

    /// The device's part of a step. Steps that only decode come again and again in the same shape:
    /// the first runs as it is, the second is recorded, and then there is one call a step.
    fn compute(&mut self, shape: Shape) -> Result<()> {
        let device = self.device;
        if shape.rows > shape.batch {
            return self.engine.compute(device, self.model, shape);
        }
        match self.recorded.get(&shape) {
            None => {
                self.engine.compute(device, self.model, shape)?;
                self.recorded.insert(shape, None);
            }
            Some(None) => {
                let graph = device.record(|| self.engine.compute(device, self.model, shape))?;
                if let Some(graph) = graph {
                    // SAFETY: as below.
                    unsafe { device.replay(&graph)? };
                    self.recorded.insert(shape, Some(graph));
                }
            }
            // SAFETY: the graph uses buffers of the engine and of the model, which are borrowed as
            // long as `recorded` lives, and neither makes new ones meanwhile.
            Some(Some(graph)) => unsafe { device.replay(graph)? },
        }
        Ok(())
    }

    /// Reports the tokens just drawn, and takes out the samples that have ended.
    fn finish(&mut self, on_event: &mut dyn FnMut(Event) -> ControlFlow<()>) -> ControlFlow<()> {
        let mut i = 0;
        while i < self.running.len() {
            let run = &self.running[i];
            if let Some(&token) = run.tokens.last() {
                on_event(Event::Token(run.request, run.sample, token))?;
            }
            let finish = self
                .stops
                .check(&run.tokens)
                .or((run.tokens.len() >= run.limit).then_some(Finish::Length));
            let Some(finish) = finish else {
                i += 1;
                continue;
            };
            let run = self.running.swap_remove(i);
            self.engine.pages.release(&run.pages);
            on_event(Event::Done(Completion {
                request: run.request,
                sample: run.sample,
                tokens: run.tokens,
                logprobs: run.logprobs,
                kept: run.kept,
                finish,
            }))?;
        }
        ControlFlow::Continue(())
    }

    fn release_all(&mut self) {
        for run in self.running.drain(..) {
            self.engine.pages.release(&run.pages);
        }
        for prompt in self.prompts.drain(..) {
            self.engine.pages.release(&prompt.pages);
        }
    }
}
