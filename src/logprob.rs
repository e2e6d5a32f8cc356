//! The linear head fused with log-softmax and the choice of the target.
//!
//! With `z = x headᵀ / temperature`: log-probability `z[target] - lse(z)`, entropy
//! `lse(z) - sum softmax(z) z`. Training never stores the logits, only each row's log-sum-exp.

use crate::{Device, Result, Weight};

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
    /// Short buffers, a target outside of the vocabulary, a temperature that is not positive.
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
    /// Short buffers.
    fn logits(
        &self,
        shape: HeadShape,
        x: &Self::Buf<Self::Elem>,
        head: Weight<'_, Self>,
        logits: &mut Self::Buf<f32>,
    ) -> Result<()>;
}
