//! Launches of `kernels/sampling.cu`.

use super::launch::{Grid, Kernels, dim};
use super::logprob::{FINISH_THREADS, UNIT};
use super::{Cuda, CudaBuffer};
use crate::sampling::{RowSampling, Sampling, check_sample};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// A token has 20 bits of a key, and the states of its row's units fit into shared memory.
const MOST_TOKENS: usize = 1 << 20;
/// Bytes of a unit's state.
const STATE: usize = 8;
/// Units of a block of the first kernel: eight lanes each.
const UNITS: usize = FINISH_THREADS / 8;

impl Kernels {
    /// Bytes of scratch memory of [`Kernels::sample`].
    pub fn sample_scratch(rows: usize, vocab: usize) -> usize {
        rows.saturating_mul(vocab.div_ceil(UNIT) * STATE)
    }

    /// [`Sampling::sample`] on device pointers.
    ///
    /// # Errors
    /// More than 2^20 tokens; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `logits` holds `rows * vocab` f32,
    /// `params` `rows` [`RowSampling`], `tokens` `rows` u32, `logprob` and `kept` `rows` f32, `scratch`
    /// as many bytes as [`Kernels::sample_scratch`] says; all are aligned to 16 bytes and live until the
    /// work is done, and what is written overlaps nothing.
    pub unsafe fn sample(
        &self,
        stream: CUstream,
        rows: usize,
        vocab: usize,
        logits: CUdeviceptr,
        params: CUdeviceptr,
        tokens: CUdeviceptr,
        logprob: CUdeviceptr,
        kept: CUdeviceptr,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "sample";
        if vocab > MOST_TOKENS {
            return Err(Error::invalid(
                OP,
                format!("the vocabulary has {vocab} tokens, at most {MOST_TOKENS} can be sampled"),
            ));
        }
        dim(OP, "rows", rows)?;
        let units = vocab.div_ceil(UNIT);
        let (width, count) = (vocab as i32, units as i32);
        let states = Grid {
            blocks: [rows, units.div_ceil(UNITS), 1],
            ..Grid::new(rows, FINISH_THREADS)
        };
        // SAFETY: by the caller; the first kernel writes a state for each row and unit, the second
        // reads them.
        unsafe {
            self.launch(
                stream,
                "sampling_states",
                states,
                &[&logits, &params, &scratch, &width, &count],
            )?;
            self.launch(
                stream,
                "sampling_draw",
                Grid::new(rows, FINISH_THREADS).shared(units * STATE),
                &[
                    &logits, &params, &scratch, &tokens, &logprob, &kept, &width, &count,
                ],
            )
        }
    }
}

impl Sampling for Cuda {
    fn sample(
        &self,
        rows: usize,
        vocab: usize,
        logits: &CudaBuffer<f32>,
        params: &CudaBuffer<RowSampling>,
        tokens: &mut CudaBuffer<u32>,
        logprob: &mut CudaBuffer<f32>,
        kept: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        let outputs = [tokens.len(), logprob.len(), kept.len()];
        check_sample(rows, vocab, [logits.len(), params.len()], outputs)?;
        let mut turn = self.turn("sample", &[logits, params, tokens, logprob, kept])?;
        let scratch = turn.scratch(Kernels::sample_scratch(rows, vocab))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.sample(
                turn.stream,
                rows,
                vocab,
                logits.address(),
                params.address(),
                tokens.address(),
                logprob.address(),
                kept.address(),
                scratch,
            )
        }
    }
}
