//! Linear layers, straight from the definition, for the tests of every back end.
#![allow(dead_code)] // each test file uses a part

use dust_kernels::gemm::LinearShape;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One call's arguments.
pub struct Case {
    pub shape: LinearShape,
    pub x: Vec<f32>,
    /// Values that bf16 can hold.
    pub w: Vec<f32>,
    pub bias: Vec<f32>,
    pub dy: Vec<f32>,
    pub dw: Vec<f32>,
}

impl Case {
    pub fn new((rows, inputs, outputs): (usize, usize, usize), seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random =
            |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let w = random(outputs * inputs);
        Case {
            shape: LinearShape {
                rows,
                inputs,
                outputs,
            },
            x: random(rows * inputs),
            w: w.iter().map(|&w| bf16::from_f32(w).to_f32()).collect(),
            bias: random(outputs),
            dy: random(rows * outputs),
            dw: random(outputs * inputs),
        }
    }

    /// With arguments that bf16 can hold, those that stay f32 aside.
    pub fn in_bf16(mut self) -> Self {
        for x in self.x.iter_mut().chain(&mut self.dy) {
            *x = bf16::from_f32(*x).to_f32();
        }
        self
    }
}

/// y, dx, dw, dbias.
#[derive(Clone)]
pub struct Results<T = f32>(pub [Vec<T>; 4]);

impl Results {
    pub fn bits(&self) -> [Vec<u32>; 4] {
        self.0
            .each_ref()
            .map(|v| v.iter().map(|x| x.to_bits()).collect())
    }
}

/// Plain loops, one sum after the other, in f64 or f32.
macro_rules! naive {
    ($name:ident, $t:ty) => {
        pub fn $name(case: &Case) -> Results<$t> {
            let LinearShape {
                rows,
                inputs,
                outputs,
            } = case.shape;
            let wide = |v: &[f32]| -> Vec<$t> { v.iter().map(|&x| <$t>::from(x)).collect() };
            let (x, w, dy) = (wide(&case.x), wide(&case.w), wide(&case.dy));
            let bias = wide(&case.bias);
            let mut y = vec![0.0; rows * outputs];
            let mut dx = vec![0.0; rows * inputs];
            let mut dw = vec![0.0; outputs * inputs];
            let mut dbias = vec![0.0; outputs];
            for r in 0..rows {
                for o in 0..outputs {
                    let g = dy[r * outputs + o];
                    let mut sum = 0.0;
                    for i in 0..inputs {
                        sum += x[r * inputs + i] * w[o * inputs + i];
                        dx[r * inputs + i] += g * w[o * inputs + i];
                        dw[o * inputs + i] += g * x[r * inputs + i];
                    }
                    y[r * outputs + o] = sum + bias[o];
                    dbias[o] += g;
                }
            }
            for (dw, before) in dw.iter_mut().zip(&case.dw) {
                *dw += <$t>::from(*before);
            }
            for (dbias, before) in dbias.iter_mut().zip(&bias) {
                *dbias += before;
            }
            Results([y, dx, dw, dbias])
        }
    };
}
naive!(reference, f64);
naive!(sequential, f32);

pub fn worst(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(&g, w)| (f64::from(g) - w).abs())
        // Not `max`, which would pass over a NaN.
        .fold(0.0, |a, b| if b <= a { a } else { b })
}
