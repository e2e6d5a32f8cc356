//! The model, its gradients and the optimizer against transformers and PyTorch in f64
//! (tests/golden/README.md tells what the files hold and where the bounds come from).

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{any_tokenizer, generate, no_stops, open, path};
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::grpo::{Grpo, GrpoConfig, SequenceStats};
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::{Cpu, Device};
use dust_train::model::{Batch, Model, Params, Purpose, Storage, Stored, Workspace};
use dust_train::rollout::{EngineConfig, Request, SamplingSettings};
use safetensors::SafeTensors;
use serde::Deserialize;

const MODELS: [&str; 8] = [
    "llama-tied",
    "llama-untied",
    "llama3-rope",
    "qwen2-tied",
    "qwen2-untied",
    "qwen3-tied",
    "qwen3-untied",
    "qwen3-yarn",
];

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Sequence>,
    grpo: GrpoCase,
    adamw: AdamWCase,
    #[serde(skip)]
    tensors: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Sequence {
    tokens: Vec<u32>,
    logprobs: Vec<f64>,
    entropy: Vec<f64>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct GrpoCase {
    prompt: Vec<u32>,
    answers: Vec<Vec<u32>>,
    advantages: Vec<f32>,
    old_logprobs: Vec<Vec<f32>>,
    ref_logprobs: Vec<Vec<f32>>,
    clip_low: f32,
    clip_high: f32,
    dual_clip: f32,
    kl_beta: f32,
    loss: f64,
    kl_mean: f64,
    num_tokens: usize,
    clipped_tokens: Clipped,
    logprobs: Vec<Vec<f64>>,
    grad_norm: f64,
}

#[derive(Deserialize, Debug, PartialEq)]
struct Clipped {
    low: f32,
    high: f32,
    dual: f32,
}

#[derive(Deserialize)]
struct AdamWCase {
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    max_norm: f32,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = path("tests/golden").join(name);
        let text = fs::read_to_string(folder.join("golden.json")).unwrap();
        let mut golden: Self = serde_json::from_str(&text).unwrap();
        let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in file.tensors() {
            assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
            let (values, rest) = tensor.data().as_chunks::<4>();
            assert!(rest.is_empty());
            let values = values.iter().map(|&b| f32::from_le_bytes(b)).collect();
            golden.tensors.insert(name, values);
        }
        golden
    }
}

fn load(device: &Cpu, name: &str) -> Model<Cpu> {
    let checkpoint = open(&format!("tests/golden/{name}"));
    Model::load(device, &checkpoint, Storage::F32, true).unwrap()
}

/// The largest distance of two lists of the same length; NaN if there is one.
fn distance<A: Into<f64> + Copy, B: Into<f64> + Copy>(a: &[A], b: &[B]) -> f64 {
    assert_eq!(a.len(), b.len());
    let distances = a.iter().zip(b).map(|(&a, &b)| (a.into() - b.into()).abs());
    distances.fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

#[track_caller]
fn assert_within(what: &str, distance: f64, bound: f64) {
    println!("{what}: {distance:.1e} (at most {bound:.0e})");
    assert!(distance <= bound, "{what}: {distance:e} is above {bound:e}");
}

#[test]
fn logits_log_probabilities_and_entropies() {
    let device = Cpu::new();
    for name in MODELS {
        let (golden, model) = (Golden::read(name), load(&device, name));
        let mut batch = Batch::new();
        for sequence in &golden.sequences {
            batch.push_group::<Vec<u32>>(&sequence.tokens, &[]);
        }
        let rows = batch.rows();
        for sequence in &golden.sequences {
            batch.push_text(&sequence.tokens);
        }
        let mut ws =
            Workspace::new(&device, &model.config, batch.rows(), Purpose::Forward).unwrap();
        model.forward(&device, &mut ws, &batch).unwrap();

        let shape = HeadShape {
            rows,
            hidden: model.config.hidden,
            vocab: model.config.vocab_size,
        };
        let head = model.params.head.as_ref().unwrap_or(&model.params.embed);
        let mut logits = device.zeros(rows * shape.vocab).unwrap();
        device
            .logits(shape, ws.hidden(), head.weight(), &mut logits)
            .unwrap();
        let mut start = 0;
        for (i, sequence) in golden.sequences.iter().enumerate() {
            let end = start + sequence.tokens.len() * shape.vocab;
            let expected = &golden.tensors[&format!("logits.{i}")];
            let d = distance(&logits[start..end], expected);
            assert_within(&format!("{name}: logits {i}"), d, 5e-5);
            start = end;
        }

        model.logprobs(&device, &mut ws, &batch, 1.0).unwrap();
        assert_eq!(batch.answers.len(), 2);
        for (i, (sequence, at)) in golden.sequences.iter().zip(&batch.answers).enumerate() {
            let range = at.start..at.start + at.len;
            let d = distance(&ws.head.logprob[range.clone()], &sequence.logprobs);
            assert_within(&format!("{name}: log-probabilities {i}"), d, 2e-5);
            let d = distance(&ws.head.entropy[range], &sequence.entropy);
            assert_within(&format!("{name}: entropies {i}"), d, 2e-5);
        }
    }
}

#[test]
fn greedy_continuations() {
    let device = Cpu::new();
    let tokenizer = any_tokenizer();
    for name in MODELS {
        let (golden, model) = (Golden::read(name), load(&device, name));
        let requests: Vec<Request> = golden
            .sequences
            .iter()
            .map(|s| Request {
                prompt: s.tokens.clone(),
                samples: 1,
                seed: 0,
            })
            .collect();
        let settings = SamplingSettings {
            temperature: 0.0,
            max_tokens: golden.sequences[0].greedy.len(),
            ..SamplingSettings::default()
        };
        let config = EngineConfig::for_length(2, 64);
        let stops = no_stops(&tokenizer);
        let done = generate(&device, &model, config, &requests, &settings, stops);
        for (completion, sequence) in done.iter().zip(&golden.sequences) {
            assert_eq!(completion.tokens, sequence.greedy, "{name}");
        }
        assert_eq!(done.len(), golden.sequences.len());
    }
}

/// What a loss and its gradients are computed with.
struct Pass<'a> {
    device: &'a Cpu,
    case: &'a GrpoCase,
    batch: Batch,
    ws: Workspace<Cpu>,
    grads: Params<<Cpu as Device>::Buf<f32>>,
    stats: Vec<SequenceStats>,
}

impl<'a> Pass<'a> {
    fn new(device: &'a Cpu, model: &Model<Cpu>, case: &'a GrpoCase, batch: Batch) -> Self {
        let purpose = Purpose::Train { recompute: false };
        Self {
            device,
            case,
            ws: Workspace::new(device, &model.config, batch.rows(), purpose).unwrap(),
            grads: model.zeros_like(device).unwrap(),
            batch,
            stats: Vec::new(),
        }
    }

    /// One prompt and all of its answers.
    fn shared(device: &'a Cpu, model: &Model<Cpu>, case: &'a GrpoCase) -> Self {
        let mut batch = Batch::new();
        batch.push_group(&case.prompt, &case.answers);
        Self::new(device, model, case, batch)
    }

    /// The prompt once for each answer.
    fn apart(device: &'a Cpu, model: &Model<Cpu>, case: &'a GrpoCase) -> Self {
        let mut batch = Batch::new();
        for answer in &case.answers {
            batch.push_group(&case.prompt, &[answer]);
        }
        Self::new(device, model, case, batch)
    }

    fn run(&mut self, model: &Model<Cpu>) {
        let (device, case, ws) = (self.device, self.case, &mut self.ws);
        model.forward(device, ws, &self.batch).unwrap();
        model.logprobs(device, ws, &self.batch, 1.0).unwrap();
        let answers = case.answers.len();
        let mut offsets: Vec<u32> = self.batch.answers.iter().map(|a| a.start as u32).collect();
        offsets.push(self.batch.targets.len() as u32);
        let config = GrpoConfig {
            clip_low: case.clip_low,
            clip_high: case.clip_high,
            dual_clip: Some(case.dual_clip),
            kl_coef: case.kl_beta,
            ..GrpoConfig::default()
        };
        let mut stats = device.zeros::<SequenceStats>(answers).unwrap();
        device
            .grpo_loss(
                &config,
                answers,
                self.batch.targets.len(),
                &device.upload(&offsets).unwrap(),
                &device
                    .upload(&vec![1.0 / case.num_tokens as f32; answers])
                    .unwrap(),
                &device.upload(&case.advantages).unwrap(),
                &ws.head.logprob,
                &device.upload(&case.old_logprobs.concat()).unwrap(),
                Some(&device.upload(&case.ref_logprobs.concat()).unwrap()),
                &mut ws.head.dlogprob,
                &mut stats,
            )
            .unwrap();
        self.stats = stats.to_vec();
        for grad in self.grads.iter_mut() {
            device.fill_zero(grad).unwrap();
        }
        model
            .backward(device, ws, &self.batch, &mut self.grads)
            .unwrap();
    }

    fn logprobs(&self) -> &[f32] {
        &self.ws.head.logprob[..self.batch.targets.len()]
    }

    fn sum(&self, of: impl Fn(&SequenceStats) -> f32) -> f64 {
        self.stats.iter().map(|s| f64::from(of(s))).sum()
    }

    fn loss(&self) -> f64 {
        self.sum(|s| s.loss)
    }

    /// The global norm of the gradients, and the factor that clips it.
    fn norm(&self, max_norm: f32) -> (f32, <Cpu as Device>::Buf<f32>) {
        let count = self.grads.iter().count();
        let mut squares = self.device.zeros(count).unwrap();
        for (i, grad) in self.grads.iter().enumerate() {
            let len = grad.len();
            self.device
                .sum_of_squares(len, grad, &mut squares, i)
                .unwrap();
        }
        let mut norm = self.device.zeros(1).unwrap();
        let mut scale = self.device.zeros(1).unwrap();
        self.device
            .clip_scale(count, max_norm, &squares, &mut norm, &mut scale)
            .unwrap();
        (norm[0], scale)
    }
}

/// Values of a tree by the checkpoint's names.
fn by_name<'a>(
    model: &Model<Cpu>,
    values: impl Iterator<Item = &'a [f32]>,
) -> BTreeMap<String, Vec<f32>> {
    let mut named = BTreeMap::new();
    for (spec, mut values) in Params::specs(&model.config).iter().zip(values) {
        for (name, rows) in &spec.parts {
            let (part, rest) = values.split_at(rows * spec.columns);
            named.insert(name.clone(), part.to_vec());
            values = rest;
        }
        assert!(values.is_empty());
    }
    named
}

/// The golden tensors whose name begins with `prefix`, without it.
fn with_prefix<'a>(golden: &'a Golden, prefix: &str) -> BTreeMap<&'a str, &'a Vec<f32>> {
    let tensors = golden.tensors.iter();
    tensors
        .filter_map(|(name, values)| Some((name.strip_prefix(prefix)?, values)))
        .collect()
}

#[test]
fn grpo_loss_and_every_gradient() {
    let device = Cpu::new();
    for name in MODELS {
        let (golden, model) = (Golden::read(name), load(&device, name));
        let case = &golden.grpo;
        let expected = with_prefix(&golden, "grad.");
        let mut shared = Pass::shared(&device, &model, case);
        let mut apart = Pass::apart(&device, &model, case);
        assert!(shared.batch.rows() < apart.batch.rows());
        for (way, pass) in [("shared prompt", &mut shared), ("apart", &mut apart)] {
            pass.run(&model);
            let what = |of: &str| format!("{name}, {way}: {of}");
            let d = distance(pass.logprobs(), &case.logprobs.concat());
            assert_within(&what("log-probabilities"), d, 2e-5);
            assert_within(&what("loss"), (pass.loss() - case.loss).abs(), 2e-6);
            let kl_mean = pass.sum(|s| s.kl) / case.num_tokens as f64;
            assert_within(&what("KL"), (kl_mean - case.kl_mean).abs(), 2e-6);
            let clipped = Clipped {
                low: pass.sum(|s| s.clipped_low) as f32,
                high: pass.sum(|s| s.clipped_high) as f32,
                dual: pass.sum(|s| s.clipped_dual) as f32,
            };
            assert_eq!(clipped, case.clipped_tokens, "{name}, {way}");
            let norm = f64::from(pass.norm(1.0).0);
            let d = (norm / case.grad_norm - 1.0).abs();
            assert_within(&what("gradient norm"), d, 1e-5);

            let grads = by_name(&model, pass.grads.iter().map(|g| &**g));
            assert!(grads.keys().eq(expected.keys()), "{name}: {grads:?}");
            for (parameter, expected) in &expected {
                let largest = distance(expected, &vec![0.0; expected.len()]);
                let d = distance(&grads[*parameter], expected) / largest;
                assert_within(&what(parameter), d, 2e-5);
            }
        }
        let bits = |pass: &Pass| {
            pass.logprobs()
                .iter()
                .map(|x| x.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(&shared), bits(&apart), "{name}");
    }
}

#[test]
fn two_steps_of_adamw() {
    let device = Cpu::new();
    let mut with_parameters = 0;
    for name in MODELS {
        let (golden, mut model) = (Golden::read(name), load(&device, name));
        let case = &golden.adamw;
        let specs = Params::specs(&model.config);
        let mut pass = Pass::shared(&device, &model, &golden.grpo);
        let mut m = model.zeros_like(&device).unwrap();
        let mut v = model.zeros_like(&device).unwrap();
        for step in 1..=2 {
            pass.run(&model);
            let expected = case.losses[step - 1];
            let what = |of: &str| format!("{name}: {of} {step}");
            assert_within(&what("loss"), (pass.loss() / expected - 1.0).abs(), 1e-4);
            let (norm, scale) = pass.norm(case.max_norm);
            // After the first step the few parameters whose gradient's sign is a matter of rounding
            // lie elsewhere, and all gradients with them.
            let d = (f64::from(norm) / case.grad_norms[step - 1] - 1.0).abs();
            assert_within(&what("gradient norm"), d, [1e-5, 1e-4][step - 1]);

            let leaves = specs.iter().zip(model.params.iter_mut());
            let moments = m.iter_mut().zip(v.iter_mut());
            for (((spec, stored), (m, v)), grad) in leaves.zip(moments).zip(pass.grads.iter()) {
                let config = AdamWConfig {
                    learning_rate: case.lr,
                    beta1: case.beta1,
                    beta2: case.beta2,
                    eps: case.eps,
                    weight_decay: if spec.matrix { case.weight_decay } else { 0.0 },
                    step: step as u32,
                };
                let Stored::F32(param) = stored else {
                    panic!("loaded as f32");
                };
                device
                    .adamw(&config, spec.len(), &scale, grad, param, m, v, None)
                    .unwrap();
            }

            let expected = with_prefix(&golden, &format!("step{step}."));
            if expected.is_empty() {
                continue;
            }
            with_parameters += 1;
            let downloaded: Vec<Vec<f32>> = model
                .params
                .iter()
                .map(|p| p.download(&device).unwrap())
                .collect();
            let params = by_name(&model, downloaded.iter().map(Vec::as_slice));
            assert!(params.keys().eq(expected.keys()), "{name}");
            let (mut off, mut total) = (0, 0);
            for (parameter, expected) in &expected {
                let ours = &params[*parameter];
                total += ours.len();
                off += ours
                    .iter()
                    .zip(*expected)
                    .filter(|&(&a, &b)| distance(&[a], &[b]) > 1e-5)
                    .count();
            }
            let share = off as f64 / total as f64;
            assert_within(
                &what("share of parameters off"),
                share,
                [1e-3, 1e-2][step - 1],
            );
        }
        pass.run(&model);
        let d = (pass.loss() / case.losses[2] - 1.0).abs();
        assert_within(&format!("{name}: loss 3"), d, 1e-4);
    }
    assert_eq!(with_parameters, 4);
}
