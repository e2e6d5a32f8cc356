//! A real model, SmolLM2-135M-Instruct, against transformers (tests/golden/README.md): tokens,
//! log-probabilities, entropies, greedy answers.

mod common;

use std::fs;

use common::{generate, no_stops, open, path};
use dust_kernels::Cpu;
use dust_train::model::{Batch, Model, Purpose, Storage, Workspace};
use dust_train::rollout::{EngineConfig, Request, SamplingSettings};
use dust_train::text::{ChatOptions, Message};
use serde::Deserialize;

const MODEL: &str = "../../models/SmolLM2-135M-Instruct.gguf";

#[derive(Deserialize)]
struct Golden {
    texts: Vec<Scored>,
    chats: Vec<Scored>,
}

#[derive(Deserialize)]
struct Scored {
    id: String,
    text: Option<String>,
    #[serde(default)]
    messages: Vec<Message>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    entropy: Vec<f32>,
    #[serde(default)]
    greedy: Vec<u32>,
}

fn largest_distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let distances = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    distances.fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

/// One test for all, as loading takes longer than each check.
#[test]
fn smollm2_is_what_transformers_computes() {
    assert!(
        path(MODEL).exists(),
        "models/SmolLM2-135M-Instruct.gguf is missing: run `python3 scripts/fetch_model.py` (93 MB)"
    );
    let golden = fs::read_to_string(path("tests/golden/smollm2.json")).unwrap();
    let golden: Golden = serde_json::from_str(&golden).unwrap();
    let device = Cpu::new();
    let checkpoint = open(MODEL);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let template = checkpoint.chat_template(&tokenizer).unwrap();
    let model = Model::load(&device, &checkpoint, Storage::F32, false).unwrap();
    assert_eq!(model.parameter_count(), 134_515_008);

    let mut batch = Batch::new();
    for case in golden.texts.iter().chain(&golden.chats) {
        let tokens = match &case.text {
            Some(text) => tokenizer.encode(text, false).unwrap(),
            None => {
                let options = ChatOptions::default();
                let text = template.render(&case.messages, &options).unwrap();
                tokenizer.encode(&text, true).unwrap()
            }
        };
        assert_eq!(tokens, case.tokens, "{}", case.id);
        batch.push_text(&tokens);
    }
    let mut ws = Workspace::new(&device, &model.config, batch.rows(), Purpose::Forward).unwrap();
    model.forward(&device, &mut ws, &batch).unwrap();
    model.logprobs(&device, &mut ws, &batch, 1.0).unwrap();
    let cases = golden.texts.iter().chain(&golden.chats);
    for (case, at) in cases.zip(&batch.answers) {
        let range = at.start..at.start + at.len;
        let logprobs = largest_distance(&ws.head.logprob[range.clone()], &case.logprobs);
        let entropy = largest_distance(&ws.head.entropy[range], &case.entropy);
        println!(
            "{}: log-probabilities {logprobs:.1e}, entropies {entropy:.1e}",
            case.id
        );
        assert!(logprobs <= 1e-3 && entropy <= 1e-3, "{}", case.id);
    }

    let requests: Vec<Request> = golden
        .chats
        .iter()
        .map(|chat| Request {
            prompt: chat.tokens.clone(),
            samples: 1,
            seed: 0,
        })
        .collect();
    let settings = SamplingSettings {
        temperature: 0.0,
        max_tokens: golden.chats[0].greedy.len(),
        ..SamplingSettings::default()
    };
    let config = EngineConfig::for_length(requests.len(), 128);
    let stops = no_stops(&tokenizer);
    let done = generate(&device, &model, config, &requests, &settings, stops);
    assert_eq!(done.len(), golden.chats.len());
    let mut batch = Batch::new();
    for (completion, chat) in done.iter().zip(&golden.chats) {
        assert_eq!(completion.tokens, chat.greedy, "{}", chat.id);
        batch.push_group(&chat.tokens, &[&completion.tokens]);
    }

    // What the rollout has recorded is what training computes, to the bit.
    model.forward(&device, &mut ws, &batch).unwrap();
    model.logprobs(&device, &mut ws, &batch, 1.0).unwrap();
    for (completion, at) in done.iter().zip(&batch.answers) {
        let trained = &ws.head.logprob[at.start..at.start + at.len];
        assert_eq!(completion.logprobs, trained);
    }
}
