//! The fused head, straight from the definition, for the tests of every back end.
#![allow(dead_code)] // each test file uses a part

use dust_kernels::logprob::HeadShape;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One call's arguments.
pub struct Case {
    pub shape: HeadShape,
    pub temperature: f32,
    pub x: Vec<f32>,
    /// Values that bf16 can hold.
    pub head: Vec<f32>,
    pub targets: Vec<u32>,
    pub dlogprob: Vec<f32>,
    pub dhead: Vec<f32>,
}

impl Case {
    pub fn new((rows, hidden, vocab): (usize, usize, usize), temperature: f32, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |len: usize, scale: f32| -> Vec<f32> {
            (0..len)
                .map(|_| rng.random_range(-1.0..1.0) * scale)
                .collect()
        };
        let x = random(rows * hidden, 3.0);
        let head = random(vocab * hidden, 3.0 / (hidden as f32).sqrt());
        let mut dlogprob = random(rows, 1.0);
        // A third of the rows has no gradient, as prompts have.
        dlogprob
            .iter_mut()
            .skip(1)
            .step_by(3)
            .for_each(|d| *d = 0.0);
        let dhead = random(vocab * hidden, 0.1);
        Case {
            shape: HeadShape {
                rows,
                hidden,
                vocab,
            },
            temperature,
            x,
            head: head.iter().map(|&w| bf16::from_f32(w).to_f32()).collect(),
            // The first and the last token are among them.
            targets: (0..rows)
                .map(|r| match r {
                    0 => vocab as u32 - 1,
                    1 => 0,
                    _ => rng.random_range(0..vocab as u32),
                })
                .collect(),
            dlogprob,
            dhead,
        }
    }

    /// With hidden states that bf16 can hold.
    pub fn in_bf16(mut self) -> Self {
        for x in &mut self.x {
            *x = bf16::from_f32(*x).to_f32();
        }
        self
    }
}

/// logprob, lse, entropy, dx, dhead.
pub struct Results<T = f32>(pub [Vec<T>; 5]);

impl Results {
    pub fn bits(&self) -> [Vec<u32>; 5] {
        self.0
            .each_ref()
            .map(|v| v.iter().map(|x| x.to_bits()).collect())
    }
}

/// All logits of a row at once, sums one after the other, in f64 or f32; the gradients of the logits
/// as they are or rounded.
macro_rules! naive {
    ($name:ident, $t:ty, $stored:expr) => {
        pub fn $name(case: &Case) -> Results<$t> {
            let HeadShape {
                rows,
                hidden,
                vocab,
            } = case.shape;
            let wide = |v: &[f32]| -> Vec<$t> { v.iter().map(|&x| <$t>::from(x)).collect() };
            let (xs, head) = (wide(&case.x), wide(&case.head));
            let t = <$t>::from(case.temperature);
            let (mut logprob, mut lses, mut entropy) = (vec![], vec![], vec![]);
            let mut dx = vec![0.0; rows * hidden];
            let mut dhead = vec![0.0; vocab * hidden];
            for r in 0..rows {
                let x = &xs[r * hidden..][..hidden];
                let z: Vec<$t> = (0..vocab)
                    .map(|v| {
                        let w = &head[v * hidden..][..hidden];
                        let dot = x.iter().zip(w).fold(0.0, |s, (x, w)| s + x * w);
                        dot / t
                    })
                    .collect();
                let max = z.iter().copied().fold(<$t>::NEG_INFINITY, <$t>::max);
                let lse = max + z.iter().fold(0.0, |s: $t, z| s + (z - max).exp()).ln();
                let mean = z.iter().fold(0.0, |s, z| s + (z - lse).exp() * z);
                let target = case.targets[r] as usize;
                logprob.push(z[target] - lse);
                lses.push(lse);
                entropy.push(lse - mean);
                let g = <$t>::from(case.dlogprob[r]);
                for v in 0..vocab {
                    let hit = if v == target { 1.0 } else { 0.0 };
                    let stored: fn($t) -> $t = $stored;
                    let dz = stored(g * (hit - (z[v] - lse).exp()) / t);
                    for i in 0..hidden {
                        dx[r * hidden + i] += dz * head[v * hidden + i];
                        dhead[v * hidden + i] += dz * x[i];
                    }
                }
            }
            for (d, before) in dhead.iter_mut().zip(&case.dhead) {
                *d += <$t>::from(*before);
            }
            Results([logprob, lses, entropy, dx, dhead])
        }
    };
}
naive!(reference, f64, |dz| dz);
naive!(sequential, f32, |dz| dz);
naive!(bf16_gradients, f64, |dz| f64::from(bf16::from_f64(dz)));

pub fn worst(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(&g, w)| (f64::from(g) - w).abs())
        // Not `max`, which would pass over a NaN.
        .fold(0.0, |a, b| if b <= a { a } else { b })
}
