//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), NeoX layout: element `i` of the
//! first half of a head is rotated with element `i` of the second half.

use crate::{Device, Result, attention::Heads};

/// Rotation of query and key heads by tables of cosines and sines, so that any base and scaling
/// (linear, YaRN, ...) is a matter of the table.
pub trait Rope: Device {
    /// Rotates the query and key heads of `qkv` `[rows, q_heads + 2 * kv_heads, head_dim]` in place:
    /// `(a, b) -> (a cos - b sin, b cos + a sin)` with `cos`, `sin` `[max_positions, head_dim / 2]`
    /// taken at `positions[row]`. `inverse` turns the other way, which is the backward pass.
    ///
    /// # Errors
    /// Short buffers, an odd `head_dim`, a position outside of the tables.
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
