//! SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up`, `silu(g) = g / (1 + exp(-g))`.

use crate::{Device, Result};

/// The gated activation of the MLP.
pub trait Activation: Device {
    /// `out[i, j] = silu(gate_up[i, j]) * gate_up[i, width + j]`; `gate_up` is `[rows, 2 * width]`.
    ///
    /// # Errors
    /// Short buffers.
    fn swiglu(
        &self,
        rows: usize,
        width: usize,
        gate_up: &Self::Buf<Self::Elem>,
        out: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// The gradient of [`Activation::swiglu`] with respect to `gate_up`, from that of `out`.
    ///
    /// # Errors
    /// Short buffers.
    fn swiglu_backward(
        &self,
        rows: usize,
        width: usize,
        gate_up: &Self::Buf<Self::Elem>,
        dout: &Self::Buf<Self::Elem>,
        dgate_up: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;
}
