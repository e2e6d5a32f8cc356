//! Launches of `kernels/rope.cu`.

use super::launch::{Fault, Grid, Kernels, dim};
use super::{Cuda, CudaBuffer};
use crate::attention::Heads;
use crate::rope::{Rope, check_rope};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

const WARPS: usize = 8;
const WARP: usize = 32;

impl Kernels {
    /// [`Rope::rope`] on device pointers. `limit` is the number of positions in the tables; a row
    /// whose position is not below it is left alone, see [`Fault`].
    ///
    /// # Errors
    /// A head size that is no multiple of 16 or above 512; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `positions` holds `rows` u32,
    /// `cos` and `sin` `limit * head_dim / 2` f32, `qkv` `rows * heads.qkv_width()` bf16; all but
    /// `positions` are aligned to 16 bytes, `qkv` overlaps nothing, and all live until the work is
    /// done.
    pub unsafe fn rope(
        &self,
        stream: CUstream,
        rows: usize,
        heads: Heads,
        limit: usize,
        positions: CUdeviceptr,
        cos: CUdeviceptr,
        sin: CUdeviceptr,
        inverse: bool,
        qkv: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        const OP: &str = "rope";
        let size = heads.head_dim;
        let lanes = (size / 16).next_power_of_two();
        if !size.is_multiple_of(16) || lanes > WARP {
            return Err(Error::invalid(
                OP,
                format!("head_dim must be a multiple of 16 and at most 512, it is {size}"),
            ));
        }
        let grid = Grid::new(rows.div_ceil(WARPS), WARPS * WARP);
        let rotated = dim(OP, "heads", heads.q_heads + heads.kv_heads)?;
        let width = dim(OP, "width", heads.qkv_width())?;
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let (rows, size, lanes) = (dim(OP, "rows", rows)?, size as i32, lanes as i32);
        let inverse = i32::from(inverse);
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                OP,
                grid,
                &[
                    &rows, &rotated, &width, &size, &lanes, &limit, &inverse, &positions, &cos,
                    &sin, &qkv, &fault,
                ],
            )
        }
    }
}

impl Rope for Cuda {
    fn rope(
        &self,
        rows: usize,
        heads: Heads,
        positions: &CudaBuffer<u32>,
        cos: &CudaBuffer<f32>,
        sin: &CudaBuffer<f32>,
        inverse: bool,
        qkv: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "rope";
        let limit = check_rope(
            rows,
            heads,
            positions.len(),
            [cos.len(), sin.len()],
            qkv.len(),
        )?;
        let mut turn = self.turn(OP, &[positions, cos, sin, qkv])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.rope(
                turn.stream,
                rows,
                heads,
                limit,
                positions.address(),
                cos.address(),
                sin.address(),
                inverse,
                qkv.address(),
                turn.fault("positions"),
            )
        }
    }
}
