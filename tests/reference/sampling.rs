//! Sampling, straight from the definition, and rows to try it on, for the tests of every back end.
#![allow(dead_code)] // each test file uses a part

use dust_kernels::sampling::{RowSampling, Sampling};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens, log-probabilities, kept masses.
pub type Samples = (Vec<u32>, Vec<f32>, Vec<f32>);

pub fn sample<D: Sampling>(
    device: &D,
    vocab: usize,
    logits: &[f32],
    params: &[RowSampling],
) -> Samples {
    let rows = params.len();
    let mut tokens = device.zeros(rows).unwrap();
    let (mut logprob, mut kept) = (device.zeros(rows).unwrap(), device.zeros(rows).unwrap());
    let (logits, params) = (
        device.upload(logits).unwrap(),
        device.upload(params).unwrap(),
    );
    device
        .sample(
            rows,
            vocab,
            &logits,
            &params,
            &mut tokens,
            &mut logprob,
            &mut kept,
        )
        .unwrap();
    (
        device.download(&tokens).unwrap(),
        device.download(&logprob).unwrap(),
        device.download(&kept).unwrap(),
    )
}

/// The bits of samples: NaN equals NaN.
pub fn bits(samples: &Samples) -> Vec<[u32; 3]> {
    let (tokens, logprob, kept) = samples;
    let rows = tokens.iter().zip(logprob).zip(kept);
    rows.map(|((&t, l), k)| [t, l.to_bits(), k.to_bits()])
        .collect()
}

pub fn random(seed: u64, len: usize, range: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-range..range)).collect()
}

/// Probabilities after temperature and filters, straight from the definition, in f64.
pub struct Reference {
    /// By token; 0 where a filter dropped it.
    pub filtered: Vec<f64>,
    pub kept: f64,
    pub lse: f64,
    /// Whether a filter's decision hangs on the last digits.
    pub close: bool,
}

pub fn reference(logits: &[f32], params: &RowSampling) -> Reference {
    let inverse = 1.0 / params.temperature;
    let z: Vec<f64> = logits.iter().map(|&l| f64::from(l * inverse)).collect();
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    let probability: Vec<f64> = z.iter().map(|z| (z - lse).exp()).collect();
    let mut order: Vec<usize> = (0..z.len()).collect();
    // Stable: equal logits stay in the order of tokens.
    order.sort_by(|&a, &b| z[b].partial_cmp(&z[a]).unwrap());
    let mut close = false;
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let mass: f64 = order.iter().map(|&t| probability[t]).sum();
        let (mut sum, mut keep) = (0.0, 0);
        for &t in &order {
            sum += probability[t] / mass;
            keep += 1;
            close |= (sum - f64::from(params.top_p)).abs() < 2e-6;
            if sum >= f64::from(params.top_p) {
                break;
            }
        }
        order.truncate(keep);
    }
    let best = probability[order[0]];
    order.retain(|&t| {
        let share = probability[t] / best;
        close |= (share - f64::from(params.min_p)).abs() < 1e-6 * share && share < 1.0;
        share >= f64::from(params.min_p).min(1.0)
    });
    let kept: f64 = order.iter().map(|&t| probability[t]).sum();
    let mut filtered = vec![0.0; z.len()];
    for t in order {
        filtered[t] = probability[t] / kept;
    }
    Reference {
        filtered,
        kept,
        lse,
        close,
    }
}

pub fn filters() -> Vec<RowSampling> {
    let mut all = Vec::new();
    for top_k in [0, 1, 3, 40, 100_000] {
        for top_p in [1.0, 0.95, 0.5, 0.0] {
            for min_p in [0.0, 0.05, 1.0] {
                for temperature in [1.0, 0.6] {
                    all.push(RowSampling {
                        top_k,
                        top_p,
                        min_p,
                        temperature,
                        ..Default::default()
                    });
                }
            }
        }
    }
    all
}

/// Logits of several shapes: flat, peaked, with many ties, with masked tokens.
pub fn shapes(vocab: usize) -> Vec<Vec<f32>> {
    let flat = random(1, vocab, 0.5);
    let peaked: Vec<f32> = random(2, vocab, 1.0)
        .iter()
        .map(|x| 30.0 * x * x * x)
        .collect();
    let tied: Vec<f32> = random(3, vocab, 2.0).iter().map(|x| x.round()).collect();
    let mut masked = random(4, vocab, 4.0);
    masked[1..]
        .iter_mut()
        .step_by(2)
        .for_each(|x| *x = f32::NEG_INFINITY);
    vec![flat, peaked, tied, masked]
}

/// Rows of mixed settings over `vocab` tokens.
pub fn mixed_batch(vocab: usize) -> (Vec<f32>, Vec<RowSampling>) {
    let mut logits = Vec::new();
    let mut params = Vec::new();
    for (i, filter) in filters().into_iter().enumerate() {
        logits.extend(random(i as u64, vocab, 5.0));
        let (seed, sequence, position) = (i as u64 % 3, i as u32, 100 + i as u32);
        params.push(RowSampling {
            seed,
            sequence,
            position,
            ..filter
        });
    }
    (logits, params)
}

/// Rows that must be reported: made of `good` logits, or `good` with settings that are not valid.
pub fn bad_rows(good: &[f32]) -> Vec<(Vec<f32>, RowSampling)> {
    let vocab = good.len();
    let last = vocab - 1;
    let with = |at: usize, value: f32| {
        let mut logits = good.to_vec();
        logits[at] = value;
        logits
    };
    let plain = RowSampling::default();
    let nan = f32::NAN;
    vec![
        (with(0, nan), plain),
        (with(last, nan), plain),
        (with(last - 99, f32::INFINITY), plain),
        (vec![f32::NEG_INFINITY; vocab], plain),
        (vec![nan; vocab], plain),
        (
            with(3, nan),
            RowSampling {
                temperature: 0.0,
                ..plain
            },
        ),
        (
            with(last - 49, nan),
            RowSampling {
                top_k: 5,
                top_p: 0.5,
                min_p: 0.1,
                ..plain
            },
        ),
        (
            good.to_vec(),
            RowSampling {
                temperature: -1.0,
                ..plain
            },
        ),
        (
            good.to_vec(),
            RowSampling {
                temperature: nan,
                ..plain
            },
        ),
        (
            good.to_vec(),
            RowSampling {
                temperature: f32::INFINITY,
                ..plain
            },
        ),
        // Its reciprocal is infinite.
        (
            good.to_vec(),
            RowSampling {
                temperature: 1e-39,
                ..plain
            },
        ),
        (
            good.to_vec(),
            RowSampling {
                top_p: nan,
                ..plain
            },
        ),
        (
            good.to_vec(),
            RowSampling {
                min_p: nan,
                ..plain
            },
        ),
    ]
}
