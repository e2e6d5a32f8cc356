//! Hand-written kernels for reinforcement learning of language models.
//!
//! Every operation is a trait in a module of its own ([`gemm`], [`attention`], [`logprob`], ...) and
//! a [`Backend`] is the sum of them. [`Cpu`] implements all of them with SIMD on every core.
//!
//! With the feature `cuda`, on by default, there is `Cuda`: the operations as hand-written CUDA
//! kernels with bf16 activations, launched through the driver alone, and the module `cuda` with the
//! same kernels on plain device pointers. Building it needs nvcc, which `CUDA_HOME` or `DUST_NVCC`
//! names if it is not on `PATH` (in a checkout `make toolchain` fetches one), not a GPU. **It has run
//! on `cuda-emulator` only**, which executes the PTX on the CPU with checks for races and bad
//! accesses; on hardware it is untried. `default-features = false` leaves it out.
//! The feature `cust` adds `cuda::cust`: the kernels on the buffers of the crate cust.
//!
//! Three promises hold for every operation, and tests hold them:
//!
//! 1. **Deterministic**: two runs give the same bits.
//! 2. **Batch-invariant**: a row's result does not depend on what else is in the batch.
//! 3. **Rollout = training**: the log-probability recorded while sampling has the same bits as the
//!    one that the training forward pass computes for the same token.
//!
//! ```
//! use dust_kernels::{Cpu, Device, gemm::{Gemm, LinearShape}, Weight};
//! # fn main() -> dust_kernels::Result<()> {
//! let cpu = Cpu::new();
//! let x = cpu.upload(&[1.0f32, 2.0])?; // 1 row of 2 inputs
//! let w = cpu.upload(&[3.0f32, 4.0, 5.0, 6.0])?; // 2 outputs of 2 inputs
//! let mut y = cpu.zeros::<f32>(2)?;
//! cpu.linear(LinearShape { rows: 1, inputs: 2, outputs: 2 }, &x, Weight::F32(&w), None, &mut y)?;
//! assert_eq!(cpu.download(&y)?, [11.0, 17.0]);
//! # Ok(())
//! # }
//! ```

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
pub mod embedding;
mod error;
pub mod gemm;
pub mod grpo;
pub mod logprob;
pub mod norm;
pub mod ranking;
pub mod rope;
pub mod sampling;

pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use device::{Buffer, Device, Element, Float, Weight};
pub use error::{Error, Result};

/// Everything a trainer needs: the sum of the operations.
///
/// Code that is generic over `B: Backend` runs unchanged on every back end.
pub trait Backend:
    Device
    + activation::Activation
    + adamw::AdamW
    + attention::Attention
    + embedding::Embedding
    + gemm::Gemm
    + grpo::Grpo
    + logprob::Logprob
    + norm::Norm
    + ranking::Ranking
    + rope::Rope
    + sampling::Sampling
{
}

impl<T> Backend for T where
    T: Device
        + activation::Activation
        + adamw::AdamW
        + attention::Attention
        + embedding::Embedding
        + gemm::Gemm
        + grpo::Grpo
        + logprob::Logprob
        + norm::Norm
        + ranking::Ranking
        + rope::Rope
        + sampling::Sampling
{
}
