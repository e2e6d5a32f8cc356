//! What the tests of the model and of the rollout share.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use dust_kernels::Backend;
use dust_train::checkpoint::Checkpoint;
use dust_train::model::Model;
use dust_train::rollout::{
    Completion, Engine, EngineConfig, Event, Request, SamplingSettings, Stops,
};
use dust_train::text::Tokenizer;

/// A file or folder of the tests.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Opens a checkpoint of the tests.
pub fn open(name: &str) -> Checkpoint {
    Checkpoint::open(path(name).to_str().unwrap()).unwrap_or_else(|e| panic!("{e}"))
}

/// A tokenizer: what the engine decodes with, where a test does not look at the text.
#[allow(dead_code, reason = "a real model brings its own")]
pub fn any_tokenizer() -> Tokenizer {
    open("tests/data/formats/tiny.gguf").tokenizer().unwrap()
}

/// Stops that never stop.
pub fn no_stops(tokenizer: &Tokenizer) -> Stops<'_> {
    Stops {
        tokens: &[],
        strings: &[],
        block: false,
        tokenizer,
    }
}

/// All answers of a new engine, by request and sample.
pub fn generate<B: Backend>(
    device: &B,
    model: &Model<B>,
    config: EngineConfig,
    requests: &[Request],
    settings: &SamplingSettings,
    stops: Stops<'_>,
) -> Vec<Completion> {
    let mut engine = Engine::new(device, model, config).unwrap();
    generate_with(&mut engine, device, model, requests, settings, stops)
}

/// All answers of an engine, by request and sample.
pub fn generate_with<B: Backend>(
    engine: &mut Engine<B>,
    device: &B,
    model: &Model<B>,
    requests: &[Request],
    settings: &SamplingSettings,
    stops: Stops<'_>,
) -> Vec<Completion> {
    let mut done = Vec::new();
    let mut on_event = |event| {
        if let Event::Done(completion) = event {
            done.push(completion);
        }
        ControlFlow::Continue(())
    };
    engine
        .generate(device, model, requests, settings, stops, &mut on_event)
        .unwrap();
    done.sort_by_key(|c| (c.request, c.sample));
    done
}
