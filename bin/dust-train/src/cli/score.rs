//! `score`: log-probabilities and entropies of given texts.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use dust_kernels::Backend;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{Output, input_name, read_text};
use super::model::{Loaded, ModelArgs};
use super::{InputError, interrupt};
use crate::model::{Batch, Purpose, Workspace};

/// Score texts: the log-probability of every token given those before it.
///
/// Reads JSON lines, each {"id": any, "tokens": [1, 2, 3]} or {"id": any, "text": "..."}, and writes
/// one line for each, in the same order:
///
///   {"id": any, "tokens": [t0, t1, ...], "logprobs": [log p(t1 | t0), ...], "entropy": [...]}
///
/// Logarithms are natural, the softmax is the model's own (temperature 1), and the values do not
/// depend on which texts share a batch. A text is tokenized as it stands: names of special tokens in
/// it become those tokens, and the BOS token is put before it where the tokenizer wants one.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  echo '{\"id\": 1, \"text\": \"The sky is blue.\"}' | dust-train score --model Qwen/Qwen3-0.6B --input - --output -"
)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// JSON lines to read; - is the standard input.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// Where to write; a file appears only when it is whole, - is the standard output.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Most tokens that run at once; a longer text runs alone.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    batch_tokens: u32,
}

/// A line of the input.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    id: Value,
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

/// A line of the output.
#[derive(Serialize)]
struct Scored<'a> {
    id: &'a Value,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    entropy: &'a [f32],
}

struct Text {
    id: Value,
    tokens: Vec<u32>,
}

pub(super) fn run<B: Backend>(args: &Args, device: &B) -> Result<()> {
    let name = input_name(&args.input);
    let input = read_text(&args.input)?;
    let mut output = Output::create(&args.output)?;
    let loaded = args.model.load(device)?;
    // Everything is checked before the first line goes out.
    let mut texts = Vec::new();
    for (index, line) in input.lines().enumerate() {
        if !line.trim().is_empty() {
            texts.push(
                read_line(&loaded, line).map_err(|(field, problem, remedy)| {
                    InputError::new(format!("{name}:{}", index + 1), field, problem, remedy)
                })?,
            );
        }
    }
    if texts.is_empty() {
        let remedy = "give a line like {\"id\": 1, \"text\": \"...\"}";
        return Err(InputError::new(name, "lines", "there is none", remedy).into());
    }
    let batches = pack(&texts, args.batch_tokens as usize);
    let rows = batches
        .iter()
        .map(|b| b.iter().map(|t| t.tokens.len()).sum());
    let rows = rows.max().unwrap_or(0);
    let mut workspace = Workspace::new(device, &loaded.model.config, rows, Purpose::Forward)?;
    for batch in batches {
        interrupt::check()?;
        score(device, &loaded, &mut workspace, batch, &mut output)?;
    }
    output.finish()
}

/// Field, problem and remedy of a line that cannot be scored.
type Refusal = (String, String, &'static str);

fn read_line<B: Backend>(loaded: &Loaded<B>, line: &str) -> Result<Text, Refusal> {
    const FORMS: &str =
        "write {\"id\": ..., \"tokens\": [...]} or {\"id\": ..., \"text\": \"...\"}";
    let mut json = serde_json::Deserializer::from_str(line);
    let record: Record = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let message = inner.to_string();
        // The line is named already; what the parser calls line 1 is this one.
        let message = message.split(" at line ").next().unwrap_or_default();
        let field = match message.split('`').nth(1) {
            Some(field) if path == "." && inner.is_data() => field.to_owned(),
            _ if path == "." => "record".to_owned(),
            _ => path,
        };
        (
            field,
            format!("{message} at column {}", inner.column()),
            FORMS,
        )
    })?;
    json.end().map_err(|_| {
        (
            "record".to_owned(),
            "more text after the object".to_owned(),
            FORMS,
        )
    })?;
    let (field, tokens) = match (record.tokens, record.text) {
        (Some(tokens), None) => ("tokens", tokens),
        (None, Some(text)) => {
            let mut tokens = loaded.tokenizer.prefix().to_vec();
            let encoded = loaded.tokenizer.encode(&text, true);
            tokens.extend(
                encoded.map_err(|e| ("text".to_owned(), e.to_string(), "change the text"))?,
            );
            ("text", tokens)
        }
        (Some(_), Some(_)) => {
            return Err((
                "tokens".to_owned(),
                "stands beside `text`".to_owned(),
                "give one of the two",
            ));
        }
        (None, None) => return Err(("tokens".to_owned(), "is missing".to_owned(), FORMS)),
    };
    let refuse = |problem: String, remedy| Err((field.to_owned(), problem, remedy));
    let vocab = loaded.model.config.vocab_size;
    let longest = loaded.model.max_positions();
    if tokens.is_empty() {
        return refuse("has no tokens".to_owned(), "give at least one");
    }
    if let Some(at) = tokens.iter().position(|&token| token as usize >= vocab) {
        let problem = format!(
            "token {} at index {at} is outside of the vocabulary of {vocab}",
            tokens[at]
        );
        return refuse(problem, "use the model's own tokenizer");
    }
    // The last token is only scored, never run.
    if tokens.len() > longest + 1 {
        let problem = format!(
            "{} tokens do not fit the model's context of {longest}",
            tokens.len()
        );
        return refuse(problem, "split the text");
    }
    Ok(Text {
        id: record.id,
        tokens,
    })
}

/// Neighbours together, up to `limit` tokens.
fn pack(texts: &[Text], limit: usize) -> Vec<&[Text]> {
    let mut batches = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        if i > start && size + text.tokens.len() > limit {
            batches.push(&texts[start..i]);
            (start, size) = (i, 0);
        }
        size += text.tokens.len();
    }
    batches.push(&texts[start..]);
    batches
}

fn score<B: Backend>(
    device: &B,
    loaded: &Loaded<B>,
    workspace: &mut Workspace<B>,
    texts: &[Text],
    output: &mut Output,
) -> Result<()> {
    let mut batch = Batch::new();
    for text in texts {
        batch.push_text(&text.tokens);
    }
    let targets = batch.targets.len();
    let (mut logprobs, mut entropy) = (vec![0.0; targets], vec![0.0; targets]);
    if targets > 0 {
        loaded.model.forward(device, workspace, &batch)?;
        loaded.model.logprobs(device, workspace, &batch, 1.0)?;
        device.read(&workspace.head.logprob, 0, &mut logprobs)?;
        device.read(&workspace.head.entropy, 0, &mut entropy)?;
    }
    for (text, answer) in texts.iter().zip(&batch.answers) {
        let range = answer.start..answer.start + answer.len;
        let scored = Scored {
            id: &text.id,
            tokens: &text.tokens,
            logprobs: &logprobs[range.clone()],
            entropy: &entropy[range],
        };
        ensure!(
            scored
                .logprobs
                .iter()
                .chain(scored.entropy)
                .all(|x| x.is_finite()),
            "the log-probabilities of id {} are not finite: the weights are damaged",
            text.id
        );
        serde_json::to_writer(&mut *output, &scored).map_err(std::io::Error::from)?;
        output.write_all(b"\n")?;
    }
    Ok(())
}
