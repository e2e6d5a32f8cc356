//! RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): `y = x / sqrt(mean(x^2) + eps) * weight`.

use crate::attention::Heads;
use crate::error::check_len;
use crate::{Device, Error, Result};

/// Rows and their width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormShape {
    /// Rows (tokens).
    pub rows: usize,
    /// Elements of a row, over which the mean is taken.
    pub width: usize,
}

/// RMSNorm over rows, fused with the residual addition, and over heads (QK norm of Qwen3).
pub trait Norm: Device {
    /// `y = x * rstd * weight` with `rstd[i] = 1 / sqrt(mean_j x[i,j]^2 + eps)`, kept for backward.
    ///
    /// # Errors
    /// Short buffers; on a CUDA device a width that is no multiple of 8.
    fn rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        x: &Self::Buf<Self::Elem>,
        weight: &Self::Buf<f32>,
        y: &mut Self::Buf<Self::Elem>,
        rstd: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// `sum = residual + delta`, then `y = rms_norm(sum)`.
    ///
    /// # Errors
    /// As [`Norm::rms_norm`].
    fn add_rms_norm(
        &self,
        shape: NormShape,
        eps: f32,
        residual: &Self::Buf<Self::Elem>,
        delta: &Self::Buf<Self::Elem>,
        weight: &Self::Buf<f32>,
        sum: &mut Self::Buf<Self::Elem>,
        y: &mut Self::Buf<Self::Elem>,
        rstd: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Adds the gradient of the norm's input to `dx` and of its weight to `dweight`.
    ///
    /// With `h = x * rstd`: `dx += rstd * (dy * weight - h * mean(dy * weight * h))`,
    /// `dweight += sum over rows of dy * h`, rows in order.
    ///
    /// # Errors
    /// As [`Norm::rms_norm`].
    fn rms_norm_backward(
        &self,
        shape: NormShape,
        dy: &Self::Buf<Self::Elem>,
        x: &Self::Buf<Self::Elem>,
        weight: &Self::Buf<f32>,
        rstd: &Self::Buf<f32>,
        dx: &mut Self::Buf<Self::Elem>,
        dweight: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// RMSNorm of every query head with `q_weight` and every key head with `k_weight`
    /// (`[head_dim]` each) of the packed rows `[rows, q_heads + 2 * kv_heads, head_dim]`;
    /// values are copied. `rstd` is `[rows, q_heads + kv_heads]`.
    ///
    /// # Errors
    /// Short buffers; on a CUDA device a `head_dim` that is no multiple of 8 or above 256.
    fn qk_norm(
        &self,
        rows: usize,
        heads: Heads,
        eps: f32,
        qkv: &Self::Buf<Self::Elem>,
        q_weight: &Self::Buf<f32>,
        k_weight: &Self::Buf<f32>,
        out: &mut Self::Buf<Self::Elem>,
        rstd: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Turns `dqkv` (in place) from the gradient of [`Norm::qk_norm`]'s output into that of its
    /// input, and adds to `dq_weight` and `dk_weight`. The values' part is untouched.
    ///
    /// # Errors
    /// As [`Norm::qk_norm`].
    fn qk_norm_backward(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &Self::Buf<Self::Elem>,
        q_weight: &Self::Buf<f32>,
        k_weight: &Self::Buf<f32>,
        rstd: &Self::Buf<f32>,
        dqkv: &mut Self::Buf<Self::Elem>,
        dq_weight: &mut Self::Buf<f32>,
        dk_weight: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// `rows * width`.
fn check_shape(op: &'static str, shape: NormShape) -> Result<usize> {
    if shape.width == 0 {
        return Err(Error::invalid(op, "the width may not be 0"));
    }
    Ok(shape.rows.saturating_mul(shape.width))
}

/// The lengths that [`Norm::rms_norm`] needs.
pub(crate) fn check_rms_norm(
    shape: NormShape,
    x: usize,
    weight: usize,
    y: usize,
    rstd: usize,
) -> Result<()> {
    const OP: &str = "rms_norm";
    let n = check_shape(OP, shape)?;
    check_len(OP, "x", x, n)?;
    check_len(OP, "weight", weight, shape.width)?;
    check_len(OP, "y", y, n)?;
    check_len(OP, "rstd", rstd, shape.rows)
}

/// The lengths that [`Norm::add_rms_norm`] needs, in the order of its arguments.
pub(crate) fn check_add_rms_norm(
    shape: NormShape,
    [residual, delta, weight]: [usize; 3],
    [sum, y, rstd]: [usize; 3],
) -> Result<()> {
    const OP: &str = "add_rms_norm";
    let n = check_shape(OP, shape)?;
    check_len(OP, "residual", residual, n)?;
    check_len(OP, "delta", delta, n)?;
    check_len(OP, "weight", weight, shape.width)?;
    check_len(OP, "sum", sum, n)?;
    check_len(OP, "y", y, n)?;
    check_len(OP, "rstd", rstd, shape.rows)
}

/// The lengths that [`Norm::rms_norm_backward`] needs, in the order of its arguments.
pub(crate) fn check_rms_norm_backward(
    shape: NormShape,
    [dy, x, weight, rstd]: [usize; 4],
    [dx, dweight]: [usize; 2],
) -> Result<()> {
    const OP: &str = "rms_norm_backward";
    let n = check_shape(OP, shape)?;
    check_len(OP, "dy", dy, n)?;
    check_len(OP, "x", x, n)?;
    check_len(OP, "weight", weight, shape.width)?;
    check_len(OP, "rstd", rstd, shape.rows)?;
    check_len(OP, "dx", dx, n)?;
    check_len(OP, "dweight", dweight, shape.width)
}

/// The lengths that [`Norm::qk_norm`] needs.
pub(crate) fn check_qk_norm(
    rows: usize,
    heads: Heads,
    qkv: usize,
    [q_weight, k_weight]: [usize; 2],
    out: usize,
    rstd: usize,
) -> Result<()> {
    const OP: &str = "qk_norm";
    heads.check(OP)?;
    let n = rows.saturating_mul(heads.qkv_width());
    let normed = rows.saturating_mul(heads.q_heads + heads.kv_heads);
    check_len(OP, "qkv", qkv, n)?;
    check_len(OP, "q_weight", q_weight, heads.head_dim)?;
    check_len(OP, "k_weight", k_weight, heads.head_dim)?;
    check_len(OP, "out", out, n)?;
    check_len(OP, "rstd", rstd, normed)
}

/// The lengths that [`Norm::qk_norm_backward`] needs.
pub(crate) fn check_qk_norm_backward(
    rows: usize,
    heads: Heads,
    qkv: usize,
    [q_weight, k_weight]: [usize; 2],
    rstd: usize,
    [dqkv, dq_weight, dk_weight]: [usize; 3],
) -> Result<()> {
    const OP: &str = "qk_norm_backward";
    heads.check(OP)?;
    let n = rows.saturating_mul(heads.qkv_width());
    let normed = rows.saturating_mul(heads.q_heads + heads.kv_heads);
    check_len(OP, "qkv", qkv, n)?;
    check_len(OP, "q_weight", q_weight, heads.head_dim)?;
    check_len(OP, "k_weight", k_weight, heads.head_dim)?;
    check_len(OP, "rstd", rstd, normed)?;
    check_len(OP, "dqkv", dqkv, n)?;
    check_len(OP, "dq_weight", dq_weight, heads.head_dim)?;
    check_len(OP, "dk_weight", dk_weight, heads.head_dim)
}
