//! Linear layers: `y = x wᵀ + bias`, and their three gradients.

use crate::{Device, Result, Weight};

/// The sizes of a linear layer's call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of `x` and `y` (tokens).
    pub rows: usize,
    /// Width of `x`: the reduced dimension of the forward pass.
    pub inputs: usize,
    /// Width of `y`.
    pub outputs: usize,
}

/// Matrix products of a linear layer with weight `w` `[outputs, inputs]`.
pub trait Gemm: Device {
    /// `y[rows, outputs] = x[rows, inputs] wᵀ + bias[outputs]`.
    ///
    /// A row of `y` has the same bits whatever `rows` is.
    ///
    /// # Errors
    /// Short buffers; a weight format that the device does not take.
    fn linear(
        &self,
        shape: LinearShape,
        x: &Self::Buf<Self::Elem>,
        w: Weight<'_, Self>,
        bias: Option<&Self::Buf<f32>>,
        y: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// `dx[rows, inputs] = dy[rows, outputs] w`.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    fn linear_dx(
        &self,
        shape: LinearShape,
        dy: &Self::Buf<Self::Elem>,
        w: Weight<'_, Self>,
        dx: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// `dw[outputs, inputs] += dyᵀ x`, summed over the rows in a fixed order.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    fn linear_dw(
        &self,
        shape: LinearShape,
        x: &Self::Buf<Self::Elem>,
        dy: &Self::Buf<Self::Elem>,
        dw: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// `dbias[outputs] += sum over rows of dy`, rows in order.
    ///
    /// # Errors
    /// As [`Gemm::linear`].
    fn linear_dbias(
        &self,
        shape: LinearShape,
        dy: &Self::Buf<Self::Elem>,
        dbias: &mut Self::Buf<f32>,
    ) -> Result<()>;
}
