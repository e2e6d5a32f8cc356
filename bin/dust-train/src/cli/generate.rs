//! `generate`: text from a prompt.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use dust_kernels::Backend;

use super::files::read_text;
use super::model::{Loaded, ModelArgs, SamplingArgs, Thinking};
use crate::interrupt::{self, Interrupted};
use crate::rollout::{
    Completion, Engine, EngineConfig, Event, Finish, Request, SamplingSettings, Stops,
};
use crate::text::{Message, Role};

/// Generate text from a prompt, shown as it comes.
///
/// The prompt is a question to the model, put into its chat template; --raw continues the text as
/// it stands. Speeds go to stderr, so the standard output holds the model's text alone.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  dust-train generate --model Qwen/Qwen3-0.6B --thinking off --prompt 'Write a haiku about rust.'\n  dust-train generate --model model.gguf --raw --temperature 0 --prompt 'The capital of France is'"
)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// What to say; - reads it from the standard input.
    #[arg(long, value_name = "TEXT")]
    prompt: String,

    /// Continue the prompt itself, without a chat template.
    #[arg(long, conflicts_with_all = ["system", "thinking"])]
    raw: bool,

    /// Instructions above the conversation [default: the template's own].
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Whether the model thinks first, where it can [default: as its template has it].
    #[arg(long, value_enum)]
    thinking: Option<Thinking>,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// How many answers; several are shown one after the other.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    samples: u32,
}

pub(super) fn run<B: Backend>(args: &Args, device: &B) -> Result<()> {
    let (place, text) = match args.prompt.as_str() {
        "-" => ("standard input", read_text(Path::new("-"))?),
        text => ("--prompt", text.to_owned()),
    };
    let loaded = args.model.load(device)?;
    let prompt = if args.raw {
        let mut prompt = loaded.tokenizer.prefix().to_vec();
        prompt.extend(loaded.tokenizer.encode(&text, true)?);
        prompt
    } else {
        let system = args.system.iter().map(|s| Message::new(Role::System, s));
        let messages: Vec<_> = system.chain([Message::new(Role::User, text)]).collect();
        loaded.chat(&messages, args.thinking)?
    };
    loaded.check_prompt(place, &prompt)?;
    let request = Request {
        prompt,
        samples: args.samples,
        seed: args.sampling.seed,
    };
    let settings = args.sampling.settings();
    if args.samples == 1 {
        answer(device, &loaded, request, &settings, &[])?;
        return Ok(());
    }
    draw(device, &loaded, request, &settings, &[], &mut |event| {
        if let Event::Done(done) = event {
            let text = loaded.tokenizer.decode(spoken(&done));
            let mut out = io::stdout().lock();
            writeln!(out, "--- sample {} ---\n{text}", done.sample + 1)?;
            out.flush()?;
        }
        Ok(())
    })
}

/// Draws one answer, shows it as it comes, and returns its text and how it ended.
pub(super) fn answer<B: Backend>(
    device: &B,
    loaded: &Loaded<B>,
    request: Request,
    settings: &SamplingSettings,
    stop: &[String],
) -> Result<(String, Option<Finish>)> {
    let mut stream = loaded.tokenizer.stream();
    let mut text = String::new();
    let mut finish = None;
    let drawn = draw(device, loaded, request, settings, stop, &mut |event| {
        match event {
            Event::Token(_, _, token) if loaded.tokenizer.eos_ids().contains(&token) => {}
            Event::Token(_, _, token) => {
                let piece = stream.push(token);
                let mut out = io::stdout().lock();
                out.write_all(piece.as_bytes())?;
                out.flush()?;
                text += &piece;
            }
            Event::Done(done) => finish = Some(done.finish),
        }
        Ok(())
    });
    let rest = stream.finish();
    let mut out = io::stdout().lock();
    writeln!(out, "{rest}")?;
    out.flush()?;
    drawn?;
    if finish == Some(Finish::Length) {
        eprintln!("[cut off: the longest answer is reached; --max-tokens allows more]");
    }
    Ok((text + &rest, finish))
}

/// The tokens of an answer without the one that ends it.
fn spoken(done: &Completion) -> &[u32] {
    match (done.finish, done.tokens.split_last()) {
        (Finish::StopToken, Some((_, spoken))) => spoken,
        _ => &done.tokens,
    }
}

/// Runs the rollout engine, and says on stderr how fast it was.
fn draw<B: Backend>(
    device: &B,
    loaded: &Loaded<B>,
    request: Request,
    settings: &SamplingSettings,
    stop: &[String],
    on_event: &mut dyn FnMut(Event) -> io::Result<()>,
) -> Result<()> {
    let prompt = request.prompt.len();
    let longest = (prompt + settings.max_tokens).min(loaded.model.max_positions());
    let batch = request.samples.min(16) as usize;
    let config = EngineConfig::for_length(batch, longest);
    let mut engine = Engine::new(device, &loaded.model, config)?;
    let stops = Stops {
        tokens: loaded.tokenizer.eos_ids(),
        strings: stop,
        block: false,
        tokenizer: &loaded.tokenizer,
    };
    let start = Instant::now();
    let (mut first, mut tokens) = (None, 0u32);
    let mut failed = None;
    engine.generate(
        device,
        &loaded.model,
        &[request],
        settings,
        stops,
        &mut |event| {
            if matches!(event, Event::Token(..)) {
                tokens += 1;
                first.get_or_insert_with(Instant::now);
            }
            failed = on_event(event).err();
            if failed.is_some() || interrupt::requested() {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        },
    )?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if let Some(first) = first {
        let (until, after) = (first - start, first.elapsed());
        eprint!(
            "[{prompt} prompt tokens, first token after {:.2} s",
            until.as_secs_f64()
        );
        // The first token of each running sample comes with the prompt.
        let decoded = tokens.saturating_sub(batch as u32);
        if decoded > 0 {
            let rate = f64::from(decoded) / after.as_secs_f64();
            eprint!("; {tokens} tokens, {rate:.1} tokens/s");
        }
        eprintln!("]");
    }
    if interrupt::requested() {
        return Err(Interrupted.into());
    }
    Ok(())
}
