//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), NeoX layout: element `i` of the
//! first half of a head is rotated with element `i` of the second half.

use crate::attention::Heads;
use crate::error::check_len;
use crate::{Device, Error, Result};

/// Rotation of query and key heads by tables of cosines and sines, so that any base and scaling
/// (linear, YaRN, ...) is a matter of the table.
pub trait Rope: Device {
    /// Rotates the query and key heads of `qkv` `[rows, q_heads + 2 * kv_heads, head_dim]` in place:
    /// `(a, b) -> (a cos - b sin, b cos + a sin)` with `cos`, `sin` `[max_positions, head_dim / 2]`
    /// taken at `positions[row]`. `inverse` turns the other way, which is the backward pass.
    ///
    /// # Errors
    /// Short buffers, an odd `head_dim`, a position outside of the tables; on a CUDA device a
    /// `head_dim` that is no multiple of 16 or above 512.
    fn rope(
        &self,
        rows: usize,
        heads: Heads,
        positions: &Self::Buf<u32>,
        cos: &Self::Buf<f32>,
        sin: &Self::Buf<f32>,
        inverse: bool,
        qkv: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;
}

/// What [`Rope::rope`] needs but the positions' values, which must be below the result: the number
/// of positions that both tables have.
pub(crate) fn check_rope(
    rows: usize,
    heads: Heads,
    positions: usize,
    [cos, sin]: [usize; 2],
    qkv: usize,
) -> Result<usize> {
    const OP: &str = "rope";
    heads.check(OP)?;
    if !heads.head_dim.is_multiple_of(2) {
        return Err(Error::invalid(
            OP,
            format!("head_dim must be even, it is {}", heads.head_dim),
        ));
    }
    check_len(OP, "positions", positions, rows)?;
    check_len(OP, "qkv", qkv, rows.saturating_mul(heads.qkv_width()))?;
    Ok(cos.min(sin) / (heads.head_dim / 2))
}
