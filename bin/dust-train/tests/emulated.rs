//! The GPU's code on `cuda-emulator`: a tiny random Qwen3 draws, judges and learns there, every
//! check switched on, and is held against the CPU.
#![cfg(feature = "cuda")]

mod common;

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use common::{any_tokenizer, generate, no_stops, open};
use cuda_emulator::LaunchReport;
use dust_kernels::adamw::AdamWConfig;
use dust_kernels::grpo::{GrpoConfig, SequenceStats};
use dust_kernels::{Backend, Cpu, Cuda, Device};
use dust_train::checkpoint::{Architecture, Checkpoint, Dtype, ModelConfig, save};
use dust_train::model::{Batch, Model, Purpose, Storage, Workspace};
use dust_train::pipeline::train::Optimizer;
use dust_train::rollout::{EngineConfig, Request, SamplingSettings};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// One at a time: the driver is the process's.
fn with_cuda<R>(test: impl FnOnce(&Cuda) -> R) -> R {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let emulator = cuda_emulator::install().unwrap();
    emulator.recover().unwrap();
    test(&Cuda::new(0).unwrap())
}

/// A random Qwen3 of two layers with the tests' tokenizer. Its weights are bf16 numbers, so that
/// both back ends start from the same.
fn tiny(dir: &Path) -> PathBuf {
    let gguf = open("tests/data/formats/tiny.gguf");
    let config = ModelConfig {
        architecture: Architecture::Qwen3,
        hidden: 64,
        intermediate: 96,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        rope_theta: 10_000.0,
        qkv_bias: false,
        qk_norm: true,
        tied: true,
        max_positions: 4096,
        ..gguf.config().clone()
    };
    let shapes = config.expected_tensors();
    let folder = dir.join("qwen3");
    let files = gguf.text_files().unwrap();
    save(&folder, &config, Dtype::Bf16, &files, |name| {
        let at = shapes.iter().position(|(n, _)| n == name).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(at as u64);
        let len = shapes[at].1.iter().product();
        let norm = name.contains("norm");
        Ok(Cow::Owned(
            (0..len)
                .map(|_| match norm {
                    true => rng.random_range(0.5..1.5),
                    false => rng.random_range(-0.2..0.2),
                })
                .collect(),
        ))
    })
    .unwrap();
    folder
}

fn load<B: Backend>(device: &B, folder: &Path) -> Model<B> {
    let checkpoint = Checkpoint::open(folder.to_str().unwrap()).unwrap();
    Model::load(device, &checkpoint, Storage::on::<B>(None).unwrap(), true).unwrap()
}

/// Two prompts with two answers each.
fn requests() -> Vec<Request> {
    [70, 9]
        .map(|len| Request {
            prompt: (0..len).map(|i| 3 + (i * 7 + len) % 100).collect(),
            samples: 2,
            seed: u64::from(len),
        })
        .to_vec()
}

/// What the answers of a rollout teach, as a batch with their recorded log-probabilities.
fn rollout<B: Backend>(device: &B, model: &Model<B>) -> (Batch, Vec<f32>) {
    let tokenizer = any_tokenizer();
    let requests = requests();
    let settings = SamplingSettings {
        max_tokens: 6,
        ..SamplingSettings::default()
    };
    let config = EngineConfig::for_length(4, 128);
    let stops = no_stops(&tokenizer);
    let done = generate(device, model, config, &requests, &settings, stops);
    let mut batch = Batch::new();
    for (request, answers) in requests.iter().zip(done.chunks(2)) {
        let answers: Vec<&[u32]> = answers.iter().map(|c| &*c.tokens).collect();
        batch.push_group(&request.prompt, &answers);
    }
    let logprobs = done.iter().flat_map(|c| c.logprobs.clone()).collect();
    (batch, logprobs)
}

/// The losses, the log-probabilities, and the gradient of every parameter.
struct Learnt {
    stats: Vec<SequenceStats>,
    logprobs: Vec<f32>,
    grads: Vec<Vec<f32>>,
}

fn learn<B: Backend>(device: &B, model: &Model<B>, batch: &Batch, old: &[f32]) -> Learnt {
    let purpose = Purpose::Train { recompute: false };
    let mut ws = Workspace::new(device, &model.config, batch.rows(), purpose).unwrap();
    let mut optimizer = Optimizer::new(device, model).unwrap();
    model.forward(device, &mut ws, batch).unwrap();
    model.logprobs(device, &mut ws, batch, 1.0).unwrap();
    let mut offsets = vec![0];
    offsets.extend(batch.answers.iter().map(|t| (t.start + t.len) as u32));
    let sequences = batch.answers.len();
    let upload = |x: &[f32]| device.upload(x).unwrap();
    let mut stats = device.zeros::<SequenceStats>(sequences).unwrap();
    let config = GrpoConfig {
        kl_coef: 0.05,
        ..GrpoConfig::default()
    };
    let reference: Vec<f32> = old.iter().map(|x| x - 0.1).collect();
    device
        .grpo_loss(
            &config,
            sequences,
            old.len(),
            &device.upload(&offsets).unwrap(),
            &upload(&vec![1.0 / old.len() as f32; sequences]),
            &upload(&[1.0, -0.5, 0.25, -1.0]),
            &ws.head.logprob,
            &upload(old),
            Some(&upload(&reference)),
            &mut ws.head.dlogprob,
            &mut stats,
        )
        .unwrap();
    model
        .backward(device, &mut ws, batch, &mut optimizer.grads)
        .unwrap();
    let mut logprobs = vec![0.0; old.len()];
    device.read(&ws.head.logprob, 0, &mut logprobs).unwrap();
    let grads = optimizer.grads.iter();
    Learnt {
        stats: device.download(&stats).unwrap(),
        logprobs,
        grads: grads.map(|g| device.download(g).unwrap()).collect(),
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn norm(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn the_gpu_draws_and_learns_as_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let folder = tiny(dir.path());
    let (batch, old, gpu, again) = with_cuda(|cuda| {
        let model = load(cuda, &folder);
        let emulator = cuda_emulator::install().unwrap();
        emulator.reports().unwrap();
        let (batch, old) = rollout(cuda, &model);
        let launches = emulator.reports().unwrap();
        let decoded = |r: &LaunchReport| r.graph && r.kernel.starts_with("attention_decode");
        assert!(launches.iter().any(decoded), "decoding replayed no graph");
        let (same, bits_again) = rollout(cuda, &model);
        assert_eq!(batch.tokens, same.tokens, "two rollouts differ");
        assert_eq!(bits(&old), bits(&bits_again), "two rollouts differ");
        let gpu = learn(cuda, &model, &batch, &old);
        let again = learn(cuda, &model, &batch, &old);
        (batch, old, gpu, again)
    });
    // Rollout = training: the first ratios are exactly 1.
    assert_eq!(bits(&gpu.logprobs), bits(&old));
    for (stats, answer) in gpu.stats.iter().zip(&batch.answers) {
        let all = (answer.len as f32, 0.0);
        assert_eq!((stats.ratio, stats.ratio_deviation), all, "{stats:?}");
    }
    // Two runs give the same bits.
    for (a, b) in gpu.grads.iter().zip(&again.grads) {
        assert_eq!(bits(a), bits(b));
    }
    let cpu = Cpu::new();
    let cpu = learn(&cpu, &load(&cpu, &folder), &batch, &old);
    // Activations carry 8 bits of fraction: 0.4 % a rounding, some of them in a row.
    for (i, (a, b)) in gpu.logprobs.iter().zip(&cpu.logprobs).enumerate() {
        assert!((a - b).abs() < 0.03, "log-probability {i}: {a} {b}");
    }
    for (a, b) in gpu.stats.iter().zip(&cpu.stats) {
        assert!(
            (a.loss - b.loss).abs() < 0.02 * b.loss.abs() + 0.002,
            "{a:?} {b:?}"
        );
    }
    for (i, (a, b)) in gpu.grads.iter().zip(&cpu.grads).enumerate() {
        let distance = norm(a.iter().zip(b).map(|(a, b)| a - b));
        let size = norm(b.iter().copied());
        assert!(size > 0.0, "parameter {i} has no gradient");
        assert!(
            distance < 0.03 * size,
            "parameter {i}: {distance} of {size}"
        );
    }
}

#[test]
fn an_update_moves_the_master_weights_and_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let folder = tiny(dir.path());
    with_cuda(|cuda| {
        let mut model = load(cuda, &folder);
        let (batch, old) = rollout(cuda, &model);
        let before = learn(cuda, &model, &batch, &old);
        let mut optimizer = Optimizer::new(cuda, &model).unwrap();
        for (grad, values) in optimizer.grads.iter_mut().zip(&before.grads) {
            cuda.write(grad, 0, values).unwrap();
        }
        let config = AdamWConfig {
            learning_rate: 1e-3,
            ..AdamWConfig::default()
        };
        let found = optimizer.step(cuda, &mut model, config, 1.0).unwrap();
        let expected = norm(before.grads.iter().flatten().copied());
        assert!((f64::from(found) - expected).abs() < 1e-3 * expected);
        let after = learn(cuda, &model, &batch, &old);
        let loss = |l: &Learnt| l.stats.iter().map(|s| f64::from(s.loss)).sum::<f64>();
        assert!(
            loss(&after) < loss(&before),
            "{} {}",
            loss(&after),
            loss(&before)
        );
    });
}

/// A run folder with one problem, whose candidates are labelled.
fn run_folder(dir: &Path, model: &Path, name: &str) -> PathBuf {
    let run = dir.join(name);
    fs::create_dir(&run).unwrap();
    let problem = json!({"id": "two", "statement": "Return 2.", "entry_point": "f",
        "mode": "function", "tests": [{"input": [], "output": 2}], "split": "train"});
    let held_out = json!({"id": "three", "statement": "Return 3.", "entry_point": "f",
        "mode": "function", "tests": [{"input": [], "output": 3}], "split": "held-out"});
    fs::write(
        dir.join("problems.jsonl"),
        format!("{problem}\n{held_out}\n"),
    )
    .unwrap();
    let config = format!(
        "seed = 3\n\
         [model]\npath = {model:?}\nbatch = 2\n\
         [tasks]\nsource = {:?}\n\
         [sample]\ncandidates = 2\n[sample.sampling]\nmax_tokens = 4\n\
         [group]\nsize = 2\n\
         [judge]\nprefix = \"Ranking: 2 >\"\nmax_tokens = 3\n\
         [train]\nsteps = 1\nprompts = 1\nmini_batch = 1\nepochs = 2\njudgments = 2\n\
         learning_rate = 1e-3\nwarmup_steps = 1\n\
         [eval]\nrepeats = 1\n",
        dir.join("problems.jsonl")
    );
    fs::write(run.with_extension("toml"), config).unwrap();
    run
}

fn stage(name: &str, run: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_dust-train"))
        .args([name, "--device", "emulated", "--run"])
        .arg(run)
        .arg("--config")
        .arg(run.with_extension("toml"))
        // As in the other tests of the stages.
        .args(["--sandbox", "allow-weak=cgroup"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {error}");
}

#[test]
fn the_stages_run_on_the_emulated_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path());
    let runs = ["one", "two"].map(|name| {
        let run = run_folder(dir.path(), &model, name);
        stage("sample", &run);
        let sampled = fs::read_to_string(run.join("candidates.jsonl")).unwrap();
        assert_eq!(sampled.lines().count(), 2, "{sampled}");
        // A random model writes no programs; these are what the judge sees.
        let candidates = ["def f():\n    return 2", "def f():\n    return 1"];
        let lines = candidates.iter().enumerate().map(|(sample, program)| {
            let line = json!({"problem": "two", "sample": sample, "program": program,
                "tokens": 9, "finish": "stop_token", "mean_logprob": -0.5});
            format!("{line}\n")
        });
        fs::write(run.join("candidates.jsonl"), lines.collect::<String>()).unwrap();
        for name in ["label", "group", "train"] {
            stage(name, &run);
        }
        let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let step: Value = serde_json::from_str(log.trim()).unwrap();
        assert_eq!(step["mismatch"], 0.0, "rollout and training differ: {step}");
        let weights = fs::read(run.join("model/model.safetensors")).unwrap();
        (sampled, weights)
    });
    assert!(runs[0] == runs[1], "two runs differ");
}
