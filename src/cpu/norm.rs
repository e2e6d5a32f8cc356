//! RMSNorm on the CPU.
//!
//! Each row is normalised by one thread and does not see its neighbours. The gradient of the weight
//! is summed over blocks of [`ROWS`] rows and the blocks are added in order, so that it depends on
//! the rows alone and not on the number of threads.

use super::pool::SharedMut;
use super::simd::{Kernel, Simd};
use super::{Cpu, CpuBuf};
use crate::Result;
use crate::attention::Heads;
use crate::norm::{
    Norm, NormShape, check_add_rms_norm, check_qk_norm, check_qk_norm_backward, check_rms_norm,
    check_rms_norm_backward,
};

/// Rows of a task.
const ROWS: usize = 16;

/// Runs `body(offset, lanes)` over `width` elements; `lanes` is less than a vector at the end.
macro_rules! lanes {
    ($s:ident, $width:expr, |$at:ident, $n:ident| $body:expr) => {
        for $at in (0..$width).step_by($s::LANES) {
            let $n = $s::LANES.min($width - $at);
            $body
        }
    };
}

/// `n` values, the rest of the vector 0.
///
/// # Safety
/// Inside of `Level::dispatch`; `n` values are readable.
#[inline(always)]
unsafe fn load<S: Simd>(p: *const f32, n: usize) -> S {
    // SAFETY: by the caller.
    unsafe {
        if n == S::LANES {
            S::load(p)
        } else {
            S::load_part(p, n, 0.0)
        }
    }
}

/// # Safety
/// Inside of `Level::dispatch`; `n` values are writable.
#[inline(always)]
unsafe fn store<S: Simd>(value: S, p: *mut f32, n: usize) {
    // SAFETY: by the caller.
    unsafe {
        if n == S::LANES {
            value.store(p)
        } else {
            value.store_part(p, n)
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`, by four sums that take turns.
///
/// # Safety
/// Inside of `Level::dispatch`.
#[inline(always)]
unsafe fn reciprocal_rms<S: Simd>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: by the caller; all reads are inside of `x`.
    let squares = unsafe {
        let mut sums = [S::zero(); 4];
        lanes!(S, x.len(), |at, n| {
            let v = load::<S>(x.as_ptr().add(at), n);
            let turn = at / S::LANES % 4;
            sums[turn] = v.fma(v, sums[turn]);
        });
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum()
    };
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

/// Normalises one row; returns `rstd`.
///
/// # Safety
/// Inside of `Level::dispatch`; `weight` and `y` are as long as `x`.
#[inline(always)]
unsafe fn forward_row<S: Simd>(x: &[f32], eps: f32, weight: &[f32], y: &mut [f32]) -> f32 {
    debug_assert!(weight.len() == x.len() && y.len() == x.len());
    // SAFETY: by the caller.
    unsafe {
        let rstd = reciprocal_rms::<S>(x, eps);
        let scale = S::splat(rstd);
        lanes!(S, x.len(), |at, n| {
            let v = load::<S>(x.as_ptr().add(at), n).mul(scale);
            let v = v.mul(load::<S>(weight.as_ptr().add(at), n));
            store(v, y.as_mut_ptr().add(at), n);
        });
        rstd
    }
}

/// Gradient of one row: `dx = onto * dx + rstd (dy w - h mean(dy w h))`, `dweight += dy h`, where
/// `h = x rstd`. `dy` and `dx` may be the same.
///
/// # Safety
/// Inside of `Level::dispatch`; `dy` and `dx` are valid for `x.len()`, as `weight` and `dweight`.
#[inline(always)]
unsafe fn backward_row<S: Simd>(
    x: &[f32],
    weight: &[f32],
    rstd: f32,
    dy: *const f32,
    dx: *mut f32,
    add: bool,
    dweight: &mut [f32],
) {
    debug_assert!(weight.len() == x.len() && dweight.len() == x.len());
    // SAFETY: by the caller.
    unsafe {
        let scale = S::splat(rstd);
        let mut sums = [S::zero(); 4];
        lanes!(S, x.len(), |at, n| {
            let h = load::<S>(x.as_ptr().add(at), n).mul(scale);
            let g = load::<S>(dy.add(at), n);
            let dw = dweight.as_mut_ptr().add(at);
            store(g.fma(h, load(dw, n)), dw, n);
            let turn = at / S::LANES % 4;
            let gw = g.mul(load(weight.as_ptr().add(at), n));
            sums[turn] = gw.fma(h, sums[turn]);
        });
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        let mean = S::splat(-sum / x.len() as f32);
        lanes!(S, x.len(), |at, n| {
            let h = load::<S>(x.as_ptr().add(at), n).mul(scale);
            let gw = load::<S>(dy.add(at), n).mul(load(weight.as_ptr().add(at), n));
            let v = h.fma(mean, gw);
            let to = dx.add(at);
            let v = match add {
                true => v.fma(scale, load(to, n)),
                false => v.mul(scale),
            };
            store(v, to, n);
        });
    }
}

/// Rows in, rows out, with the residual sum first where there is one.
struct Forward<'a> {
    eps: f32,
    x: &'a [f32],
    /// What is added to `x`, and where the sum goes.
    residual: Option<(&'a [f32], &'a mut [f32])>,
    weight: &'a [f32],
    y: &'a mut [f32],
    rstd: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let width = self.weight.len();
        for (row, rstd) in self.rstd.iter_mut().enumerate() {
            let here = row * width..(row + 1) * width;
            let mut x = &self.x[here.clone()];
            if let Some((delta, sum)) = &mut self.residual {
                let (delta, sum) = (&delta[here.clone()], &mut sum[here.clone()]);
                // SAFETY: inside of `dispatch`; the three runs are of equal length.
                unsafe {
                    lanes!(S, width, |at, n| {
                        let v = load::<S>(x.as_ptr().add(at), n);
                        let v = v.add(load(delta.as_ptr().add(at), n));
                        store(v, sum.as_mut_ptr().add(at), n);
                    });
                }
                x = sum;
            }
            // SAFETY: inside of `dispatch`; the three runs are of equal length.
            *rstd = unsafe { forward_row::<S>(x, self.eps, self.weight, &mut self.y[here]) };
        }
    }
}

/// Gradient of a block of rows, `dweight` being the block's own sum.
struct Backward<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    weight: &'a [f32],
    rstd: &'a [f32],
    dx: &'a mut [f32],
    dweight: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let width = self.weight.len();
        for (row, &rstd) in self.rstd.iter().enumerate() {
            let here = row * width..(row + 1) * width;
            let (x, dy) = (&self.x[here.clone()], &self.dy[here.clone()]);
            let dx = &mut self.dx[here];
            let (dy, dx) = (dy.as_ptr(), dx.as_mut_ptr());
            // SAFETY: inside of `dispatch`; all runs have `width` values.
            unsafe { backward_row::<S>(x, self.weight, rstd, dy, dx, true, self.dweight) }
        }
    }
}

/// Norms of the query and key heads of a block of packed rows.
struct HeadForward<'a> {
    heads: Heads,
    eps: f32,
    qkv: &'a [f32],
    q_weight: &'a [f32],
    k_weight: &'a [f32],
    out: &'a mut [f32],
    rstd: &'a mut [f32],
}

impl Kernel for HeadForward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let Heads {
            q_heads, kv_heads, ..
        } = self.heads;
        let (width, values) = (self.heads.qkv_width(), self.heads.v_offset());
        let rows = self.qkv.chunks_exact(width);
        let outs = self.out.chunks_exact_mut(width);
        let rstds = self.rstd.chunks_exact_mut(q_heads + kv_heads);
        for ((x, y), rstd) in rows.zip(outs).zip(rstds) {
            let heads = x[..values].chunks_exact(self.heads.head_dim);
            let outs = y[..values].chunks_exact_mut(self.heads.head_dim);
            for (head, ((x, y), rstd)) in heads.zip(outs).zip(rstd).enumerate() {
                let weight = match head < q_heads {
                    true => self.q_weight,
                    false => self.k_weight,
                };
                // SAFETY: inside of `dispatch`; the three runs have `head_dim` values.
                *rstd = unsafe { forward_row::<S>(x, self.eps, weight, y) };
            }
            y[values..].copy_from_slice(&x[values..]);
        }
    }
}

/// Gradients of the query and key heads of a block of packed rows, in place.
struct HeadBackward<'a> {
    heads: Heads,
    qkv: &'a [f32],
    q_weight: &'a [f32],
    k_weight: &'a [f32],
    rstd: &'a [f32],
    dqkv: &'a mut [f32],
    /// The block's own sums: of queries, then of keys.
    dweights: &'a mut [f32],
}

impl Kernel for HeadBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let Heads {
            q_heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let (width, values) = (self.heads.qkv_width(), self.heads.v_offset());
        let (dq_weight, dk_weight) = self.dweights.split_at_mut(head_dim);
        let rows = self.qkv.chunks_exact(width);
        let grads = self.dqkv.chunks_exact_mut(width);
        let rstds = self.rstd.chunks_exact(q_heads + kv_heads);
        for ((x, d), rstd) in rows.zip(grads).zip(rstds) {
            let heads = x[..values].chunks_exact(head_dim);
            let grads = d[..values].chunks_exact_mut(head_dim);
            for (head, ((x, d), &rstd)) in heads.zip(grads).zip(rstd).enumerate() {
                let (weight, dweight) = match head < q_heads {
                    true => (self.q_weight, &mut *dq_weight),
                    false => (self.k_weight, &mut *dk_weight),
                };
                let d = d.as_mut_ptr();
                // SAFETY: inside of `dispatch`; all runs have `head_dim` values.
                unsafe { backward_row::<S>(x, weight, rstd, d, d, false, dweight) }
            }
        }
    }
}

impl Cpu {
    fn norm_rows(
        &self,
        eps: f32,
        x: &[f32],
        residual: Option<(&[f32], &mut [f32])>,
        weight: &[f32],
        y: &mut [f32],
        rstd: &mut [f32],
    ) {
        let width = weight.len();
        let y = SharedMut::new(y);
        let residual = residual.map(|(delta, sum)| (delta, SharedMut::new(sum)));
        self.pool.chunks_mut(rstd, ROWS, |task, rstd| {
            let (at, len) = (task * ROWS * width, rstd.len() * width);
            self.level.dispatch(Forward {
                eps,
                x: &x[at..at + len],
                residual: residual
                    .as_ref()
                    // SAFETY: this task alone writes these rows.
                    .map(|(delta, sum)| (&delta[at..at + len], unsafe { sum.slice(at, len) })),
                weight,
                // SAFETY: as above.
                y: unsafe { y.slice(at, len) },
                rstd,
            });
        });
    }
}

/// `total += x`.
fn add(total: &mut [f32], x: &[f32]) {
    for (total, x) in total.iter_mut().zip(x) {
        *total += x;
    }
}

impl Norm for Cpu {
    fn rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        x: &CpuBuf<f32>,
        weight: &CpuBuf<f32>,
        y: &mut CpuBuf<f32>,
        rstd: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_rms_norm(shape, x.len(), weight.len(), y.len(), rstd.len())?;
        let weight = &weight[..shape.width];
        self.norm_rows(eps, x, None, weight, y, &mut rstd[..shape.rows]);
        Ok(())
    }

    fn add_rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        residual: &CpuBuf<f32>,
        delta: &CpuBuf<f32>,
        weight: &CpuBuf<f32>,
        sum: &mut CpuBuf<f32>,
        y: &mut CpuBuf<f32>,
        rstd: &mut CpuBuf<f32>,
    ) -> Result<()> {
        let inputs = [residual.len(), delta.len(), weight.len()];
        check_add_rms_norm(shape, inputs, [sum.len(), y.len(), rstd.len()])?;
        let weight = &weight[..shape.width];
        let rstd = &mut rstd[..shape.rows];
        self.norm_rows(eps, residual, Some((delta, sum)), weight, y, rstd);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        shape: NormShape,
        dy: &CpuBuf<f32>,
        x: &CpuBuf<f32>,
        weight: &CpuBuf<f32>,
        rstd: &CpuBuf<f32>,
        dx: &mut CpuBuf<f32>,
        dweight: &mut CpuBuf<f32>,
    ) -> Result<()> {
        let inputs = [dy.len(), x.len(), weight.len(), rstd.len()];
        check_rms_norm_backward(shape, inputs, [dx.len(), dweight.len()])?;
        let NormShape { rows, width } = shape;
        let weight = &weight[..width];
        let dx = SharedMut::new(dx);
        let mut blocks = CpuBuf::zeros(rows.div_ceil(ROWS) * width)?;
        self.pool.chunks_mut(&mut blocks, width, |task, dweight| {
            let count = ROWS.min(rows - task * ROWS);
            let (at, len) = (task * ROWS * width, count * width);
            self.level.dispatch(Backward {
                dy: &dy[at..at + len],
                x: &x[at..at + len],
                weight,
                rstd: &rstd[task * ROWS..][..count],
                // SAFETY: this task alone writes these rows.
                dx: unsafe { dx.slice(at, len) },
                dweight,
            });
        });
        for block in blocks.chunks_exact(width) {
            add(dweight, block);
        }
        Ok(())
    }

    fn qk_norm(
        &self,
        rows: usize,
        heads: Heads,
        eps: f32,
        qkv: &CpuBuf<f32>,
        q_weight: &CpuBuf<f32>,
        k_weight: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
        rstd: &mut CpuBuf<f32>,
    ) -> Result<()> {
        let weights = [q_weight.len(), k_weight.len()];
        check_qk_norm(rows, heads, qkv.len(), weights, out.len(), rstd.len())?;
        let width = heads.qkv_width();
        let normed = heads.q_heads + heads.kv_heads;
        let rstd = SharedMut::new(rstd);
        self.pool
            .chunks_mut(&mut out[..rows * width], ROWS * width, |task, out| {
                let count = out.len() / width;
                self.level.dispatch(HeadForward {
                    heads,
                    eps,
                    qkv: &qkv[task * ROWS * width..][..count * width],
                    q_weight: &q_weight[..heads.head_dim],
                    k_weight: &k_weight[..heads.head_dim],
                    out,
                    // SAFETY: this task alone writes these rows.
                    rstd: unsafe { rstd.slice(task * ROWS * normed, count * normed) },
                });
            });
        Ok(())
    }

    fn qk_norm_backward(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &CpuBuf<f32>,
        q_weight: &CpuBuf<f32>,
        k_weight: &CpuBuf<f32>,
        rstd: &CpuBuf<f32>,
        dqkv: &mut CpuBuf<f32>,
        dq_weight: &mut CpuBuf<f32>,
        dk_weight: &mut CpuBuf<f32>,
    ) -> Result<()> {
        let weights = [q_weight.len(), k_weight.len()];
        let outputs = [dqkv.len(), dq_weight.len(), dk_weight.len()];
        check_qk_norm_backward(rows, heads, qkv.len(), weights, rstd.len(), outputs)?;
        let Heads { head_dim, .. } = heads;
        let width = heads.qkv_width();
        let normed = heads.q_heads + heads.kv_heads;
        let dqkv = SharedMut::new(dqkv);
        let mut blocks = CpuBuf::zeros(rows.div_ceil(ROWS) * 2 * head_dim)?;
        self.pool
            .chunks_mut(&mut blocks, 2 * head_dim, |task, dweights| {
                let count = ROWS.min(rows - task * ROWS);
                let (at, len) = (task * ROWS * width, count * width);
                self.level.dispatch(HeadBackward {
                    heads,
                    qkv: &qkv[at..at + len],
                    q_weight: &q_weight[..head_dim],
                    k_weight: &k_weight[..head_dim],
                    rstd: &rstd[task * ROWS * normed..][..count * normed],
                    // SAFETY: this task alone writes these rows.
                    dqkv: unsafe { dqkv.slice(at, len) },
                    dweights,
                });
            });
        for block in blocks.chunks_exact(2 * head_dim) {
            let (dq, dk) = block.split_at(head_dim);
            add(dq_weight, dq);
            add(dk_weight, dk);
        }
        Ok(())
    }
}
