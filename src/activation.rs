//! SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) * up`, `silu(g) = g / (1 + exp(-g))`.

use crate::error::check_len;
use crate::{Device, Result};

/// The gated activation of the MLP.
///
/// Gates of any size are safe: far below 0 the result is 0, far above it is `gate * up`.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, activation::Activation};
/// let cpu = Cpu::new();
/// let gate_up = cpu.upload(&[0.0f32, 1.0, 5.0, 2.0])?; // gates 0 and 1, ups 5 and 2
/// let mut out = cpu.zeros(2)?;
/// cpu.swiglu(1, 2, &gate_up, &mut out)?;
/// let out = cpu.download(&out)?;
/// assert_eq!(out[0], 0.0);
/// assert!((out[1] - 2.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub trait Activation: Device {
    /// `out[i, j] = silu(gate_up[i, j]) * gate_up[i, width + j]`; `gate_up` is `[rows, 2 * width]`.
    ///
    /// # Errors
    /// Short buffers; on a CUDA device a width that is no multiple of 8.
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
    /// As [`Activation::swiglu`].
    fn swiglu_backward(
        &self,
        rows: usize,
        width: usize,
        gate_up: &Self::Buf<Self::Elem>,
        dout: &Self::Buf<Self::Elem>,
        dgate_up: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;
}

/// The lengths that [`Activation::swiglu`] needs.
pub(crate) fn check_swiglu(rows: usize, width: usize, gate_up: usize, out: usize) -> Result<()> {
    const OP: &str = "swiglu";
    let len = rows.saturating_mul(width);
    check_len(OP, "gate_up", gate_up, len.saturating_mul(2))?;
    check_len(OP, "out", out, len)
}

/// The lengths that [`Activation::swiglu_backward`] needs.
pub(crate) fn check_swiglu_backward(
    rows: usize,
    width: usize,
    gate_up: usize,
    dout: usize,
    dgate_up: usize,
) -> Result<()> {
    const OP: &str = "swiglu_backward";
    let len = rows.saturating_mul(width);
    check_len(OP, "gate_up", gate_up, len.saturating_mul(2))?;
    check_len(OP, "dout", dout, len)?;
    check_len(OP, "dgate_up", dgate_up, len.saturating_mul(2))
}
