//! Rows of a table by index, and their gradient.

use crate::error::check_len;
use crate::{Device, Result, Weight};

/// Gathers rows, and scatters gradients back without atomics.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, Weight, embedding::Embedding};
/// let cpu = Cpu::new();
/// let table = cpu.upload(&[1.0f32, 2.0, 3.0, 4.0])?; // 2 tokens of width 2
/// let tokens = cpu.upload(&[1u32, 0, 1])?;
/// let mut out = cpu.zeros(6)?;
/// cpu.embed(3, 2, &tokens, Weight::F32(&table), &mut out)?;
/// assert_eq!(cpu.download(&out)?, [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
/// // Each use of a token adds to its gradient.
/// let mut dtable = cpu.zeros(4)?;
/// cpu.embed_backward(3, 2, &tokens, &out, &mut dtable)?;
/// assert_eq!(cpu.download(&dtable)?, [1.0, 2.0, 6.0, 8.0]);
/// # Ok(())
/// # }
/// ```
pub trait Embedding: Device {
    /// `out[i, :] = table[tokens[i], :]` for `i < rows`; the table is `[vocab, width]`, with
    /// as many tokens as its buffer has whole rows.
    ///
    /// # Errors
    /// Short buffers; a token that is not below `vocab`: then nothing is written; on a CUDA device a
    /// width that is no multiple of 8, or a table that is not bf16.
    fn embed(
        &self,
        rows: usize,
        width: usize,
        tokens: &Self::Buf<u32>,
        table: Weight<'_, Self>,
        out: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// `dtable[tokens[i], :] += dout[i, :]`, equal tokens summed in the order of `i`.
    ///
    /// # Errors
    /// As [`Embedding::embed`].
    fn embed_backward(
        &self,
        rows: usize,
        width: usize,
        tokens: &Self::Buf<u32>,
        dout: &Self::Buf<Self::Elem>,
        dtable: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// `out[i, :] = x[index[i], :]` for `i < rows`.
    ///
    /// # Errors
    /// As [`Embedding::embed`].
    fn gather_rows(
        &self,
        rows: usize,
        width: usize,
        index: &Self::Buf<u32>,
        x: &Self::Buf<Self::Elem>,
        out: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// `dx[index[i], :] += dout[i, :]`, equal indices summed in the order of `i`.
    ///
    /// # Errors
    /// As [`Embedding::embed`].
    fn scatter_add_rows(
        &self,
        rows: usize,
        width: usize,
        index: &Self::Buf<u32>,
        dout: &Self::Buf<Self::Elem>,
        dx: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;
}

/// What all of [`Embedding`] needs but the indices' values, which must be below the result: the
/// rows of a table of `table` elements.
pub(crate) fn check(
    op: &'static str,
    name: &'static str,
    rows: usize,
    width: usize,
    index: usize,
    table: usize,
    dense: (&'static str, usize),
) -> Result<usize> {
    check_len(op, name, index, rows)?;
    check_len(op, dense.0, dense.1, rows.saturating_mul(width))?;
    Ok(table.checked_div(width).unwrap_or(usize::MAX))
}
