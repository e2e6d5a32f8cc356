//! Rows of a table by index, and their gradient.

use crate::{Device, Result, Weight};

/// Gathers rows, and scatters gradients back without atomics.
pub trait Embedding: Device {
    /// `out[i, :] = table[tokens[i], :]` for `i < rows`; the table is `[vocab, width]`.
    ///
    /// # Errors
    /// Short buffers; a token that is not below `vocab`.
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
