//! A row of logits in the blocks of [`crate::cpu::logprob`]: each block's greatest value and sum of
//! exponentials, by the very kernel that training uses, so that log-probabilities have its bits.
//!
//! The pass that makes the log-sum-exp leaves all that a draw needs: a draw looks for its block among
//! the sums and raises that block's logits again, and filters skip the blocks that lie below their
//! threshold.

use crate::cpu::Level;
use crate::cpu::logprob::{self, BLOCK, State};
use crate::cpu::simd::{Kernel, Simd};

/// A row of `z = logits * inverse_temperature`.
pub(super) struct Row<'a> {
    level: Level,
    logits: &'a [f32],
    inverse: f32,
    pub(super) blocks: Vec<State>,
    /// The greatest `z`.
    pub(super) max: f32,
    /// `sum exp(z - max)`.
    pub(super) total: f64,
}

impl<'a> Row<'a> {
    /// `None` where a logit is NaN or positive infinity, or none is finite.
    pub(super) fn new(level: Level, logits: &'a [f32], inverse: f32) -> Option<Self> {
        let blocks: Vec<State> = logprob::states(level, logits, inverse).collect();
        let max = blocks.iter().fold(f32::NEG_INFINITY, |m, b| m.max(b.max));
        let total = blocks.iter().fold(0.0, |sum, b| sum + mass(b, max));
        // A NaN logit makes its block's sum NaN, and so does an infinite one.
        (total.is_finite() && total > 0.0).then_some(Row {
            level,
            logits,
            inverse,
            blocks,
            max,
            total,
        })
    }

    /// The log-sum-exp of the row.
    pub(super) fn lse(&self) -> f32 {
        State::finish(self.blocks.iter().copied()).lse
    }

    /// `z` of a token.
    pub(super) fn z(&self, token: usize) -> f32 {
        self.logits[token] * self.inverse
    }

    /// The first token of block `b`, and the block's `z` and `exp(z - max)`.
    pub(super) fn exp<'s>(
        &self,
        b: usize,
        max: f32,
        scratch: &'s mut [[f32; BLOCK]; 2],
    ) -> (usize, &'s [f32], &'s [f32]) {
        let start = b * BLOCK;
        let logits = &self.logits[start..self.logits.len().min(start + BLOCK)];
        let [z, e] = scratch;
        let (z, e) = (&mut z[..logits.len()], &mut e[..logits.len()]);
        let inverse = self.inverse;
        self.level.dispatch(Exp {
            logits,
            inverse,
            max,
            z,
            e,
        });
        (start, z, e)
    }
}

/// `sum exp(z - max)` of a block, for the `max` of the row.
pub(super) fn mass(block: &State, max: f32) -> f64 {
    f64::from(block.sum) * (f64::from(block.max) - f64::from(max)).exp()
}

struct Exp<'a> {
    logits: &'a [f32],
    inverse: f32,
    max: f32,
    z: &'a mut [f32],
    e: &'a mut [f32],
}

impl Kernel for Exp<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (p, len) = (self.logits.as_ptr(), self.logits.len());
        let (z_out, e_out) = (self.z.as_mut_ptr(), self.e.as_mut_ptr());
        let whole = len / S::LANES * S::LANES;
        // SAFETY: inside of `dispatch`; all three slices have `len` elements.
        unsafe {
            let (inverse, max) = (S::splat(self.inverse), S::splat(self.max));
            for i in (0..whole).step_by(S::LANES) {
                let z = S::load(p.add(i)).mul(inverse);
                z.store(z_out.add(i));
                z.sub(max).exp().store(e_out.add(i));
            }
            let rest = len - whole;
            if rest > 0 {
                let z = S::load_part(p.add(whole), rest, 0.0).mul(inverse);
                z.store_part(z_out.add(whole), rest);
                z.sub(max).exp().store_part(e_out.add(whole), rest);
            }
        }
    }
}
