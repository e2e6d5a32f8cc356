//! Promises about bits: rollout is training, nothing depends on its company, two runs are one. And
//! the rollout engine's bookkeeping.

mod common;

use std::ops::ControlFlow;

use common::{any_tokenizer, generate, generate_with, no_stops, open};
use dust_kernels::{Cpu, Device};
use dust_train::checkpoint::{Checkpoint, Dtype};
use dust_train::model::{Batch, Model, Purpose, Storage, Stored, Workspace, freeze};
use dust_train::rollout::{
    Completion, Engine, EngineConfig, Event, Finish, Request, SamplingSettings, Stops,
};

/// One of each architecture; the last has its own head.
const MODELS: [&str; 3] = ["llama-tied", "qwen2-tied", "qwen3-untied"];
const VOCAB: u64 = 149;

fn load(device: &Cpu, name: &str, storage: Storage, train: bool) -> Model<Cpu> {
    let checkpoint = open(&format!("tests/golden/{name}"));
    Model::load(device, &checkpoint, storage, train).unwrap()
}

/// Tokens without a pattern.
fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((state >> 33) % VOCAB) as u32
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Prompts around the sizes at which something changes: one token, pages of 64, pieces of prefill.
fn requests(samples: u32) -> Vec<Request> {
    [1, 7, 63, 64, 65, 66, 130]
        .into_iter()
        .enumerate()
        .map(|(i, len)| Request {
            prompt: tokens(100 + i as u64, len),
            samples,
            seed: 40 + i as u64,
        })
        .collect()
}

fn settings(temperature: f32, max_tokens: usize) -> SamplingSettings {
    SamplingSettings {
        temperature,
        max_tokens,
        ..SamplingSettings::default()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Everything about each answer, numbers by their bits.
fn contents(done: &[Completion]) -> Vec<(Finish, Vec<u32>)> {
    done.iter()
        .map(|c| {
            let mut numbers = vec![c.request as u32, c.sample];
            numbers.extend(&c.tokens);
            numbers.extend(bits(&c.logprobs));
            numbers.extend(bits(&c.kept));
            (c.finish, numbers)
        })
        .collect()
}

/// Log-probabilities of a batch's targets by the forward pass of training.
fn score(device: &Cpu, model: &Model<Cpu>, batch: &Batch, temperature: f32) -> Vec<u32> {
    let purpose = Purpose::Train { recompute: false };
    let mut ws = Workspace::new(device, &model.config, batch.rows(), purpose).unwrap();
    model.forward(device, &mut ws, batch).unwrap();
    model.logprobs(device, &mut ws, batch, temperature).unwrap();
    bits(&ws.head.logprob[..batch.targets.len()])
}

#[test]
fn a_rollout_records_the_bits_that_training_computes() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let config = EngineConfig {
        max_batch: 5,
        prefill_tokens: 48,
        cache_tokens: 6 * 256,
    };
    for name in MODELS {
        for storage in [Storage::F32, Storage::Bf16] {
            let model = load(&device, name, storage, true);
            // Greedy answers are recorded at temperature 1.
            for (temperature, recorded_at) in [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)] {
                let requests = requests(3);
                let settings = settings(temperature, 70);
                let stops = no_stops(&tokenizer);
                let done = generate(&device, &model, config, &requests, &settings, stops);
                assert_eq!(done.len(), 3 * requests.len());
                let mut batch = Batch::new();
                for (request, answers) in requests.iter().zip(done.chunks(3)) {
                    let answers: Vec<&[u32]> = answers.iter().map(|c| &*c.tokens).collect();
                    batch.push_group(&request.prompt, &answers);
                }
                let scored = score(&device, &model, &batch, recorded_at);
                for (completion, at) in done.iter().zip(&batch.answers) {
                    assert_eq!(completion.tokens.len(), 70);
                    assert_eq!(
                        bits(&completion.logprobs),
                        scored[at.start..at.start + at.len],
                        "{name}, {storage:?}, temperature {temperature}, prompt {}, sample {}",
                        completion.request,
                        completion.sample
                    );
                }
                let distinct = done[0].tokens != done[1].tokens;
                assert_eq!(distinct, temperature > 0.0, "{name}");
            }
        }
    }
}

#[test]
fn filtered_sampling_records_the_unfiltered_bits_and_the_kept_mass() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let model = load(&device, "qwen3-untied", Storage::F32, false);
    let settings = SamplingSettings {
        top_p: 0.6,
        top_k: 20,
        min_p: 0.02,
        ..settings(1.0, 30)
    };
    let requests = &requests(1)[4..5];
    let config = EngineConfig::for_length(1, 128);
    let stops = no_stops(&tokenizer);
    let done = generate(&device, &model, config, requests, &settings, stops);
    let mut batch = Batch::new();
    batch.push_group(&requests[0].prompt, &[&done[0].tokens]);
    assert_eq!(bits(&done[0].logprobs), score(&device, &model, &batch, 1.0));
    assert!(done[0].kept.iter().all(|&k| k > 0.0 && k < 1.0));
}

#[test]
fn a_sample_depends_on_its_request_alone() {
    let tokenizer = any_tokenizer();
    let settings = settings(1.0, 40);
    for name in MODELS {
        let device = Cpu::with_threads(1);
        let model = load(&device, name, Storage::F32, false);
        let requests = requests(3);
        // Each request alone, one sample at a time.
        let mut alone = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            let config = EngineConfig::for_length(1, 192);
            let request = std::slice::from_ref(request);
            let stops = no_stops(&tokenizer);
            let done = generate(&device, &model, config, request, &settings, stops);
            alone.extend(done.into_iter().map(|c| Completion { request: i, ..c }));
        }
        assert_eq!(alone.len(), 21);
        for (threads, max_batch, prefill_tokens, cache_tokens) in [
            (1, 4, 256, 5 * 192),
            (2, 3, 1, 4 * 192),
            (2, 21, 64, 4096),
            (5, 6, 17, 3 * 192),
            (5, 8, 100, 700),
        ] {
            let device = Cpu::with_threads(threads);
            let config = EngineConfig {
                max_batch,
                prefill_tokens,
                cache_tokens,
            };
            let stops = no_stops(&tokenizer);
            let done = generate(&device, &model, config, &requests, &settings, stops);
            assert_eq!(
                contents(&done),
                contents(&alone),
                "{name}, {threads} threads, {config:?}"
            );
        }
    }
}

/// A batch of two groups, with answers that end beyond a chunk of attention.
fn two_groups() -> Batch {
    let mut batch = Batch::new();
    let answers = [tokens(2, 5), tokens(3, 90), tokens(4, 1)];
    batch.push_group(&tokens(1, 70), &answers);
    batch.push_group(&tokens(5, 9), &[tokens(6, 60), tokens(7, 33)]);
    batch
}

/// The bits of every gradient of `two_groups`, for a loss with some slope at each target.
fn gradients(device: &Cpu, model: &Model<Cpu>, recompute: bool) -> Vec<Vec<u32>> {
    let batch = two_groups();
    let purpose = Purpose::Train { recompute };
    let mut ws = Workspace::new(device, &model.config, batch.rows(), purpose).unwrap();
    let mut grads = model.zeros_like(device).unwrap();
    model.forward(device, &mut ws, &batch).unwrap();
    model.logprobs(device, &mut ws, &batch, 0.9).unwrap();
    let slopes: Vec<f32> = (0..batch.targets.len())
        .map(|i| (i % 7) as f32 / 7.0 - 0.4)
        .collect();
    device.write(&mut ws.head.dlogprob, 0, &slopes).unwrap();
    model.backward(device, &mut ws, &batch, &mut grads).unwrap();
    grads.iter().map(|g| bits(g)).collect()
}

#[test]
fn gradients_do_not_depend_on_recomputation_threads_or_the_run() {
    for name in MODELS {
        for storage in [Storage::F32, Storage::Bf16] {
            let device = Cpu::with_threads(2);
            let model = load(&device, name, storage, true);
            let kept = gradients(&device, &model, false);
            assert!(
                kept.iter()
                    .all(|g| g.iter().any(|&x| f32::from_bits(x) != 0.0))
            );
            assert!(
                kept.iter()
                    .flatten()
                    .all(|&x| f32::from_bits(x).is_finite())
            );
            let check = |device: &Cpu, recompute, what: &str| {
                assert!(
                    gradients(device, &model, recompute) == kept,
                    "{name}: {what}"
                );
            };
            check(&device, false, "a second run");
            check(&device, true, "recomputation");
            check(&Cpu::with_threads(1), false, "1 thread");
            check(&Cpu::with_threads(5), true, "5 threads");
        }
    }
}

#[test]
fn gradients_are_added_to_what_is_there() {
    let device = Cpu::new();
    let model = load(&device, "qwen2-tied", Storage::F32, true);
    let batch = two_groups();
    let purpose = Purpose::Train { recompute: true };
    let mut ws = Workspace::new(&device, &model.config, batch.rows(), purpose).unwrap();
    let mut grads = model.zeros_like(&device).unwrap();
    let mut sums = Vec::new();
    for _ in 0..2 {
        model.forward(&device, &mut ws, &batch).unwrap();
        model.logprobs(&device, &mut ws, &batch, 1.0).unwrap();
        let slopes = vec![-0.01; batch.targets.len()];
        device.write(&mut ws.head.dlogprob, 0, &slopes).unwrap();
        model
            .backward(&device, &mut ws, &batch, &mut grads)
            .unwrap();
        sums.push(grads.iter().map(|g| g.to_vec()).collect::<Vec<_>>());
    }
    for (once, twice) in sums[0].iter().zip(&sums[1]) {
        let largest = once.iter().fold(0f32, |max, x| max.max(x.abs()));
        for (once, twice) in once.iter().zip(twice) {
            assert!(
                (2.0 * once - twice).abs() <= 1e-5 * largest,
                "{once} {twice}"
            );
        }
    }
}

#[test]
fn a_group_scores_the_same_in_any_company() {
    let device = Cpu::new();
    for name in MODELS {
        let model = load(&device, name, Storage::F32, false);
        let together = score(&device, &model, &two_groups(), 1.0);
        let mut first = Batch::new();
        first.push_group(&tokens(1, 70), &[tokens(2, 5), tokens(3, 90), tokens(4, 1)]);
        let mut apart = score(&device, &model, &first, 1.0);
        for answer in [tokens(6, 60), tokens(7, 33)] {
            let mut batch = Batch::new();
            batch.push_group(&tokens(5, 9), &[answer]);
            apart.extend(score(&device, &model, &batch, 1.0));
        }
        assert_eq!(together, apart, "{name}");
    }
}

#[test]
fn a_frozen_copy_scores_as_its_model() {
    let device = Cpu::new();
    for storage in [Storage::F32, Storage::Bf16] {
        let model = load(&device, "qwen3-untied", storage, true);
        let copy = freeze(&device, &model).unwrap();
        let batch = two_groups();
        let scores = score(&device, &model, &batch, 1.0);
        assert_eq!(scores, score(&device, &copy, &batch, 1.0));
        // Training and inference read the same weights.
        let plain = load(&device, "qwen3-untied", storage, false);
        assert_eq!(scores, score(&device, &plain, &batch, 1.0));
    }
}

#[test]
fn a_saved_model_loads_back_with_the_same_bits() {
    let device = Cpu::new();
    let batch = two_groups();
    for name in ["llama-untied", "qwen2-tied", "qwen3-tied", "qwen3-yarn"] {
        let mut model = load(&device, name, Storage::F32, true);
        // Weights as training leaves them: with all of their 24 bits.
        for (i, stored) in model.params.iter_mut().enumerate() {
            let Stored::F32(values) = stored else {
                panic!("loaded as f32");
            };
            for (j, x) in values.iter_mut().enumerate() {
                *x *= 1.0 + ((i + j) % 1009) as f32 * 1e-6;
            }
        }
        let scratch = tempfile::tempdir().unwrap();
        let reload = |dtype, storage| {
            let folder = scratch.path().join(format!("{dtype:?}"));
            model.save(&device, &folder, dtype, &[]).unwrap();
            let checkpoint = Checkpoint::open(folder.to_str().unwrap()).unwrap();
            Model::load(&device, &checkpoint, storage, false).unwrap()
        };
        let full = reload(Dtype::F32, Storage::F32);
        let scores = score(&device, &model, &batch, 1.0);
        assert_eq!(score(&device, &full, &batch, 1.0), scores, "{name}");
        for (a, b) in model.params.iter().zip(full.params.iter()) {
            let (a, b) = (a.download(&device).unwrap(), b.download(&device).unwrap());
            assert_eq!(bits(&a), bits(&b), "{name}");
        }
        let half = reload(Dtype::Bf16, Storage::F32);
        let mut rounded = 0;
        for (a, b) in model.params.iter().zip(half.params.iter()) {
            let (a, b) = (a.download(&device).unwrap(), b.download(&device).unwrap());
            for (&a, &b) in a.iter().zip(&b) {
                assert_eq!(half::bf16::from_f32(a).to_f32().to_bits(), b.to_bits());
                rounded += usize::from(a != b);
            }
        }
        assert!(rounded > 1000, "{name}: {rounded}");
    }
}

#[test]
fn answers_end_at_stop_tokens_stop_strings_and_lengths() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let model = load(&device, "llama-tied", Storage::F32, false);
    let request = [Request {
        prompt: tokens(9, 20),
        samples: 2,
        seed: 3,
    }];
    let config = EngineConfig::for_length(2, 128);
    let run = |settings: &SamplingSettings, stops| {
        generate(&device, &model, config, &request, settings, stops)
    };
    let settings = settings(1.0, 50);
    let free = run(&settings, no_stops(&tokenizer));
    for c in &free {
        assert_eq!((c.tokens.len(), c.finish), (50, Finish::Length));
        assert_eq!((c.logprobs.len(), c.kept.len()), (50, 50));
    }
    let check = |done: &[Completion], ends: [Option<usize>; 2], finish| {
        for ((stopped, free), end) in done.iter().zip(&free).zip(ends) {
            let len = end.unwrap_or(50);
            assert_eq!(stopped.tokens, free.tokens[..len]);
            assert_eq!(bits(&stopped.logprobs), bits(&free.logprobs[..len]));
            assert_eq!(stopped.finish, end.map_or(Finish::Length, |_| finish));
        }
    };

    let token = free[0].tokens[17];
    let ends = [0, 1].map(|i| Some(free[i].tokens.iter().position(|&t| t == token)? + 1));
    assert!(ends[0].is_some());
    let stops = Stops {
        tokens: &[token, 1_000_000],
        ..no_stops(&tokenizer)
    };
    check(&run(&settings, stops), ends, Finish::StopToken);

    // A string across three tokens, of which the first is cut.
    let text = tokenizer.decode(&free[0].tokens[20..23]);
    let (cut, _) = text.char_indices().nth(1).unwrap();
    let strings = ["not in the text".to_owned(), text[cut..].to_owned()];
    let ends = [0, 1]
        .map(|i| (1..=50).find(|&n| tokenizer.decode(&free[i].tokens[..n]).contains(&strings[1])));
    assert!(ends[0].is_some_and(|end| end <= 23), "{strings:?}");
    let stops = Stops {
        strings: &strings,
        ..no_stops(&tokenizer)
    };
    check(&run(&settings, stops), ends, Finish::StopString);

    // The model's 256 positions end an answer too.
    let request = [Request {
        prompt: tokens(9, 250),
        samples: 1,
        seed: 3,
    }];
    let config = EngineConfig::for_length(1, 256);
    let stops = no_stops(&tokenizer);
    let done = generate(&device, &model, config, &request, &settings, stops);
    assert_eq!((done[0].tokens.len(), done[0].finish), (6, Finish::Length));
}

#[test]
fn events_tell_every_token_in_order() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let model = load(&device, "llama-tied", Storage::F32, false);
    let mut engine = Engine::new(&device, &model, EngineConfig::for_length(4, 192)).unwrap();
    let mut told = std::collections::BTreeMap::<_, Vec<u32>>::new();
    let mut finished = 0;
    let mut on_event = |event| {
        match event {
            Event::Token(request, sample, token) => {
                told.entry((request, sample)).or_default().push(token);
            }
            Event::Done(c) => {
                assert_eq!(told[&(c.request, c.sample)], c.tokens);
                finished += 1;
            }
        }
        ControlFlow::Continue(())
    };
    let settings = settings(1.0, 12);
    let stops = no_stops(&tokenizer);
    engine
        .generate(
            &device,
            &model,
            &requests(2),
            &settings,
            stops,
            &mut on_event,
        )
        .unwrap();
    assert_eq!((finished, told.len()), (14, 14));
}

#[test]
fn an_engine_survives_being_broken_off() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let model = load(&device, "qwen2-tied", Storage::F32, false);
    let settings = settings(1.0, 30);
    let requests = requests(2);
    // Just enough for the longest prompt and one answer: one lost page would show.
    let config = EngineConfig {
        max_batch: 3,
        prefill_tokens: 50,
        cache_tokens: 6 * 64,
    };
    let whole = generate(
        &device,
        &model,
        config,
        &requests,
        &settings,
        no_stops(&tokenizer),
    );
    let mut engine = Engine::new(&device, &model, config).unwrap();
    for events in 1..80 {
        let mut left = events * 5;
        let mut on_event = |_| {
            left -= 1;
            match left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let stops = no_stops(&tokenizer);
        engine
            .generate(&device, &model, &requests, &settings, stops, &mut on_event)
            .unwrap();
        assert_eq!(left, 0);
    }
    let stops = no_stops(&tokenizer);
    let done = generate_with(&mut engine, &device, &model, &requests, &settings, stops);
    assert_eq!(contents(&done), contents(&whole));
}

#[test]
fn a_cache_with_room_for_one_sample_and_a_prompt_is_enough() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let model = load(&device, "llama-tied", Storage::F32, false);
    let requests: Vec<Request> = (0..4)
        .map(|i| Request {
            prompt: tokens(i, 50),
            samples: 2,
            seed: i,
        })
        .collect();
    let settings = settings(1.0, 14);
    let run = |config| {
        generate(
            &device,
            &model,
            config,
            &requests,
            &settings,
            no_stops(&tokenizer),
        )
    };
    // A page for the prompt, one for the answer: the next prompt must not take it.
    let small = run(EngineConfig::for_length(1, 64));
    let large = run(EngineConfig::for_length(8, 256));
    assert_eq!(contents(&small), contents(&large));
}

#[test]
fn what_cannot_be_run_is_refused_and_the_engine_goes_on() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    let mut model = load(&device, "llama-tied", Storage::F32, false);
    let config = EngineConfig {
        max_batch: 2,
        prefill_tokens: 64,
        cache_tokens: 128,
    };
    let mut engine = Engine::new(&device, &model, config).unwrap();
    let request = |prompt: usize, samples| Request {
        prompt: tokens(1, prompt),
        samples,
        seed: 1,
    };
    let settings = settings(1.0, 20);
    let mut run = |model: &Model<Cpu>, requests: &[Request]| {
        let mut done = 0;
        let mut on_event = |event| {
            done += usize::from(matches!(event, Event::Done(_)));
            ControlFlow::Continue(())
        };
        let stops = no_stops(&tokenizer);
        engine
            .generate(&device, model, requests, &settings, stops, &mut on_event)
            .map(|()| done)
            .map_err(|e| e.to_string())
    };
    let ok = [request(30, 3)];
    assert_eq!(run(&model, &ok), Ok(3));
    let error = run(&model, &[request(120, 1)]).unwrap_err();
    assert!(error.contains("cache of 128 tokens"), "{error}");
    let error = run(&model, &[request(200, 1)]).unwrap_err();
    assert!(error.contains("cache of 128 tokens"), "{error}");
    let error = run(&model, &[request(5, 1), request(0, 1)]).unwrap_err();
    assert!(error.contains("prompt 1 is empty"), "{error}");
    let error = run(&model, &[request(256, 1)]).unwrap_err();
    assert!(error.contains("prompt 0 has 256 tokens"), "{error}");
    let strange = Request {
        prompt: vec![1, 149],
        ..request(1, 1)
    };
    let error = run(&model, &[strange]).unwrap_err();
    assert!(error.contains("149"), "{error}");
    assert_eq!(run(&model, &[]), Ok(0));
    assert_eq!(
        run(&model, &[request(9, 0), request(9, 0), request(9, 1)]),
        Ok(1)
    );
    assert_eq!(run(&model, &ok), Ok(3));

    let Stored::F32(norm) = &mut model.params.norm else {
        panic!("loaded as f32");
    };
    norm[3] = f32::NAN;
    let error = run(&model, &ok).unwrap_err();
    assert!(error.contains("not finite"), "{error}");

    let none = EngineConfig {
        max_batch: 0,
        ..config
    };
    assert!(Engine::new(&device, &model, none).is_err());
}
