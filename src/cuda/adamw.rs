//! Launches of `kernels/adamw.cu`.

use super::launch::{Arg, Grid, Kernels, dim};
use super::{Cuda, CudaBuffer};
use crate::adamw::{
    AdamW, AdamWConfig, check_adamw, check_clip_scale, check_max_norm, check_sum_of_squares,
};
use crate::{Buffer, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

const THREADS: usize = 256;
const WARP: usize = 32;
/// Elements of a block of the sum of squares, as in the kernel.
const CHUNK: usize = 16 * 1024;

/// A step's factors, as the kernel takes them.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Step {
    learning_rate: f32,
    beta1: f32,
    beta2: f32,
    correct1: f32,
    correct2: f32,
    eps: f32,
    weight_decay: f32,
}

impl Kernels {
    /// [`AdamW::adamw`] on device pointers; `copy` is 0 where none is wanted.
    ///
    /// # Errors
    /// `step` 0, a beta outside of `0 <= beta < 1`; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `scale` holds one f32, `grad`,
    /// `param`, `m` and `v` hold `len` f32, `copy` `len` bf16; all but `scale` are aligned to 16
    /// bytes, none overlap, and all live until the work is done.
    pub unsafe fn adamw(
        &self,
        stream: CUstream,
        config: &AdamWConfig,
        len: usize,
        scale: CUdeviceptr,
        grad: CUdeviceptr,
        param: CUdeviceptr,
        m: CUdeviceptr,
        v: CUdeviceptr,
        copy: CUdeviceptr,
    ) -> Result<()> {
        config.check()?;
        let [correct1, correct2] = config.corrections();
        let step = Step {
            learning_rate: config.learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            correct1,
            correct2,
            eps: config.eps,
            weight_decay: config.weight_decay,
        };
        let grid = Grid::new(len.div_ceil(4 * THREADS), THREADS);
        let args: [&dyn Arg; 8] = [&(len as u64), &step, &scale, &grad, &param, &m, &v, &copy];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, "adamw", grid, &args) }
    }

    /// Bytes of scratch memory of [`Kernels::sum_of_squares`].
    pub fn sum_of_squares_scratch(len: usize) -> usize {
        8 * len.div_ceil(CHUNK)
    }

    /// [`AdamW::sum_of_squares`] on device pointers; `out` is where the sum goes.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `x` holds `len` f32, `out` one,
    /// `scratch` as many bytes as [`Kernels::sum_of_squares_scratch`] says; `x` and `scratch` are
    /// aligned to 16 bytes, none overlap, and all live until the work is done.
    pub unsafe fn sum_of_squares(
        &self,
        stream: CUstream,
        len: usize,
        x: CUdeviceptr,
        out: CUdeviceptr,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        let blocks = len.div_ceil(CHUNK);
        let count = dim("sum_of_squares", "len", blocks)?;
        // SAFETY: by the caller; the first kernel writes one f64 of `scratch` a block, which the
        // second reads.
        unsafe {
            let grid = Grid::new(blocks, THREADS);
            let len = len as u64;
            self.launch(stream, "sum_of_squares", grid, &[&len, &x, &scratch])?;
            let args: [&dyn Arg; 3] = [&count, &scratch, &out];
            self.launch(stream, "sum_of_partials", Grid::new(1, THREADS), &args)
        }
    }

    /// [`AdamW::clip_scale`] on device pointers.
    ///
    /// # Errors
    /// A `max_norm` that is not positive; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `squares` holds `sums` f32,
    /// `norm` and `scale` one each; none overlap, and all live until the work is done.
    pub unsafe fn clip_scale(
        &self,
        stream: CUstream,
        sums: usize,
        max_norm: f32,
        squares: CUdeviceptr,
        norm: CUdeviceptr,
        scale: CUdeviceptr,
    ) -> Result<()> {
        check_max_norm(max_norm)?;
        let sums = dim("clip_scale", "sums", sums)?;
        let args: [&dyn Arg; 5] = [&sums, &max_norm, &squares, &norm, &scale];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, "clip_scale", Grid::new(1, WARP), &args) }
    }
}

impl AdamW for Cuda {
    fn adamw(
        &self,
        config: &AdamWConfig,
        len: usize,
        scale: &CudaBuffer<f32>,
        grad: &CudaBuffer<f32>,
        param: &mut CudaBuffer<f32>,
        m: &mut CudaBuffer<f32>,
        v: &mut CudaBuffer<f32>,
        copy: Option<&mut CudaBuffer<bf16>>,
    ) -> Result<()> {
        let lens = [scale.len(), grad.len(), param.len(), m.len(), v.len()];
        check_adamw(config, len, lens, copy.as_ref().map(|copy| copy.len()))?;
        let turn = self.turn("adamw", &[scale, grad, param, m, v, &copy])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.adamw(
                turn.stream,
                config,
                len,
                scale.address(),
                grad.address(),
                param.address(),
                m.address(),
                v.address(),
                copy.map_or(0, |copy| copy.address()),
            )
        }
    }

    fn sum_of_squares(
        &self,
        len: usize,
        x: &CudaBuffer<f32>,
        out: &mut CudaBuffer<f32>,
        index: usize,
    ) -> Result<()> {
        check_sum_of_squares(len, x.len(), out.len(), index)?;
        let mut turn = self.turn("sum_of_squares", &[x, out])?;
        let scratch = turn.scratch(Kernels::sum_of_squares_scratch(len))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .sum_of_squares(turn.stream, len, x.address(), out.at(index), scratch)
        }
    }

    fn clip_scale(
        &self,
        sums: usize,
        max_norm: f32,
        squares: &CudaBuffer<f32>,
        norm: &mut CudaBuffer<f32>,
        scale: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_clip_scale(sums, max_norm, [squares.len(), norm.len(), scale.len()])?;
        let turn = self.turn("clip_scale", &[squares, norm, scale])?;
        let (squares, norm, scale) = (squares.address(), norm.address(), scale.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .clip_scale(turn.stream, sums, max_norm, squares, norm, scale)
        }
    }
}
