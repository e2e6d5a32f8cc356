//! Launches of `kernels/norm.cu`.

use super::launch::{Grid, Kernels, check_width, dim};
use super::{Cuda, CudaBuffer};
use crate::attention::Heads;
use crate::norm::{
    Norm, NormShape, check_add_rms_norm, check_qk_norm, check_qk_norm_backward, check_rms_norm,
    check_rms_norm_backward,
};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

/// Rows of a forward block in flight: one a warp.
const WARPS: usize = 8;
const WARP: usize = 32;
/// Rows of a backward block, as in the kernel.
const BACKWARD_ROWS: usize = 16;
/// Blocks from which on a forward block takes more than one row a warp, so that the weights are
/// staged less often: twice the processors of an A100. Changes no result.
const MANY_BLOCKS: usize = 216;

/// Lanes that hold a head, 8 elements each.
fn head_lanes(op: &'static str, head_dim: usize) -> Result<usize> {
    check_width(op, "head_dim", head_dim)?;
    match (head_dim / 8).next_power_of_two() {
        lanes if lanes <= WARP => Ok(lanes),
        _ => Err(Error::invalid(
            op,
            format!("a head has at most 256 elements, this one {head_dim}"),
        )),
    }
}

fn forward_grid(shape: NormShape) -> Grid {
    let blocks = shape.rows.div_ceil(WARPS);
    let blocks = blocks.min(blocks.div_ceil(4).max(MANY_BLOCKS));
    Grid::new(blocks, WARPS * WARP).shared(4 * shape.width)
}

/// Threads of a backward block: as many as a row has vectors of 8, in whole warps.
fn backward_threads(width: usize) -> usize {
    (width / 8).next_multiple_of(WARP).min(512)
}

impl Kernels {
    /// [`Norm::rms_norm`] on device pointers.
    ///
    /// # Errors
    /// A width that is no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `x` and `y` hold `rows * width`
    /// bf16, `weight` `width` f32, `rstd` `rows` f32; all are aligned to 16 bytes, `y` and `rstd`
    /// overlap nothing, and all live until the work is done.
    pub unsafe fn rms_norm(
        &self,
        stream: CUstream,
        shape: NormShape,
        eps: f32,
        x: CUdeviceptr,
        weight: CUdeviceptr,
        y: CUdeviceptr,
        rstd: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "rms_norm";
        check_width(OP, "width", shape.width)?;
        let (rows, width) = (dim(OP, "rows", shape.rows)?, dim(OP, "width", shape.width)?);
        let entry = if shape.width <= 1024 {
            "rms_norm_4"
        } else {
            "rms_norm_16"
        };
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                entry,
                forward_grid(shape),
                &[&rows, &width, &eps, &x, &weight, &y, &rstd],
            )
        }
    }

    /// [`Norm::add_rms_norm`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::rms_norm`].
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`]; `residual`, `delta`, `sum` and `y` hold `rows * width` bf16. `sum`
    /// may be `residual` or `delta`.
    pub unsafe fn add_rms_norm(
        &self,
        stream: CUstream,
        shape: NormShape,
        eps: f32,
        residual: CUdeviceptr,
        delta: CUdeviceptr,
        weight: CUdeviceptr,
        sum: CUdeviceptr,
        y: CUdeviceptr,
        rstd: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "add_rms_norm";
        check_width(OP, "width", shape.width)?;
        let (rows, width) = (dim(OP, "rows", shape.rows)?, dim(OP, "width", shape.width)?);
        let entry = if shape.width <= 1024 {
            "add_rms_norm_4"
        } else {
            "add_rms_norm_16"
        };
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                entry,
                forward_grid(shape),
                &[
                    &rows, &width, &eps, &residual, &delta, &weight, &sum, &y, &rstd,
                ],
            )
        }
    }

    /// Bytes of scratch memory of [`Kernels::rms_norm_backward`].
    pub fn rms_norm_backward_scratch(shape: NormShape) -> usize {
        shape
            .rows
            .div_ceil(BACKWARD_ROWS)
            .saturating_mul(shape.width)
            .saturating_mul(4)
    }

    /// [`Norm::rms_norm_backward`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::rms_norm`].
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`]; `dy`, `x` and `dx` hold `rows * width` bf16, `weight` and
    /// `dweight` `width` f32, `rstd` `rows` f32, `scratch` as many bytes as
    /// [`Kernels::rms_norm_backward_scratch`] says. `dx`, `dweight` and `scratch` overlap nothing.
    pub unsafe fn rms_norm_backward(
        &self,
        stream: CUstream,
        shape: NormShape,
        dy: CUdeviceptr,
        x: CUdeviceptr,
        weight: CUdeviceptr,
        rstd: CUdeviceptr,
        dx: CUdeviceptr,
        dweight: CUdeviceptr,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "rms_norm_backward";
        check_width(OP, "width", shape.width)?;
        let (rows, width) = (dim(OP, "rows", shape.rows)?, dim(OP, "width", shape.width)?);
        let blocks = shape.rows.div_ceil(BACKWARD_ROWS);
        // SAFETY: by the caller; the first kernel writes one row of `scratch` a block, the second
        // reads as many.
        unsafe {
            self.launch(
                stream,
                OP,
                Grid::new(blocks, backward_threads(shape.width)),
                &[&rows, &width, &dy, &x, &weight, &rstd, &dx, &scratch],
            )?;
            self.norm_dweight(stream, blocks, shape.width, shape.width, scratch, dweight)
        }
    }

    /// Adds the column sums of `partial` to `out`.
    ///
    /// # Safety
    /// As `launch`; `partial` holds `blocks` rows of `stride` f32, `out` `columns`.
    unsafe fn norm_dweight(
        &self,
        stream: CUstream,
        blocks: usize,
        stride: usize,
        columns: usize,
        partial: CUdeviceptr,
        out: CUdeviceptr,
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let grid = Grid::new(columns.div_ceil(WARP), WARPS * WARP);
        let (rows, stride, columns) = (blocks as i32, stride as i32, columns as i32);
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                "norm_dweight",
                grid,
                &[&rows, &stride, &columns, &partial, &out],
            )
        }
    }

    /// [`Norm::qk_norm`] on device pointers.
    ///
    /// # Errors
    /// A head size that is no multiple of 8 or above 256; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `qkv` and `out` hold
    /// `rows * heads.qkv_width()` bf16, the weights `head_dim` f32, `rstd`
    /// `rows * (q_heads + kv_heads)` f32; all are aligned to 16 bytes and live until the work is
    /// done. `out` may be `qkv`; otherwise `out` and `rstd` overlap nothing.
    pub unsafe fn qk_norm(
        &self,
        stream: CUstream,
        rows: usize,
        heads: Heads,
        eps: f32,
        qkv: CUdeviceptr,
        q_weight: CUdeviceptr,
        k_weight: CUdeviceptr,
        out: CUdeviceptr,
        rstd: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "qk_norm";
        let lanes = head_lanes(OP, heads.head_dim)?;
        let items = rows.saturating_mul(heads.q_heads + 2 * heads.kv_heads);
        let (q, kv) = (
            dim(OP, "q_heads", heads.q_heads)?,
            dim(OP, "kv_heads", heads.kv_heads)?,
        );
        let (rows, size) = (dim(OP, "rows", rows)?, dim(OP, "head_dim", heads.head_dim)?);
        // Eight heads a group of lanes, so that the weights cost little.
        let blocks = items.div_ceil(256 / lanes);
        let blocks = blocks.min(blocks.div_ceil(8).max(MANY_BLOCKS));
        let lanes = lanes as i32;
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                OP,
                Grid::new(blocks, 256),
                &[
                    &rows, &q, &kv, &size, &lanes, &eps, &qkv, &q_weight, &k_weight, &out, &rstd,
                ],
            )
        }
    }

    /// Bytes of scratch memory of [`Kernels::qk_norm_backward`].
    pub fn qk_norm_backward_scratch(rows: usize, heads: Heads) -> usize {
        rows.div_ceil(BACKWARD_ROWS)
            .saturating_mul(8 * heads.head_dim)
    }

    /// [`Norm::qk_norm_backward`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::qk_norm`].
    ///
    /// # Safety
    /// As [`Kernels::qk_norm`]; `dqkv` is as large as `qkv`, `dq_weight` and `dk_weight` hold
    /// `head_dim` f32, `scratch` as many bytes as [`Kernels::qk_norm_backward_scratch`] says. What
    /// is written overlaps nothing.
    pub unsafe fn qk_norm_backward(
        &self,
        stream: CUstream,
        rows: usize,
        heads: Heads,
        qkv: CUdeviceptr,
        q_weight: CUdeviceptr,
        k_weight: CUdeviceptr,
        rstd: CUdeviceptr,
        dqkv: CUdeviceptr,
        dq_weight: CUdeviceptr,
        dk_weight: CUdeviceptr,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "qk_norm_backward";
        let lanes = head_lanes(OP, heads.head_dim)? as i32;
        let blocks = rows.div_ceil(BACKWARD_ROWS);
        let (q, kv) = (
            dim(OP, "q_heads", heads.q_heads)?,
            dim(OP, "kv_heads", heads.kv_heads)?,
        );
        let (rows, size) = (dim(OP, "rows", rows)?, dim(OP, "head_dim", heads.head_dim)?);
        let head_dim = heads.head_dim;
        let k_scratch = scratch + 4 * head_dim as CUdeviceptr;
        // SAFETY: by the caller; the first kernel writes `2 * head_dim` of `scratch` a block, the
        // others read the first and the second half of each.
        unsafe {
            self.launch(
                stream,
                OP,
                Grid::new(blocks, 256),
                &[
                    &rows, &q, &kv, &size, &lanes, &qkv, &q_weight, &k_weight, &rstd, &dqkv,
                    &scratch,
                ],
            )?;
            self.norm_dweight(stream, blocks, 2 * head_dim, head_dim, scratch, dq_weight)?;
            self.norm_dweight(stream, blocks, 2 * head_dim, head_dim, k_scratch, dk_weight)
        }
    }
}

impl Norm for Cuda {
    fn rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        x: &CudaBuffer<bf16>,
        weight: &CudaBuffer<f32>,
        y: &mut CudaBuffer<bf16>,
        rstd: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_rms_norm(shape, x.len(), weight.len(), y.len(), rstd.len())?;
        let turn = self.turn("rms_norm", &[x, weight, y, rstd])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.rms_norm(
                turn.stream,
                shape,
                eps,
                x.address(),
                weight.address(),
                y.address(),
                rstd.address(),
            )
        }
    }

    fn add_rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        residual: &CudaBuffer<bf16>,
        delta: &CudaBuffer<bf16>,
        weight: &CudaBuffer<f32>,
        sum: &mut CudaBuffer<bf16>,
        y: &mut CudaBuffer<bf16>,
        rstd: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let inputs = [residual.len(), delta.len(), weight.len()];
        check_add_rms_norm(shape, inputs, [sum.len(), y.len(), rstd.len()])?;
        let turn = self.turn("add_rms_norm", &[residual, delta, weight, sum, y, rstd])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.add_rms_norm(
                turn.stream,
                shape,
                eps,
                residual.address(),
                delta.address(),
                weight.address(),
                sum.address(),
                y.address(),
                rstd.address(),
            )
        }
    }

    fn rms_norm_backward(
        &self,
        shape: NormShape,
        dy: &CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        weight: &CudaBuffer<f32>,
        rstd: &CudaBuffer<f32>,
        dx: &mut CudaBuffer<bf16>,
        dweight: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let inputs = [dy.len(), x.len(), weight.len(), rstd.len()];
        check_rms_norm_backward(shape, inputs, [dx.len(), dweight.len()])?;
        let mut turn = self.turn("rms_norm_backward", &[dy, x, weight, rstd, dx, dweight])?;
        let scratch = turn.scratch(Kernels::rms_norm_backward_scratch(shape))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.rms_norm_backward(
                turn.stream,
                shape,
                dy.address(),
                x.address(),
                weight.address(),
                rstd.address(),
                dx.address(),
                dweight.address(),
                scratch,
            )
        }
    }

    fn qk_norm(
        &self,
        rows: usize,
        heads: Heads,
        eps: f32,
        qkv: &CudaBuffer<bf16>,
        q_weight: &CudaBuffer<f32>,
        k_weight: &CudaBuffer<f32>,
        out: &mut CudaBuffer<bf16>,
        rstd: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let weights = [q_weight.len(), k_weight.len()];
        check_qk_norm(rows, heads, qkv.len(), weights, out.len(), rstd.len())?;
        let turn = self.turn("qk_norm", &[qkv, q_weight, k_weight, out, rstd])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.qk_norm(
                turn.stream,
                rows,
                heads,
                eps,
                qkv.address(),
                q_weight.address(),
                k_weight.address(),
                out.address(),
                rstd.address(),
            )
        }
    }

    fn qk_norm_backward(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &CudaBuffer<bf16>,
        q_weight: &CudaBuffer<f32>,
        k_weight: &CudaBuffer<f32>,
        rstd: &CudaBuffer<f32>,
        dqkv: &mut CudaBuffer<bf16>,
        dq_weight: &mut CudaBuffer<f32>,
        dk_weight: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let weights = [q_weight.len(), k_weight.len()];
        let outputs = [dqkv.len(), dq_weight.len(), dk_weight.len()];
        check_qk_norm_backward(rows, heads, qkv.len(), weights, rstd.len(), outputs)?;
        let mut turn = self.turn(
            "qk_norm_backward",
            &[qkv, q_weight, k_weight, rstd, dqkv, dq_weight, dk_weight],
        )?;
        let scratch = turn.scratch(Kernels::qk_norm_backward_scratch(rows, heads))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.qk_norm_backward(
                turn.stream,
                rows,
                heads,
                qkv.address(),
                q_weight.address(),
                k_weight.address(),
                rstd.address(),
                dqkv.address(),
                dq_weight.address(),
                dk_weight.address(),
                scratch,
            )
        }
    }
}
