//! Launches of `kernels/activation.cu`.

use super::launch::{Grid, Kernels, check_width, dim};
use super::{Cuda, CudaBuffer};
use crate::activation::{Activation, check_swiglu, check_swiglu_backward};
use crate::{Buffer, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

const THREADS: usize = 256;

/// The grid, and the vectors of 8 in all and in a row.
fn grid(op: &'static str, rows: usize, width: usize) -> Result<(Grid, i32, i32)> {
    check_width(op, "width", width)?;
    let vectors = width / 8;
    let count = rows.saturating_mul(vectors);
    let grid = Grid::new(count.div_ceil(THREADS), THREADS);
    Ok((grid, dim(op, "rows * width / 8", count)?, vectors as i32))
}

impl Kernels {
    /// [`Activation::swiglu`] on device pointers.
    ///
    /// # Errors
    /// A width that is no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `gate_up` holds
    /// `2 * rows * width` bf16, `out` half as many; both are aligned to 16 bytes, do not overlap
    /// and live until the work is done.
    pub unsafe fn swiglu(
        &self,
        stream: CUstream,
        rows: usize,
        width: usize,
        gate_up: CUdeviceptr,
        out: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "swiglu";
        let (grid, count, vectors) = grid(OP, rows, width)?;
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &[&count, &vectors, &gate_up, &out]) }
    }

    /// [`Activation::swiglu_backward`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::swiglu`].
    ///
    /// # Safety
    /// As [`Kernels::swiglu`]; `gate_up` and `dgate_up` hold `2 * rows * width` bf16, `dout` half
    /// as many. `dgate_up` may be `gate_up`.
    pub unsafe fn swiglu_backward(
        &self,
        stream: CUstream,
        rows: usize,
        width: usize,
        gate_up: CUdeviceptr,
        dout: CUdeviceptr,
        dgate_up: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "swiglu_backward";
        let (grid, count, vectors) = grid(OP, rows, width)?;
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                OP,
                grid,
                &[&count, &vectors, &gate_up, &dout, &dgate_up],
            )
        }
    }
}

impl Activation for Cuda {
    fn swiglu(
        &self,
        rows: usize,
        width: usize,
        gate_up: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        check_swiglu(rows, width, gate_up.len(), out.len())?;
        let turn = self.turn("swiglu", &[gate_up, out])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .swiglu(turn.stream, rows, width, gate_up.address(), out.address())
        }
    }

    fn swiglu_backward(
        &self,
        rows: usize,
        width: usize,
        gate_up: &CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        dgate_up: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        check_swiglu_backward(rows, width, gate_up.len(), dout.len(), dgate_up.len())?;
        let turn = self.turn("swiglu_backward", &[gate_up, dout, dgate_up])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.swiglu_backward(
                turn.stream,
                rows,
                width,
                gate_up.address(),
                dout.address(),
                dgate_up.address(),
            )
        }
    }
}
