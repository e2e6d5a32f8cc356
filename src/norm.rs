//! RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): `y = x / sqrt(mean(x^2) + eps) * weight`.

use crate::{Device, Result, attention::Heads};

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
    /// Short buffers.
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
    /// Short buffers.
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
    /// Short buffers.
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
    /// Short buffers.
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
    /// Short buffers.
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
