//! The linear head fused with log-softmax and the choice of the target.
//!
//! With `z = x headᵀ / temperature`: log-probability `z[target] - lse(z)`, entropy
//! `lse(z) - sum softmax(z) z`. Training never stores the logits, only each row's log-sum-exp.

use crate::error::{check_len, check_matrix};
use crate::{Device, Error, Result, Weight};

/// The sizes of a head's call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Rows of hidden states.
    pub rows: usize,
    /// Width of a hidden state.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

/// The head, for training (fused) and rollout (logits).
pub trait Logprob: Device {
    /// Log-probability, log-sum-exp and entropy (nats) of each row; `[rows]` each, f32.
    ///
    /// # Errors
    /// Short buffers, a target outside of the vocabulary, a temperature that is not positive; on a
    /// CUDA device a head that is not bf16, or a hidden width that is no multiple of 8.
    fn logprob(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &Self::Buf<Self::Elem>,
        head: Weight<'_, Self>,
        targets: &Self::Buf<u32>,
        logprob: &mut Self::Buf<f32>,
        lse: &mut Self::Buf<f32>,
        entropy: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// From the gradient of the log-probabilities: writes `dx`, adds to `dhead` if given.
    ///
    /// `dz[v] = dlogprob * ((v == target) - exp(z[v] - lse)) / temperature`; the logits are
    /// computed again, block by block, with the bits of the forward pass. Rows whose `dlogprob` is
    /// 0 get `dx = 0` and add nothing.
    ///
    /// # Errors
    /// As [`Logprob::logprob`].
    fn logprob_backward(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &Self::Buf<Self::Elem>,
        head: Weight<'_, Self>,
        targets: &Self::Buf<u32>,
        lse: &Self::Buf<f32>,
        dlogprob: &Self::Buf<f32>,
        dx: &mut Self::Buf<Self::Elem>,
        dhead: Option<&mut Self::Buf<f32>>,
    ) -> Result<()>;

    /// The logits `x headᵀ` of a few rows, `[rows, vocab]` f32, for [`crate::sampling`].
    ///
    /// # Errors
    /// Short buffers; on a CUDA device as [`Logprob::logprob`].
    fn logits(
        &self,
        shape: HeadShape,
        x: &Self::Buf<Self::Elem>,
        head: Weight<'_, Self>,
        logits: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// `1 / temperature`, if both are positive and finite.
pub(crate) fn inverse_temperature(op: &'static str, temperature: f32) -> Result<f32> {
    let inverse = 1.0 / temperature;
    if temperature > 0.0 && inverse > 0.0 && inverse.is_finite() {
        return Ok(inverse);
    }
    Err(Error::invalid(
        op,
        format!("the temperature is {temperature}, it must be positive and finite, such as 1"),
    ))
}

/// What forward and backward have in common.
fn check_inputs(op: &'static str, shape: HeadShape, [x, head, targets]: [usize; 3]) -> Result<()> {
    check_matrix(op, "x", x, shape.rows, shape.hidden)?;
    check_matrix(op, "head", head, shape.vocab, shape.hidden)?;
    check_len(op, "targets", targets, shape.rows)
}

/// The lengths that [`Logprob::logprob`] needs, in the order of its arguments.
pub(crate) fn check_logprob(
    shape: HeadShape,
    inputs: [usize; 3],
    [logprob, lse, entropy]: [usize; 3],
) -> Result<()> {
    const OP: &str = "logprob";
    check_inputs(OP, shape, inputs)?;
    check_len(OP, "logprob", logprob, shape.rows)?;
    check_len(OP, "lse", lse, shape.rows)?;
    check_len(OP, "entropy", entropy, shape.rows)
}

/// The lengths that [`Logprob::logprob_backward`] needs, in the order of its arguments.
pub(crate) fn check_logprob_backward(
    shape: HeadShape,
    inputs: [usize; 3],
    [lse, dlogprob, dx]: [usize; 3],
    dhead: Option<usize>,
) -> Result<()> {
    const OP: &str = "logprob_backward";
    check_inputs(OP, shape, inputs)?;
    check_len(OP, "lse", lse, shape.rows)?;
    check_len(OP, "dlogprob", dlogprob, shape.rows)?;
    check_matrix(OP, "dx", dx, shape.rows, shape.hidden)?;
    dhead.map_or(Ok(()), |dhead| {
        check_matrix(OP, "dhead", dhead, shape.vocab, shape.hidden)
    })
}

/// The lengths that [`Logprob::logits`] needs.
pub(crate) fn check_logits(shape: HeadShape, x: usize, head: usize, logits: usize) -> Result<()> {
    const OP: &str = "logits";
    check_matrix(OP, "x", x, shape.rows, shape.hidden)?;
    check_matrix(OP, "head", head, shape.vocab, shape.hidden)?;
    check_matrix(OP, "logits", logits, shape.rows, shape.vocab)
}
