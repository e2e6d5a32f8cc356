//! AdamW in one pass over memory, and norms from f64 sums of fixed blocks.
//!
//! The product of two f32 is exact in f64, so a sum of squares has the same bits with or without
//! fused multiply-add: it depends on the block's size and the number of partial sums alone.

use super::Cpu;
use super::pool::SharedMut;
use super::simd::{Kernel, Simd};
use crate::Result;
use crate::adamw::{AdamW, AdamWConfig, check_adamw, check_clip_scale, check_sum_of_squares};
use half::bf16;

/// Parameters of a task: its five runs of memory fit the second-level cache.
const TASK: usize = 16 * 1024;
/// Elements of a block of [`AdamW::sum_of_squares`].
const BLOCK: usize = 32 * 1024;
/// Partial sums of a block.
const SUMS: usize = 16;

/// A step's factors, made once in f64.
#[derive(Clone, Copy)]
struct Step {
    scale: f32,
    learning_rate: f32,
    beta1: f32,
    beta2: f32,
    /// `1 / (1 - beta1^step)`.
    correct1: f32,
    /// `1 / (1 - beta2^step)`.
    correct2: f32,
    eps: f32,
    weight_decay: f32,
}

struct Update<'a> {
    step: Step,
    grad: &'a [f32],
    param: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

impl Kernel for Update<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let len = self.param.len();
        let grad = self.grad.as_ptr();
        let (param, m, v) = (
            self.param.as_mut_ptr(),
            self.m.as_mut_ptr(),
            self.v.as_mut_ptr(),
        );
        let mut i = 0;
        // SAFETY: inside of `dispatch`; the four slices have `len` elements, and a part is what is
        // left of them.
        unsafe {
            while i + S::LANES <= len {
                let old = [param, m, v].map(|p| S::load(p.add(i)));
                let new = update(self.step, S::load(grad.add(i)), old);
                new[0].store(param.add(i));
                new[1].store(m.add(i));
                new[2].store(v.add(i));
                i += S::LANES;
            }
            if i < len {
                let n = len - i;
                let g = S::load_part(grad.add(i), n, 0.0);
                let p = S::load_part(param.add(i), n, 0.0);
                let m_i = S::load_part(m.add(i), n, 0.0);
                let v_i = S::load_part(v.add(i), n, 0.0);
                let new = update(self.step, g, [p, m_i, v_i]);
                new[0].store_part(param.add(i), n);
                new[1].store_part(m.add(i), n);
                new[2].store_part(v.add(i), n);
            }
        }
    }
}

/// Parameter and moments after a step.
///
/// # Safety
/// The level's instructions are there.
#[inline(always)]
unsafe fn update<S: Simd>(step: Step, grad: S, [p, m, v]: [S; 3]) -> [S; 3] {
    // SAFETY: by the caller.
    unsafe {
        let g = grad.mul(S::splat(step.scale));
        let m = m.fma(S::splat(step.beta1), g.mul(S::splat(1.0 - step.beta1)));
        let v = v.fma(
            S::splat(step.beta2),
            g.mul(g).mul(S::splat(1.0 - step.beta2)),
        );
        let root = v.mul(S::splat(step.correct2)).sqrt();
        let change = m
            .mul(S::splat(step.correct1))
            .div(root.add(S::splat(step.eps)));
        let change = p.fma(S::splat(step.weight_decay), change);
        [change.fma(S::splat(-step.learning_rate), p), m, v]
    }
}

struct Squares<'a>(&'a [f32]);

impl Kernel for Squares<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        let mut sums = [0.0f64; SUMS];
        let (runs, rest) = self.0.as_chunks::<SUMS>();
        for run in runs {
            for j in 0..SUMS {
                sums[j] += f64::from(run[j]) * f64::from(run[j]);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums.iter().sum()
    }
}

impl AdamW for Cpu {
    fn adamw(
        &self,
        config: &AdamWConfig,
        len: usize,
        scale: &Self::Buf<f32>,
        grad: &Self::Buf<f32>,
        param: &mut Self::Buf<f32>,
        m: &mut Self::Buf<f32>,
        v: &mut Self::Buf<f32>,
        copy: Option<&mut Self::Buf<bf16>>,
    ) -> Result<()> {
        let lens = [scale.len(), grad.len(), param.len(), m.len(), v.len()];
        check_adamw(config, len, lens, copy.as_ref().map(|copy| copy.len()))?;
        if scale[0] == 0.0 {
            return Ok(());
        }
        let [correct1, correct2] = config.corrections();
        let step = Step {
            scale: scale[0],
            learning_rate: config.learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            correct1,
            correct2,
            eps: config.eps,
            weight_decay: config.weight_decay,
        };
        let (param, m, v) = (SharedMut::new(param), SharedMut::new(m), SharedMut::new(v));
        let copy = copy.map(|copy| SharedMut::new(copy));
        self.pool.run(len.div_ceil(TASK), |task| {
            let start = task * TASK;
            let n = TASK.min(len - start);
            let grad = &grad[start..start + n];
            // SAFETY: runs of different tasks do not overlap, in none of the four buffers.
            let (param, m, v) =
                unsafe { (param.slice(start, n), m.slice(start, n), v.slice(start, n)) };
            self.level.dispatch(Update {
                step,
                grad,
                param,
                m,
                v,
            });
            if let Some(copy) = &copy {
                // SAFETY: as above.
                let copy = unsafe { copy.slice(start, n) };
                for (copy, &p) in copy.iter_mut().zip(&*param) {
                    *copy = bf16::from_f32(p);
                }
            }
        });
        Ok(())
    }

    fn sum_of_squares(
        &self,
        len: usize,
        x: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
        index: usize,
    ) -> Result<()> {
        check_sum_of_squares(len, x.len(), out.len(), index)?;
        let x = &x[..len];
        let mut sums = vec![0.0f64; len.div_ceil(BLOCK)];
        self.pool.chunks_mut(&mut sums, 1, |i, sum| {
            let end = len.min((i + 1) * BLOCK);
            sum[0] = self.level.dispatch(Squares(&x[i * BLOCK..end]));
        });
        out[index] = sums.iter().sum::<f64>() as f32;
        Ok(())
    }

    fn clip_scale(
        &self,
        sums: usize,
        max_norm: f32,
        squares: &Self::Buf<f32>,
        norm: &mut Self::Buf<f32>,
        scale: &mut Self::Buf<f32>,
    ) -> Result<()> {
        check_clip_scale(sums, max_norm, [squares.len(), norm.len(), scale.len()])?;
        // From +0, as the sum of nothing is -0.
        let total = squares[..sums]
            .iter()
            .fold(0.0, |sum, &s| sum + f64::from(s));
        let root = total.sqrt() as f32;
        norm[0] = root;
        scale[0] = if root.is_finite() {
            (max_norm / root).min(1.0)
        } else {
            0.0
        };
        Ok(())
    }
}
