//! The head on the CPU, forward and backward, a block of the vocabulary at a time.
//!
//! The logits are [`super::gemm::dot`]'s dot products, so they have the same bits in training, where
//! a block of them lives for a moment in cache, and in rollout, where they are written out.
//!
//! The log-sum-exp has one order, too: the vocabulary is cut into blocks of [`BLOCK`] from token 0,
//! each is reduced from a fresh [`State`], and the states are merged from left to right.
//! [`states`] and [`State::finish`] do this for logits in memory.
//!
//! Backward handles rows in groups of [`ROWS`] and the vocabulary in spans of [`SPAN`]: the
//! gradients of one group's logits in one span are computed on all threads, then both products with
//! them. That buffer of 2 MiB is all that is ever stored of tokens x vocabulary.

use super::gemm::dot::Dots;
use super::gemm::outer::Product;
use super::gemm::{self, Stored, with_weight};
use super::pool::SharedMut;
use super::scratch::Scratch;
use super::simd::{Kernel, Level, Simd};
use super::{Cpu, CpuBuf};
use crate::error::check_indices;
use crate::gemm::LinearShape;
use crate::logprob::{
    HeadShape, Logprob, check_logits, check_logprob, check_logprob_backward, inverse_temperature,
};
use crate::{Result, Weight};

/// Logits that one state reduces.
pub(crate) const BLOCK: usize = 512;
/// Rows of a forward task: its logits are 256 KiB.
const TASK_ROWS: usize = 128;
/// Rows of a group of the backward pass. A multiple of the outer products' [`gemm::outer::KC`].
const ROWS: usize = 512;
/// Tokens of a span of the backward pass; likewise.
const SPAN: usize = 1024;
const _: () = assert!(ROWS.is_multiple_of(gemm::outer::KC) && SPAN.is_multiple_of(gemm::outer::KC));

/// What the softmax of one row comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LogSumExp {
    /// `ln sum exp z`: the log-probability of token `t` is `z[t] - lse`, in f32.
    pub lse: f32,
    /// In nats.
    pub entropy: f32,
}

/// Reduces the blocks of one row, with `z = logit * inverse_temperature` in f32.
///
/// Logits of negative infinity have no share; a NaN makes its block's sums NaN.
pub(crate) fn states(
    level: Level,
    logits: &[f32],
    inverse_temperature: f32,
) -> impl Iterator<Item = State> {
    logits.chunks(BLOCK).map(move |logits| {
        level.dispatch(Reduce {
            logits,
            inverse_temperature,
        })
    })
}

/// The softmax of some of a row's tokens.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct State {
    /// The greatest z; the least finite number where there is none.
    pub max: f32,
    /// Sum of `e^(z - max)`.
    pub sum: f32,
    /// Sum of `e^(z - max) (z - max)`.
    weighted: f32,
}

impl State {
    /// Merges from left to right, in f64: there are few states.
    pub(crate) fn finish(states: impl Iterator<Item = State>) -> LogSumExp {
        let (mut max, mut sum, mut weighted) = (f64::from(f32::MIN), 0.0f64, 0.0f64);
        for state in states {
            let to = max.max(f64::from(state.max));
            let rescale = |max: f64, sum: f64, weighted: f64| {
                let factor = (max - to).exp();
                (factor * sum, factor * (weighted + (max - to) * sum))
            };
            let left = rescale(max, sum, weighted);
            let right = rescale(
                f64::from(state.max),
                f64::from(state.sum),
                f64::from(state.weighted),
            );
            (max, sum, weighted) = (to, left.0 + right.0, left.1 + right.1);
        }
        LogSumExp {
            lse: (max + sum.ln()) as f32,
            entropy: (sum.ln() - weighted / sum) as f32,
        }
    }
}

/// Reduces a block of logits.
struct Reduce<'a> {
    logits: &'a [f32],
    inverse_temperature: f32,
}

impl Kernel for Reduce<'_> {
    type Output = State;
    #[inline(always)]
    fn run<S: Simd>(self) -> State {
        let whole = self.logits.chunks_exact(S::LANES);
        let rest = whole.remainder();
        // SAFETY: inside of `dispatch`; the runs have `LANES` values, the rest has fewer.
        unsafe {
            let rest = S::load_part(rest.as_ptr(), rest.len(), f32::NEG_INFINITY);
            let mut max = S::splat(f32::MIN);
            for run in whole.clone() {
                max = S::load(run.as_ptr()).max(max);
            }
            // Rounding is monotonic: the greatest product is the product of the greatest.
            let scale = S::splat(self.inverse_temperature);
            let max = (rest.max(max).max_lane() * self.inverse_temperature).max(f32::MIN);
            let mut sums = Sums {
                max: S::splat(max),
                sum: S::zero(),
                weighted: S::zero(),
            };
            for run in whole {
                sums.add(S::load(run.as_ptr()).mul(scale));
            }
            sums.add(rest.mul(scale));
            State {
                max,
                sum: sums.sum.sum(),
                weighted: sums.weighted.sum(),
            }
        }
    }
}

struct Sums<S> {
    max: S,
    sum: S,
    weighted: S,
}

impl<S: Simd> Sums<S> {
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn add(&mut self, z: S) {
        // SAFETY: by the caller.
        unsafe {
            // Where e^d is 0, d must not be infinite. A NaN comes through max's second operand.
            let d = S::splat(-100.0).max(z.sub(self.max));
            let e = d.exp();
            self.sum = self.sum.add(e);
            self.weighted = e.fma(d, self.weighted);
        }
    }
}

/// Turns logits of one row into gradients: `-dlogprob * exp(z - lse) / temperature`.
struct Gradient<'a> {
    logits: &'a mut [f32],
    inverse_temperature: f32,
    lse: f32,
    dlogprob: f32,
}

impl Kernel for Gradient<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: inside of `dispatch`; each run has its length of values, at most `LANES`.
        unsafe {
            let scale = S::splat(self.inverse_temperature);
            let lse = S::splat(self.lse);
            let factor = S::splat(-self.dlogprob * self.inverse_temperature);
            for run in self.logits.chunks_mut(S::LANES) {
                let (p, n) = (run.as_mut_ptr(), run.len());
                let whole = n == S::LANES;
                let logits = if whole {
                    S::load(p)
                } else {
                    S::load_part(p, n, 0.0)
                };
                let dz = logits.mul(scale).sub(lse).exp().mul(factor);
                if whole {
                    dz.store(p);
                } else {
                    dz.store_part(p, n);
                }
            }
        }
    }
}

impl Cpu {
    fn head_forward<W: Stored>(
        &self,
        shape: HeadShape,
        inverse_temperature: f32,
        x: &[f32],
        head: &[W],
        targets: &[u32],
        logprob: &mut [f32],
        lse: &mut [f32],
        entropy: &mut [f32],
    ) {
        let HeadShape {
            rows,
            hidden,
            vocab,
        } = shape;
        let blocks = vocab.div_ceil(BLOCK);
        let mut states = vec![bytemuck::Zeroable::zeroed(); rows * blocks];
        let shared_states = SharedMut::new(&mut states);
        let shared_targets = SharedMut::new(logprob);
        self.pool.run(blocks * rows.div_ceil(TASK_ROWS), |task| {
            let (r, b) = (task / blocks * TASK_ROWS, task % blocks);
            let rows = TASK_ROWS.min(rows - r);
            let tokens = b * BLOCK..vocab.min((b + 1) * BLOCK);
            let mut logits = Scratch::new(rows * tokens.len());
            let dots = Dots {
                x: &x[r * hidden..],
                w: &head[tokens.start * hidden..],
                bias: None,
                rows,
                inputs: hidden,
                outputs: tokens.len(),
            };
            // SAFETY: `logits` holds that many rows of that many tokens.
            unsafe { dots.write(self.level, logits.as_mut_ptr(), tokens.len()) };
            for (i, logits) in logits.chunks_exact(tokens.len()).enumerate() {
                let row = r + i;
                // SAFETY: no other task has this row and block.
                let state = unsafe { shared_states.slice(row * blocks + b, 1) };
                state[0] = self.level.dispatch(Reduce {
                    logits,
                    inverse_temperature,
                });
                let target = targets[row] as usize;
                if tokens.contains(&target) {
                    // SAFETY: the target lies in one block only.
                    let logprob = unsafe { shared_targets.slice(row, 1) };
                    logprob[0] = logits[target - tokens.start] * inverse_temperature;
                }
            }
        });
        for (row, states) in states.chunks_exact(blocks).enumerate() {
            let result = State::finish(states.iter().copied());
            logprob[row] -= result.lse;
            lse[row] = result.lse;
            entropy[row] = result.entropy;
        }
    }

    fn head_backward<W: Stored>(
        &self,
        shape: HeadShape,
        inverse_temperature: f32,
        x: &[f32],
        head: &[W],
        targets: &[u32],
        lse: &[f32],
        dlogprob: &[f32],
        dx: &mut [f32],
        mut dhead: Option<&mut [f32]>,
    ) {
        let HeadShape {
            rows,
            hidden,
            vocab,
        } = shape;
        dx[..rows * hidden].fill(0.0);
        // Prompts and padding have no gradient; only the other rows are worked on.
        let active: Vec<usize> = (0..rows).filter(|&r| dlogprob[r] != 0.0).collect();
        let most = ROWS.min(active.len());
        let mut group_x = Scratch::new(most * hidden);
        let mut group_dx = Scratch::new(most * hidden);
        let mut dz = Scratch::new(most * SPAN.min(vocab));
        for group in active.chunks(ROWS) {
            for (to, &row) in group_x.chunks_exact_mut(hidden.max(1)).zip(group) {
                to.copy_from_slice(&x[row * hidden..][..hidden]);
            }
            for start in (0..vocab).step_by(SPAN) {
                let span = SPAN.min(vocab - start);
                let w = &head[start * hidden..][..span * hidden];
                let shape = LinearShape {
                    rows: group.len(),
                    inputs: hidden,
                    outputs: span,
                };
                let dz = &mut dz[..group.len() * span];
                gemm::forward(self, shape, &group_x, w, None, dz);
                self.pool.chunks_mut(dz, span, |i, dz| {
                    let row = group[i];
                    self.level.dispatch(Gradient {
                        logits: dz,
                        inverse_temperature,
                        lse: lse[row],
                        dlogprob: dlogprob[row],
                    });
                    let target = (targets[row] as usize).wrapping_sub(start);
                    if let Some(dz) = dz.get_mut(target) {
                        *dz += dlogprob[row] * inverse_temperature;
                    }
                });
                Product {
                    a: dz,
                    a_row: span,
                    a_col: 1,
                    b: w,
                    m: group.len(),
                    n: hidden,
                    k: span,
                    add: start > 0,
                }
                .write(self, &mut group_dx);
                if let Some(dhead) = dhead.as_deref_mut() {
                    Product {
                        a: dz,
                        a_row: 1,
                        a_col: span,
                        b: &group_x[..],
                        m: span,
                        n: hidden,
                        k: group.len(),
                        add: true,
                    }
                    .write(self, &mut dhead[start * hidden..]);
                }
            }
            for (from, &row) in group_dx.chunks_exact(hidden.max(1)).zip(group) {
                dx[row * hidden..][..hidden].copy_from_slice(from);
            }
        }
    }
}

impl Logprob for Cpu {
    fn logprob(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &CpuBuf<f32>,
        head: Weight<'_, Self>,
        targets: &CpuBuf<u32>,
        logprob: &mut CpuBuf<f32>,
        lse: &mut CpuBuf<f32>,
        entropy: &mut CpuBuf<f32>,
    ) -> Result<()> {
        const OP: &str = "logprob";
        let inverse = inverse_temperature(OP, temperature)?;
        let inputs = [x.len(), head.len(), targets.len()];
        check_logprob(shape, inputs, [logprob.len(), lse.len(), entropy.len()])?;
        check_indices(OP, "targets", &targets[..shape.rows], shape.vocab)?;
        if shape.rows > 0 {
            with_weight!(head, |head| self.head_forward(
                shape, inverse, x, head, targets, logprob, lse, entropy
            ));
        }
        Ok(())
    }

    fn logprob_backward(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &CpuBuf<f32>,
        head: Weight<'_, Self>,
        targets: &CpuBuf<u32>,
        lse: &CpuBuf<f32>,
        dlogprob: &CpuBuf<f32>,
        dx: &mut CpuBuf<f32>,
        dhead: Option<&mut CpuBuf<f32>>,
    ) -> Result<()> {
        const OP: &str = "logprob_backward";
        let inverse = inverse_temperature(OP, temperature)?;
        let inputs = [x.len(), head.len(), targets.len()];
        let gradients = [lse.len(), dlogprob.len(), dx.len()];
        let dhead_len = dhead.as_deref().map(|d| d.len());
        check_logprob_backward(shape, inputs, gradients, dhead_len)?;
        check_indices(OP, "targets", &targets[..shape.rows], shape.vocab)?;
        let dhead = dhead.map(|d| &mut d[..]);
        with_weight!(head, |head| self.head_backward(
            shape, inverse, x, head, targets, lse, dlogprob, dx, dhead
        ));
        Ok(())
    }

    fn logits(
        &self,
        shape: HeadShape,
        x: &CpuBuf<f32>,
        head: Weight<'_, Self>,
        logits: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_logits(shape, x.len(), head.len(), logits.len())?;
        let shape = LinearShape {
            rows: shape.rows,
            inputs: shape.hidden,
            outputs: shape.vocab,
        };
        with_weight!(head, |head| gemm::forward(
            self, shape, x, head, None, logits
        ));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn log_sum_exp(level: Level, logits: &[f32], inverse_temperature: f32) -> LogSumExp {
        State::finish(states(level, logits, inverse_temperature))
    }

    /// What the sampler does with written logits is what training does without them.
    #[test]
    fn logits_and_their_log_sum_exp_have_the_bits_of_the_fused_head() -> Result<()> {
        let (rows, hidden, vocab) = (37, 111, 1777);
        let wave = |len: usize, f: f32| -> Vec<f32> {
            (0..len).map(|i| (i as f32 * f).sin() * 0.9).collect()
        };
        for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
            let Ok(cpu) = Cpu::with_threads(2).with_level(level) else {
                continue;
            };
            let x = cpu.upload(&wave(rows * hidden, 0.37))?;
            let head = cpu.upload(&wave(vocab * hidden, 0.61))?;
            let head = Weight::F32(&head);
            let targets: Vec<u32> = (0..rows as u32).map(|r| r * 48).collect();
            let targets = cpu.upload(&targets)?;
            let all = HeadShape {
                rows,
                hidden,
                vocab,
            };
            for temperature in [1.0, 0.7] {
                let (mut logprob, mut lse, mut entropy) =
                    (cpu.zeros(rows)?, cpu.zeros(rows)?, cpu.zeros(rows)?);
                cpu.logprob(
                    all,
                    temperature,
                    &x,
                    head,
                    &targets,
                    &mut logprob,
                    &mut lse,
                    &mut entropy,
                )?;
                for row in 0..rows {
                    // One row at a time, as decoding goes.
                    let one = cpu.upload(&x[row * hidden..][..hidden])?;
                    let mut logits = cpu.zeros(vocab)?;
                    cpu.logits(HeadShape { rows: 1, ..all }, &one, head, &mut logits)?;
                    let inverse = 1.0 / temperature;
                    let got = log_sum_exp(level, &logits, inverse);
                    let z = logits[targets[row] as usize] * inverse;
                    assert_eq!(got.lse.to_bits(), lse[row].to_bits());
                    assert_eq!(got.entropy.to_bits(), entropy[row].to_bits());
                    assert_eq!((z - got.lse).to_bits(), logprob[row].to_bits());
                }
            }
        }
        Ok(())
    }

    #[test]
    fn masked_logits_have_no_share_and_nan_is_seen() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
            if !level.available() {
                continue;
            }
            let mut logits = vec![f32::NEG_INFINITY; 1500];
            assert_eq!(log_sum_exp(level, &logits, 1.0).lse, f32::NEG_INFINITY);
            (logits[3], logits[1400]) = (2.0, 2.0);
            let two = log_sum_exp(level, &logits, 0.5);
            assert!((two.lse - (1.0 + 2f32.ln())).abs() < 1e-6, "{level}");
            assert!((two.entropy - 2f32.ln()).abs() < 1e-6, "{level}");
            for at in [0, 700, 1499] {
                let before = std::mem::replace(&mut logits[at], f32::NAN);
                assert!(log_sum_exp(level, &logits, 1.0).lse.is_nan(), "{level}");
                logits[at] = before;
            }
        }
    }
}
