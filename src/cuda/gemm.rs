//! Launches of `kernels/gemm.cu`.

use super::launch::{Arg, Grid, Kernels, check_width, dim};
use super::{Cuda, CudaBuffer, bf16_weight};
use crate::gemm::{
    Gemm, LinearShape, check_linear, check_linear_dbias, check_linear_dw, check_linear_dx,
};
use crate::{Buffer, Result, Weight};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

/// A tile of the kernels: rows and columns of the result, threads, bytes of shared memory.
pub(super) struct Tile {
    pub rows: usize,
    pub columns: usize,
    pub threads: usize,
    pub shared: usize,
}

/// `Large` of the kernels.
pub(super) const LARGE: Tile = Tile {
    rows: 128,
    columns: 128,
    threads: 256,
    shared: 64 << 10,
};

/// `Middle` of `gemm.cu`: for decoding of many sequences.
const MIDDLE: Tile = Tile {
    rows: 64,
    columns: 64,
    threads: 128,
    shared: 64 << 10,
};

/// `Small` of `gemm.cu`: for decoding of few.
const SMALL: Tile = Tile {
    rows: 16,
    columns: 64,
    threads: 128,
    shared: 40 << 10,
};

/// Which of the small, the middle and the large tile computes a result of so many rows. Changes no
/// element of it.
///
/// Every row of tiles reads the weights, in decoding nearly all there is to read, and every column
/// of tiles the activations: as soon as the weights would be read twice, the next larger tile reads
/// less. What a tile computes for rows that are not there costs less than that: with 64 of them
/// tensor cores are busy for 0.4 of the time that reading the weights takes an A100, by its data
/// sheet. Within 64 rows the middle tile's blocks, more than the large one's, share the reading.
pub(super) fn by_rows<T>(rows: usize, [small, middle, large]: [T; 3]) -> T {
    match rows {
        0..=16 => small,
        17..=64 => middle,
        _ => large,
    }
}

impl Tile {
    /// The blocks of a result of `rows` x `columns`. Blocks of the same columns run side by side:
    /// they share the weights.
    pub(super) fn grid(&self, rows: usize, columns: usize) -> Grid {
        Grid {
            blocks: [rows.div_ceil(self.rows), columns.div_ceil(self.columns), 1],
            threads: self.threads,
            shared: self.shared,
        }
    }
}

/// Rows, inputs and outputs as the kernels take them.
fn dims(op: &'static str, shape: LinearShape) -> Result<[i32; 3]> {
    check_width(op, "inputs", shape.inputs)?;
    check_width(op, "outputs", shape.outputs)?;
    Ok([
        dim(op, "rows", shape.rows)?,
        dim(op, "inputs", shape.inputs)?,
        dim(op, "outputs", shape.outputs)?,
    ])
}

impl Kernels {
    /// [`Gemm::linear`] on device pointers; `bias` may be 0.
    ///
    /// # Errors
    /// Inputs or outputs that are no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `x` holds `rows * inputs` bf16,
    /// `w` `outputs * inputs`, `y` `rows * outputs`, `bias`, unless 0, `outputs` f32; all are aligned to
    /// 16 bytes and live until the work is done, and `y` overlaps nothing.
    pub unsafe fn linear(
        &self,
        stream: CUstream,
        shape: LinearShape,
        x: CUdeviceptr,
        w: CUdeviceptr,
        bias: CUdeviceptr,
        y: CUdeviceptr,
    ) -> Result<()> {
        let [rows, inputs, outputs] = dims("linear", shape)?;
        let tiles = [
            ("linear_small", SMALL),
            ("linear_middle", MIDDLE),
            ("linear_large", LARGE),
        ];
        let (entry, tile) = by_rows(shape.rows, tiles);
        let grid = tile.grid(shape.rows, shape.outputs);
        let args: [&dyn Arg; 7] = [&x, &w, &bias, &y, &rows, &inputs, &outputs];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, entry, grid, &args) }
    }

    /// [`Gemm::linear_dx`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::linear`].
    ///
    /// # Safety
    /// As [`Kernels::linear`]; `dy` holds `rows * outputs` bf16, `w` `outputs * inputs`, `dx`
    /// `rows * inputs`, and `dx` overlaps nothing.
    pub unsafe fn linear_dx(
        &self,
        stream: CUstream,
        shape: LinearShape,
        dy: CUdeviceptr,
        w: CUdeviceptr,
        dx: CUdeviceptr,
    ) -> Result<()> {
        let [rows, inputs, outputs] = dims("linear_dx", shape)?;
        let tiles = [
            ("linear_dx_small", SMALL),
            ("linear_dx_middle", MIDDLE),
            ("linear_dx_large", LARGE),
        ];
        let (entry, tile) = by_rows(shape.rows, tiles);
        let grid = tile.grid(shape.rows, shape.inputs);
        let args: [&dyn Arg; 6] = [&dy, &w, &dx, &rows, &inputs, &outputs];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, entry, grid, &args) }
    }

    /// [`Gemm::linear_dw`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::linear`].
    ///
    /// # Safety
    /// As [`Kernels::linear`]; `x` holds `rows * inputs` bf16, `dy` `rows * outputs`, `dw`
    /// `outputs * inputs` f32, and `dw` overlaps nothing.
    pub unsafe fn linear_dw(
        &self,
        stream: CUstream,
        shape: LinearShape,
        x: CUdeviceptr,
        dy: CUdeviceptr,
        dw: CUdeviceptr,
    ) -> Result<()> {
        let [rows, inputs, outputs] = dims("linear_dw", shape)?;
        let grid = LARGE.grid(shape.outputs, shape.inputs);
        let args: [&dyn Arg; 6] = [&x, &dy, &dw, &rows, &inputs, &outputs];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, "linear_dw", grid, &args) }
    }

    /// [`Gemm::linear_dbias`] on device pointers.
    ///
    /// # Errors
    /// Outputs that are no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// As [`Kernels::linear`]; `dy` holds `rows * outputs` bf16, `dbias` `outputs` f32, and `dbias`
    /// overlaps nothing.
    pub unsafe fn linear_dbias(
        &self,
        stream: CUstream,
        shape: LinearShape,
        dy: CUdeviceptr,
        dbias: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "linear_dbias";
        /// Threads of a block, and columns of a thread.
        const THREADS: usize = 32;
        const COLUMNS: usize = 8;
        check_width(OP, "outputs", shape.outputs)?;
        let (rows, outputs) = (
            dim(OP, "rows", shape.rows)?,
            dim(OP, "outputs", shape.outputs)?,
        );
        let grid = Grid::new(shape.outputs.div_ceil(THREADS * COLUMNS), THREADS);
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &[&dy, &dbias, &rows, &outputs]) }
    }
}

impl Gemm for Cuda {
    fn linear(
        &self,
        shape: LinearShape,
        x: &CudaBuffer<bf16>,
        w: Weight<'_, Self>,
        bias: Option<&CudaBuffer<f32>>,
        y: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "linear";
        check_linear(shape, x.len(), w.len(), bias.map(|b| b.len()), y.len())?;
        let w = bf16_weight(OP, w)?;
        let turn = self.turn(OP, &[x, w, &bias, y])?;
        let bias = bias.map_or(0, |bias| bias.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.linear(
                turn.stream,
                shape,
                x.address(),
                w.address(),
                bias,
                y.address(),
            )
        }
    }

    fn linear_dx(
        &self,
        shape: LinearShape,
        dy: &CudaBuffer<bf16>,
        w: Weight<'_, Self>,
        dx: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "linear_dx";
        check_linear_dx(shape, dy.len(), w.len(), dx.len())?;
        let w = bf16_weight(OP, w)?;
        let turn = self.turn(OP, &[dy, w, dx])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .linear_dx(turn.stream, shape, dy.address(), w.address(), dx.address())
        }
    }

    fn linear_dw(
        &self,
        shape: LinearShape,
        x: &CudaBuffer<bf16>,
        dy: &CudaBuffer<bf16>,
        dw: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_linear_dw(shape, x.len(), dy.len(), dw.len())?;
        let turn = self.turn("linear_dw", &[x, dy, dw])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .linear_dw(turn.stream, shape, x.address(), dy.address(), dw.address())
        }
    }

    fn linear_dbias(
        &self,
        shape: LinearShape,
        dy: &CudaBuffer<bf16>,
        dbias: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_linear_dbias(shape, dy.len(), dbias.len())?;
        let turn = self.turn("linear_dbias", &[dy, dbias])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .linear_dbias(turn.stream, shape, dy.address(), dbias.address())
        }
    }
}
