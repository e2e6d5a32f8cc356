//! Rotary embedding on the CPU: rows in parallel, in place.

use super::simd::{Kernel, Simd};
use super::{Cpu, CpuBuf};
use crate::Result;
use crate::attention::Heads;
use crate::error::check_indices;
use crate::rope::{Rope, check_rope};

/// Rows of a task.
const ROWS: usize = 16;

struct Rotate<'a> {
    heads: Heads,
    positions: &'a [u32],
    cos: &'a [f32],
    sin: &'a [f32],
    inverse: bool,
    qkv: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let half = self.heads.head_dim / 2;
        let whole = half - half % S::LANES;
        let rows = self.qkv.chunks_exact_mut(self.heads.qkv_width());
        for (row, &position) in rows.zip(self.positions) {
            let table = position as usize * half;
            let (cos, sin) = (&self.cos[table..][..half], &self.sin[table..][..half]);
            // The values come last and are not rotated.
            for head in row[..self.heads.v_offset()].chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                let (a, b) = (a.as_mut_ptr(), b.as_mut_ptr());
                let (cos, sin) = (cos.as_ptr(), sin.as_ptr());
                // SAFETY: inside of `dispatch`; all four runs have `half` values.
                unsafe {
                    for at in (0..whole).step_by(S::LANES) {
                        let (c, s) = (S::load(cos.add(at)), S::load(sin.add(at)));
                        let (x, y) = (S::load(a.add(at)), S::load(b.add(at)));
                        let (x, y) = rotate(x, y, c, s, self.inverse);
                        x.store(a.add(at));
                        y.store(b.add(at));
                    }
                    if whole < half {
                        let n = half - whole;
                        let part = |p: *const f32| S::load_part(p.add(whole), n, 0.0);
                        let (x, y, c, s) = (part(a), part(b), part(cos), part(sin));
                        let (x, y) = rotate(x, y, c, s, self.inverse);
                        x.store_part(a.add(whole), n);
                        y.store_part(b.add(whole), n);
                    }
                }
            }
        }
    }
}

/// # Safety
/// Inside of `Level::dispatch`.
#[inline(always)]
unsafe fn rotate<S: Simd>(a: S, b: S, cos: S, sin: S, inverse: bool) -> (S, S) {
    // SAFETY: by the caller.
    unsafe {
        if inverse {
            (a.mul(cos).add(b.mul(sin)), b.mul(cos).sub(a.mul(sin)))
        } else {
            (a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin)))
        }
    }
}

impl Rope for Cpu {
    fn rope(
        &self,
        rows: usize,
        heads: Heads,
        positions: &CpuBuf<u32>,
        cos: &CpuBuf<f32>,
        sin: &CpuBuf<f32>,
        inverse: bool,
        qkv: &mut CpuBuf<f32>,
    ) -> Result<()> {
        const OP: &str = "rope";
        let limit = check_rope(
            rows,
            heads,
            positions.len(),
            [cos.len(), sin.len()],
            qkv.len(),
        )?;
        check_indices(OP, "positions", &positions[..rows], limit)?;
        let width = heads.qkv_width();
        let run = ROWS * width;
        self.pool
            .chunks_mut(&mut qkv[..rows * width], run, |task, qkv| {
                self.level.dispatch(Rotate {
                    heads,
                    positions: &positions[task * ROWS..rows],
                    cos,
                    sin,
                    inverse,
                    qkv,
                });
            });
        Ok(())
    }
}
