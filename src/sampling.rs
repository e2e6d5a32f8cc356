//! Choosing the next token: temperature, top-k, top-p, min-p and greedy, with counter-based random
//! numbers, so that a draw depends on (seed, sequence, position) and on nothing else.

use crate::error::{check_len, check_matrix};
use crate::{Device, Result};

/// How one row is sampled. Filters apply in the order top-k, top-p, min-p, each to the
/// probabilities renormalised by those before; ties keep the lowest token first.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct RowSampling {
    /// Key of the random numbers.
    pub seed: u64,
    /// Which sequence this is: first counter.
    pub sequence: u32,
    /// Position of the token to draw: second counter.
    pub position: u32,
    /// Softmax temperature; 0 is greedy, ties to the lowest token.
    pub temperature: f32,
    /// Keep the smallest set of most probable tokens whose mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable; 0 keeps all.
    pub min_p: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: u32,
}

impl Default for RowSampling {
    /// Plain sampling at temperature 1.
    fn default() -> Self {
        RowSampling {
            seed: 0,
            sequence: 0,
            position: 0,
            temperature: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            top_k: 0,
        }
    }
}

/// Draws tokens.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, sampling::{RowSampling, Sampling}};
/// let cpu = Cpu::new();
/// // Two rows of three tokens: one greedy, one among the two best.
/// let logits = cpu.upload(&[0.0f32, 2.0, 1.0, 5.0, 5.0, -5.0])?;
/// let params = cpu.upload(&[
///     RowSampling { temperature: 0.0, ..Default::default() },
///     RowSampling { seed: 7, top_k: 2, ..Default::default() },
/// ])?;
/// let mut tokens = cpu.zeros::<u32>(2)?;
/// let (mut logprob, mut kept) = (cpu.zeros(2)?, cpu.zeros(2)?);
/// cpu.sample(2, 3, &logits, &params, &mut tokens, &mut logprob, &mut kept)?;
/// assert_eq!(tokens[0], 1);
/// assert!(tokens[1] < 2);
/// assert!(kept[0] == 1.0 && kept[1] > 0.999);
/// # Ok(())
/// # }
/// ```
pub trait Sampling: Device {
    /// For each row of `logits` `[rows, vocab]`: a token, its log-probability under the *unfiltered*
    /// softmax at the row's temperature (at temperature 1 where greedy, which knows no filters), with
    /// the bits of [`crate::logprob::Logprob::logprob`], and the mass that the filters kept (1 where none
    /// applies): the filtered log-probability is `logprob - ln(kept)`.
    ///
    /// With `z = logit * (1 / temperature)` in f32: a row that holds a NaN or positive infinity, or
    /// no finite logit, or whose settings are not valid (a temperature that is negative or not
    /// finite, a NaN), gets token `u32::MAX`, log-probability NaN and kept 0, which the caller must
    /// report: sampling goes on for the other rows. Logits of negative infinity are never drawn.
    ///
    /// The random number is made of the upper 53 bits of the first two words (the second above the
    /// first) of Philox4x32-10 with the key `seed` and the counter `(sequence, position, 0, 0)`; the token is where the cumulative distribution over the kept
    /// tokens, in their order, passes it. The most probable token is always kept.
    ///
    /// # Errors
    /// Short buffers; on a CUDA device more than 2^20 tokens.
    fn sample(
        &self,
        rows: usize,
        vocab: usize,
        logits: &Self::Buf<f32>,
        params: &Self::Buf<RowSampling>,
        tokens: &mut Self::Buf<u32>,
        logprob: &mut Self::Buf<f32>,
        kept: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// The lengths that [`Sampling::sample`] needs, in the order of its arguments.
pub(crate) fn check_sample(
    rows: usize,
    vocab: usize,
    [logits, params]: [usize; 2],
    [tokens, logprob, kept]: [usize; 3],
) -> Result<()> {
    const OP: &str = "sample";
    check_matrix(OP, "logits", logits, rows, vocab)?;
    check_len(OP, "params", params, rows)?;
    check_len(OP, "tokens", tokens, rows)?;
    check_len(OP, "logprob", logprob, rows)?;
    check_len(OP, "kept", kept, rows)
}
