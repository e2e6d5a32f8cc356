//! Row gathers, and scatters that cut the *width* into strips: each task walks all rows in order
//! over its own columns, so that equal indices add up in the order of the rows without atomics.

use super::Cpu;
use super::pool::{Pool, SharedMut};
use crate::embedding::{self, Embedding};
use crate::error::check_indices;
use crate::{Float, Result, Weight};

/// Elements that a gather task copies, about.
const COPY: usize = 16 * 1024;
/// Columns of the narrowest strip of a scatter: four cache lines.
const STRIP: usize = 64;

/// Checks the index list against a table of `table` elements, and both buffers' lengths.
fn check(
    op: &'static str,
    name: &'static str,
    rows: usize,
    width: usize,
    index: &[u32],
    table: usize,
    dense: (&'static str, usize),
) -> Result<()> {
    let limit = embedding::check(op, name, rows, width, index.len(), table, dense)?;
    check_indices(op, name, &index[..rows], limit)
}

fn gather<T: Float>(pool: &Pool, width: usize, index: &[u32], table: &[T], out: &mut [f32]) {
    if width == 0 {
        return;
    }
    let rows = COPY.div_ceil(width);
    let out = &mut out[..index.len() * width];
    pool.chunks_mut(out, rows * width, |task, out| {
        let index = &index[task * rows..];
        for (out, &i) in out.chunks_exact_mut(width).zip(index) {
            let row = &table[i as usize * width..][..width];
            for (out, x) in out.iter_mut().zip(row) {
                *out = x.to_f32();
            }
        }
    });
}

fn scatter_add(pool: &Pool, width: usize, index: &[u32], dense: &[f32], table: &mut [f32]) {
    let strip = width
        .div_ceil(pool.threads())
        .next_multiple_of(16)
        .max(STRIP);
    let table = SharedMut::new(table);
    pool.run(width.div_ceil(strip), |task| {
        let start = task * strip;
        let columns = strip.min(width - start);
        for (i, &t) in index.iter().enumerate() {
            // SAFETY: the task alone touches these columns, and one row of them at a time.
            let sum = unsafe { table.slice(t as usize * width + start, columns) };
            let add = &dense[i * width + start..][..columns];
            for (sum, x) in sum.iter_mut().zip(add) {
                *sum += x;
            }
        }
    });
}

impl Embedding for Cpu {
    fn embed(
        &self,
        rows: usize,
        width: usize,
        tokens: &Self::Buf<u32>,
        table: Weight<'_, Self>,
        out: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let dense = ("out", out.len());
        check("embed", "tokens", rows, width, tokens, table.len(), dense)?;
        match table {
            Weight::F32(t) => gather(&self.pool, width, &tokens[..rows], t, out),
            Weight::Bf16(t) => gather(&self.pool, width, &tokens[..rows], t, out),
        }
        Ok(())
    }

    fn embed_backward(
        &self,
        rows: usize,
        width: usize,
        tokens: &Self::Buf<u32>,
        dout: &Self::Buf<f32>,
        dtable: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let dense = ("dout", dout.len());
        check(
            "embed_backward",
            "tokens",
            rows,
            width,
            tokens,
            dtable.len(),
            dense,
        )?;
        scatter_add(&self.pool, width, &tokens[..rows], dout, dtable);
        Ok(())
    }

    fn gather_rows(
        &self,
        rows: usize,
        width: usize,
        index: &Self::Buf<u32>,
        x: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let dense = ("out", out.len());
        check("gather_rows", "index", rows, width, index, x.len(), dense)?;
        gather(&self.pool, width, &index[..rows], x, out);
        Ok(())
    }

    fn scatter_add_rows(
        &self,
        rows: usize,
        width: usize,
        index: &Self::Buf<u32>,
        dout: &Self::Buf<f32>,
        dx: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let dense = ("dout", dout.len());
        check(
            "scatter_add_rows",
            "index",
            rows,
            width,
            index,
            dx.len(),
            dense,
        )?;
        scatter_add(&self.pool, width, &index[..rows], dout, dx);
        Ok(())
    }
}
