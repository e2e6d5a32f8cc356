//! Launches of `kernels/embedding.cu`.

use super::launch::{Fault, Grid, Kernels, check_width, dim};
use super::{Cuda, CudaBuffer};
use crate::embedding::{Embedding, check};
use crate::{Buffer, Element, Result, Weight};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

const WARPS: usize = 8;
const WARP: usize = 32;
const THREADS: usize = 256;

impl Kernels {
    /// [`Embedding::gather_rows`], and [`Embedding::embed`], on device pointers. `limit` is the
    /// number of rows of `table`; an index that is not below it leaves its row of `out` alone, see
    /// [`Fault`].
    ///
    /// # Errors
    /// A width that is no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `index` holds `rows` u32,
    /// `table` `limit * width` bf16, `out` `rows * width`; the latter two are aligned to 16 bytes,
    /// `out` overlaps nothing, and all live until the work is done.
    pub unsafe fn gather_rows(
        &self,
        stream: CUstream,
        rows: usize,
        width: usize,
        limit: usize,
        index: CUdeviceptr,
        table: CUdeviceptr,
        out: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        const OP: &str = "gather_rows";
        check_width(OP, "width", width)?;
        let grid = Grid::new(rows.div_ceil(WARPS), WARPS * WARP);
        let (rows, width) = (dim(OP, "rows", rows)?, dim(OP, "width", width)?);
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                OP,
                grid,
                &[&rows, &width, &limit, &index, &table, &out, &fault],
            )
        }
    }

    /// Bytes of scratch memory of the scatters.
    pub fn scatter_scratch(rows: usize) -> usize {
        rows.saturating_mul(4)
    }

    /// [`Embedding::embed_backward`] on device pointers. `limit` is the number of rows of `out`;
    /// rows whose index is not below it are left out, see [`Fault`].
    ///
    /// # Errors
    /// As [`Kernels::gather_rows`].
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `index` holds `rows` u32,
    /// `dense` `rows * width` bf16, `out` `limit * width` f32, `scratch` as many bytes as
    /// [`Kernels::scatter_scratch`] says; `dense` and `out` are aligned to 16 bytes, `out` and
    /// `scratch` overlap nothing, and all live until the work is done.
    pub unsafe fn scatter_add_f32(
        &self,
        stream: CUstream,
        rows: usize,
        width: usize,
        limit: usize,
        index: CUdeviceptr,
        dense: CUdeviceptr,
        out: CUdeviceptr,
        scratch: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        let entry = "scatter_add_f32";
        // SAFETY: by the caller.
        unsafe {
            self.scatter(
                entry, stream, rows, width, limit, index, dense, out, scratch, fault,
            )
        }
    }

    /// [`Embedding::scatter_add_rows`] on device pointers: the sum is f32 and rounded once.
    ///
    /// # Errors
    /// As [`Kernels::gather_rows`].
    ///
    /// # Safety
    /// As [`Kernels::scatter_add_f32`], but `out` is bf16.
    pub unsafe fn scatter_add_bf16(
        &self,
        stream: CUstream,
        rows: usize,
        width: usize,
        limit: usize,
        index: CUdeviceptr,
        dense: CUdeviceptr,
        out: CUdeviceptr,
        scratch: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        let entry = "scatter_add_bf16";
        // SAFETY: by the caller.
        unsafe {
            self.scatter(
                entry, stream, rows, width, limit, index, dense, out, scratch, fault,
            )
        }
    }

    /// # Safety
    /// As [`Kernels::scatter_add_f32`], `out` having the type that `entry` says.
    unsafe fn scatter(
        &self,
        entry: &'static str,
        stream: CUstream,
        rows: usize,
        width: usize,
        limit: usize,
        index: CUdeviceptr,
        dense: CUdeviceptr,
        out: CUdeviceptr,
        scratch: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        check_width(entry, "width", width)?;
        if width == 0 {
            return Ok(());
        }
        let threads = (width / 4).next_multiple_of(WARP).min(THREADS);
        let sort = Grid::new(rows.div_ceil(THREADS), THREADS);
        let add = Grid::new(rows, threads);
        let (rows, width) = (dim(entry, "rows", rows)?, dim(entry, "width", width)?);
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        // SAFETY: by the caller; the first kernel fills `scratch`, which the second reads.
        unsafe {
            self.launch(stream, "scatter_order", sort, &[&rows, &index, &scratch])?;
            self.launch(
                stream,
                entry,
                add,
                &[
                    &rows, &width, &limit, &index, &scratch, &dense, &out, &fault,
                ],
            )
        }
    }
}

impl Cuda {
    fn gather(
        &self,
        (op, name): (&'static str, &'static str),
        rows: usize,
        width: usize,
        index: &CudaBuffer<u32>,
        table: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        let dense = ("out", out.len());
        let limit = check(op, name, rows, width, index.len(), table.len(), dense)?;
        let mut turn = self.turn(op, &[index, table, out])?;
        let fault = turn.fault(name);
        let (index, table, out) = (index.address(), table.address(), out.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .gather_rows(turn.stream, rows, width, limit, index, table, out, fault)
        }
    }

    fn scatter<T: Element>(
        &self,
        entry: &'static str,
        (op, name): (&'static str, &'static str),
        rows: usize,
        width: usize,
        index: &CudaBuffer<u32>,
        dense: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<T>,
    ) -> Result<()> {
        let named = ("dout", dense.len());
        let limit = check(op, name, rows, width, index.len(), out.len(), named)?;
        let mut turn = self.turn(op, &[index, dense, out])?;
        let scratch = turn.scratch(Kernels::scatter_scratch(rows))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream, and
        // the callers below pass the entry for `T`.
        unsafe {
            turn.kernels.scatter(
                entry,
                turn.stream,
                rows,
                width,
                limit,
                index.address(),
                dense.address(),
                out.address(),
                scratch,
                turn.fault(name),
            )
        }
    }
}

impl Embedding for Cuda {
    fn embed(
        &self,
        rows: usize,
        width: usize,
        tokens: &CudaBuffer<u32>,
        table: Weight<'_, Self>,
        out: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        let table = super::bf16_weight("embed", table)?;
        self.gather(("embed", "tokens"), rows, width, tokens, table, out)
    }

    fn embed_backward(
        &self,
        rows: usize,
        width: usize,
        tokens: &CudaBuffer<u32>,
        dout: &CudaBuffer<bf16>,
        dtable: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let argument = ("embed_backward", "tokens");
        self.scatter(
            "scatter_add_f32",
            argument,
            rows,
            width,
            tokens,
            dout,
            dtable,
        )
    }

    fn gather_rows(
        &self,
        rows: usize,
        width: usize,
        index: &CudaBuffer<u32>,
        x: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        self.gather(("gather_rows", "index"), rows, width, index, x, out)
    }

    fn scatter_add_rows(
        &self,
        rows: usize,
        width: usize,
        index: &CudaBuffer<u32>,
        dout: &CudaBuffer<bf16>,
        dx: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        let argument = ("scatter_add_rows", "index");
        self.scatter("scatter_add_bf16", argument, rows, width, index, dout, dx)
    }
}
