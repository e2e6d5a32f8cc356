//! SwiGLU with the vector exponential.
//!
//! `sigmoid(g) = e / (1 + e)` and `1 - sigmoid(g) = 1 / (1 + e)` with `e = exp(g)`: the vector
//! exponential ends at `exp(88)` above and at 0 below, so neither form overflows or cancels. Where
//! `g` itself is a factor it is first cut to where the other factor is not yet 0.

use super::Cpu;
use super::pool::SharedMut;
use super::simd::{Kernel, Simd};
use crate::Result;
use crate::activation::{Activation, check_swiglu, check_swiglu_backward};

/// Elements of a task, about.
const TASK: usize = 8 * 1024;
/// `exp` ends here: the sigmoid is 0 below minus this and 1 above it.
const LIMIT: f32 = 88.0;

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (gate, up, out) = (self.gate.as_ptr(), self.up.as_ptr(), self.out.as_mut_ptr());
        let width = self.out.len();
        let mut j = 0;
        // SAFETY: inside of `dispatch`; the three slices have `width` elements, and a part is what
        // is left of them.
        unsafe {
            while j + S::LANES <= width {
                let out_j = silu(S::load(gate.add(j))).mul(S::load(up.add(j)));
                out_j.store(out.add(j));
                j += S::LANES;
            }
            if j < width {
                let n = width - j;
                let g = S::load_part(gate.add(j), n, 0.0);
                let u = S::load_part(up.add(j), n, 0.0);
                silu(g).mul(u).store_part(out.add(j), n);
            }
        }
    }
}

/// # Safety
/// The level's instructions are there.
#[inline(always)]
unsafe fn silu<S: Simd>(g: S) -> S {
    // SAFETY: by the caller.
    unsafe {
        let e = g.exp();
        let sigmoid = e.div(S::splat(1.0).add(e));
        S::splat(-LIMIT).max(g).mul(sigmoid)
    }
}

struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dout: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let (gate, up, dout) = (self.gate.as_ptr(), self.up.as_ptr(), self.dout.as_ptr());
        let (dgate, dup) = (self.dgate.as_mut_ptr(), self.dup.as_mut_ptr());
        let width = self.dout.len();
        let mut j = 0;
        // SAFETY: inside of `dispatch`; the five slices have `width` elements, and a part is what is
        // left of them.
        unsafe {
            while j + S::LANES <= width {
                let (g, u) = (S::load(gate.add(j)), S::load(up.add(j)));
                let (dg, du) = silu_backward(g, u, S::load(dout.add(j)));
                dg.store(dgate.add(j));
                du.store(dup.add(j));
                j += S::LANES;
            }
            if j < width {
                let n = width - j;
                let g = S::load_part(gate.add(j), n, 0.0);
                let u = S::load_part(up.add(j), n, 0.0);
                let (dg, du) = silu_backward(g, u, S::load_part(dout.add(j), n, 0.0));
                dg.store_part(dgate.add(j), n);
                du.store_part(dup.add(j), n);
            }
        }
    }
}

/// The gradients of gate and up: `silu'(g) = s (1 + g (1 - s))`.
///
/// # Safety
/// The level's instructions are there.
#[inline(always)]
unsafe fn silu_backward<S: Simd>(g: S, u: S, dout: S) -> (S, S) {
    // SAFETY: by the caller.
    unsafe {
        let one = S::splat(1.0);
        let e = g.exp();
        let rest = one.div(one.add(e));
        let sigmoid = e.div(one.add(e));
        let above = S::splat(-LIMIT).max(g);
        let both = S::splat(LIMIT).min(above);
        let slope = sigmoid.mul(both.fma(rest, one));
        (dout.mul(u).mul(slope), dout.mul(above.mul(sigmoid)))
    }
}

impl Activation for Cpu {
    fn swiglu(
        &self,
        rows: usize,
        width: usize,
        gate_up: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
    ) -> Result<()> {
        check_swiglu(rows, width, gate_up.len(), out.len())?;
        let len = rows * width;
        if width == 0 {
            return Ok(());
        }
        let per_task = TASK.div_ceil(width);
        self.pool
            .chunks_mut(&mut out[..len], per_task * width, |task, out| {
                let gate_up = &gate_up[task * per_task * 2 * width..];
                for (out, gu) in out
                    .chunks_exact_mut(width)
                    .zip(gate_up.chunks_exact(2 * width))
                {
                    let (gate, up) = gu.split_at(width);
                    self.level.dispatch(Forward { gate, up, out });
                }
            });
        Ok(())
    }

    fn swiglu_backward(
        &self,
        rows: usize,
        width: usize,
        gate_up: &Self::Buf<f32>,
        dout: &Self::Buf<f32>,
        dgate_up: &mut Self::Buf<f32>,
    ) -> Result<()> {
        check_swiglu_backward(rows, width, gate_up.len(), dout.len(), dgate_up.len())?;
        let two = 2 * rows * width;
        if width == 0 {
            return Ok(());
        }
        let per_task = TASK.div_ceil(width);
        let dgate_up = SharedMut::new(&mut dgate_up[..two]);
        self.pool.run(rows.div_ceil(per_task), |task| {
            for row in task * per_task..rows.min((task + 1) * per_task) {
                let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
                // SAFETY: rows do not overlap, and each belongs to one task.
                let d = unsafe { dgate_up.slice(row * 2 * width, 2 * width) };
                let (dgate, dup) = d.split_at_mut(width);
                let dout = &dout[row * width..][..width];
                self.level.dispatch(Backward {
                    gate,
                    up,
                    dout,
                    dgate,
                    dup,
                });
            }
        });
        Ok(())
    }
}
