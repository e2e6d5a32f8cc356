//! Linear layers on the CPU: [`dot`] forward, [`outer`] backward.

pub(crate) mod dot;
pub(crate) mod outer;

use super::pool::SharedMut;
use super::simd::Simd;
use super::{Cpu, CpuBuf};
use crate::gemm::{
    Gemm, LinearShape, check_linear, check_linear_dbias, check_linear_dw, check_linear_dx,
};
use crate::{Element, Result, Weight};
use dot::{Dots, PANEL};
use half::bf16;
use outer::Product;

/// A number format in which matrices are stored; arithmetic is f32.
pub(crate) trait Stored: Element {
    /// Whether a read does more than copy.
    const WIDENS: bool;
    /// Reads a vector.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S;
    /// Reads `n` lanes, fewer than a vector's; the others are 0.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn load_part<S: Simd>(p: *const Self, n: usize) -> S;
}

impl Stored for f32 {
    const WIDENS: bool = false;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S {
        // SAFETY: by the caller.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const f32, n: usize) -> S {
        // SAFETY: by the caller.
        unsafe { S::load_part(p, n, 0.0) }
    }
}

impl Stored for bf16 {
    const WIDENS: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S {
        // SAFETY: by the caller.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(p: *const bf16, n: usize) -> S {
        // SAFETY: by the caller.
        unsafe { S::load_bf16_part(p, n) }
    }
}

/// Rows of a task of the forward product.
const ROWS: usize = 256;

/// Runs `$body` with `$w` bound to the slice of a [`Weight`], whatever its format.
macro_rules! with_weight {
    ($weight:expr, |$w:ident| $body:expr) => {
        match $weight {
            crate::Weight::F32($w) => {
                let $w: &[f32] = $w;
                $body
            }
            crate::Weight::Bf16($w) => {
                let $w: &[half::bf16] = $w;
                $body
            }
        }
    };
}
pub(crate) use with_weight;

/// `y = x wᵀ + bias` on all threads; the buffers have been checked.
pub(crate) fn forward<W: Stored>(
    cpu: &Cpu,
    shape: LinearShape,
    x: &[f32],
    w: &[W],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let LinearShape {
        rows,
        inputs,
        outputs,
    } = shape;
    let panels = outputs.div_ceil(PANEL);
    let y = SharedMut::new(&mut y[..rows * outputs]);
    cpu.pool.run(panels * rows.div_ceil(ROWS), |task| {
        let (r, o) = (task / panels * ROWS, task % panels * PANEL);
        let dots = Dots {
            x: &x[r * inputs..],
            w: &w[o * inputs..],
            bias: bias.map(|b| &b[o..]),
            rows: ROWS.min(rows - r),
            inputs,
            outputs: PANEL.min(outputs - o),
        };
        // SAFETY: tasks have disjoint rows and columns of `y`, all inside of it.
        unsafe { dots.write(cpu.level, y.at(r * outputs + o), outputs) };
    });
}

impl Gemm for Cpu {
    fn linear(
        &self,
        shape: LinearShape,
        x: &CpuBuf<f32>,
        w: Weight<'_, Self>,
        bias: Option<&CpuBuf<f32>>,
        y: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_linear(shape, x.len(), w.len(), bias.map(|b| b.len()), y.len())?;
        let bias = bias.map(|b| &b[..]);
        with_weight!(w, |w| forward(self, shape, x, w, bias, y));
        Ok(())
    }

    fn linear_dx(
        &self,
        shape: LinearShape,
        dy: &CpuBuf<f32>,
        w: Weight<'_, Self>,
        dx: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_linear_dx(shape, dy.len(), w.len(), dx.len())?;
        with_weight!(w, |w| Product {
            a: dy,
            a_row: shape.outputs,
            a_col: 1,
            b: w,
            m: shape.rows,
            n: shape.inputs,
            k: shape.outputs,
            add: false,
        }
        .write(self, dx));
        Ok(())
    }

    fn linear_dw(
        &self,
        shape: LinearShape,
        x: &CpuBuf<f32>,
        dy: &CpuBuf<f32>,
        dw: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_linear_dw(shape, x.len(), dy.len(), dw.len())?;
        Product {
            a: dy,
            a_row: 1,
            a_col: shape.outputs,
            b: &x[..],
            m: shape.outputs,
            n: shape.inputs,
            k: shape.rows,
            add: true,
        }
        .write(self, dw);
        Ok(())
    }

    fn linear_dbias(
        &self,
        shape: LinearShape,
        dy: &CpuBuf<f32>,
        dbias: &mut CpuBuf<f32>,
    ) -> Result<()> {
        /// Columns of a task: a cache line of each row.
        const COLUMNS: usize = 16;
        check_linear_dbias(shape, dy.len(), dbias.len())?;
        let dbias = &mut dbias[..shape.outputs];
        self.pool.chunks_mut(dbias, COLUMNS, |task, dbias| {
            let mut sum = [0.0f32; COLUMNS];
            for r in 0..shape.rows {
                let dy = &dy[r * shape.outputs + task * COLUMNS..][..dbias.len()];
                for (sum, dy) in sum.iter_mut().zip(dy) {
                    *sum += dy;
                }
            }
            for (dbias, sum) in dbias.iter_mut().zip(sum) {
                *dbias += sum;
            }
        });
        Ok(())
    }
}
