//! Linear layers: `y = x wᵀ + bias`, and their three gradients.

use crate::error::{check_len, check_matrix};
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
    /// Short buffers; on a CUDA device weights that are not bf16, or inputs or outputs that are no
    /// multiple of 8.
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

/// The lengths that [`Gemm::linear`] needs.
pub(crate) fn check_linear(
    shape: LinearShape,
    x: usize,
    w: usize,
    bias: Option<usize>,
    y: usize,
) -> Result<()> {
    const OP: &str = "linear";
    check_matrix(OP, "x", x, shape.rows, shape.inputs)?;
    check_matrix(OP, "w", w, shape.outputs, shape.inputs)?;
    check_matrix(OP, "y", y, shape.rows, shape.outputs)?;
    bias.map_or(Ok(()), |bias| check_len(OP, "bias", bias, shape.outputs))
}

/// The lengths that [`Gemm::linear_dx`] needs.
pub(crate) fn check_linear_dx(shape: LinearShape, dy: usize, w: usize, dx: usize) -> Result<()> {
    const OP: &str = "linear_dx";
    check_matrix(OP, "dy", dy, shape.rows, shape.outputs)?;
    check_matrix(OP, "w", w, shape.outputs, shape.inputs)?;
    check_matrix(OP, "dx", dx, shape.rows, shape.inputs)
}

/// The lengths that [`Gemm::linear_dw`] needs.
pub(crate) fn check_linear_dw(shape: LinearShape, x: usize, dy: usize, dw: usize) -> Result<()> {
    const OP: &str = "linear_dw";
    check_matrix(OP, "x", x, shape.rows, shape.inputs)?;
    check_matrix(OP, "dy", dy, shape.rows, shape.outputs)?;
    check_matrix(OP, "dw", dw, shape.outputs, shape.inputs)
}

/// The lengths that [`Gemm::linear_dbias`] needs.
pub(crate) fn check_linear_dbias(shape: LinearShape, dy: usize, dbias: usize) -> Result<()> {
    const OP: &str = "linear_dbias";
    check_matrix(OP, "dy", dy, shape.rows, shape.outputs)?;
    check_len(OP, "dbias", dbias, shape.outputs)
}
