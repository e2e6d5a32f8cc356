//! Launches of `kernels/grpo.cu`.

use super::launch::{Arg, Fault, Grid, Kernels, dim};
use super::{Cuda, CudaBuffer};
use crate::grpo::{
    AdvantageConfig, Grpo, GrpoConfig, KlEstimator, RatioLevel, SequenceStats, check_advantages,
    check_grpo_loss,
};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// Threads of a sequence's block.
const THREADS: usize = 128;
const WARP: usize = 32;
/// Groups of a block of advantages: one a warp.
const GROUPS: usize = 4;

/// The surrogate's constants, as the kernel takes them.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Loss {
    low: f64,
    high: f64,
    dual: f64,
    kl_coef: f64,
    kl: i32,
    whole: i32,
}

impl Kernels {
    /// [`Grpo::advantages`] on device pointers.
    ///
    /// # Errors
    /// An empty group; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `rewards` and `advantages` hold
    /// `groups * group_size` f32, do not overlap, and live until the work is done.
    pub unsafe fn advantages(
        &self,
        stream: CUstream,
        groups: usize,
        group_size: usize,
        config: AdvantageConfig,
        rewards: CUdeviceptr,
        advantages: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "advantages";
        if group_size == 0 {
            return Err(Error::invalid(OP, "`group_size` is 0"));
        }
        let grid = Grid::new(groups.div_ceil(GROUPS), GROUPS * WARP);
        let (groups, size) = (
            dim(OP, "groups", groups)?,
            dim(OP, "group_size", group_size)?,
        );
        let (divide, eps) = (i32::from(config.divide_by_std), config.eps);
        let args: [&dyn Arg; 6] = [&groups, &size, &divide, &eps, &rewards, &advantages];
        // SAFETY: by the caller.
        unsafe { self.launch(stream, OP, grid, &args) }
    }

    /// Bytes of scratch memory of [`Kernels::grpo_loss`].
    pub const GRPO_LOSS_SCRATCH: usize = 4;

    /// [`Grpo::grpo_loss`] on device pointers; `reference` is 0 where there is none.
    ///
    /// Offsets that do not ascend from 0 to at most `tokens` are noted in `fault`; nothing else is
    /// written then.
    ///
    /// # Errors
    /// A setting that the trait's function refuses; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `offsets` holds `sequences + 1`
    /// u32, `weights` and `advantages` hold `sequences` f32, `new`, `old`, `reference` and
    /// `dlogprob` `tokens` f32, `stats` `sequences` [`SequenceStats`] aligned to 16 bytes,
    /// `scratch` [`Kernels::GRPO_LOSS_SCRATCH`] bytes aligned to 4. What is written overlaps
    /// nothing, and all live until the work is done; `fault` is as its documentation says.
    pub unsafe fn grpo_loss(
        &self,
        stream: CUstream,
        config: &GrpoConfig,
        sequences: usize,
        tokens: usize,
        offsets: CUdeviceptr,
        weights: CUdeviceptr,
        advantages: CUdeviceptr,
        new: CUdeviceptr,
        old: CUdeviceptr,
        reference: CUdeviceptr,
        dlogprob: CUdeviceptr,
        stats: CUdeviceptr,
        scratch: CUdeviceptr,
        fault: Fault,
    ) -> Result<()> {
        const OP: &str = "grpo_loss";
        config.check(reference != 0)?;
        let loss = Loss {
            low: 1.0 - f64::from(config.clip_low),
            high: 1.0 + f64::from(config.clip_high),
            dual: config.dual_clip.map_or(f64::INFINITY, f64::from),
            kl_coef: f64::from(config.kl_coef),
            kl: match config.kl {
                KlEstimator::K1 => 0,
                KlEstimator::K2 => 1,
                KlEstimator::K3 => 2,
            },
            whole: i32::from(config.ratio == RatioLevel::Sequence),
        };
        // One block more than sequences: it clears what belongs to none.
        let grid = Grid::new(sequences.saturating_add(1), THREADS);
        let (sequences, tokens) = (dim(OP, "sequences", sequences)?, dim(OP, "tokens", tokens)?);
        let look: [&dyn Arg; 5] = [&sequences, &tokens, &offsets, &fault, &scratch];
        let args: [&dyn Arg; 12] = [
            &sequences,
            &tokens,
            &loss,
            &scratch,
            &offsets,
            &weights,
            &advantages,
            &new,
            &old,
            &reference,
            &dlogprob,
            &stats,
        ];
        // SAFETY: by the caller; the first kernel writes `scratch`, by which the second knows
        // whether the offsets can be followed.
        unsafe {
            self.launch(stream, "grpo_offsets", Grid::new(1, THREADS), &look)?;
            self.launch(stream, OP, grid, &args)
        }
    }
}

impl Grpo for Cuda {
    fn advantages(
        &self,
        groups: usize,
        group_size: usize,
        config: AdvantageConfig,
        rewards: &CudaBuffer<f32>,
        advantages: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        check_advantages(groups, group_size, rewards.len(), advantages.len())?;
        let turn = self.turn("advantages", &[rewards, advantages])?;
        let (rewards, advantages) = (rewards.address(), advantages.address());
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels
                .advantages(turn.stream, groups, group_size, config, rewards, advantages)
        }
    }

    fn grpo_loss(
        &self,
        config: &GrpoConfig,
        sequences: usize,
        tokens: usize,
        offsets: &CudaBuffer<u32>,
        weights: &CudaBuffer<f32>,
        advantages: &CudaBuffer<f32>,
        new: &CudaBuffer<f32>,
        old: &CudaBuffer<f32>,
        reference: Option<&CudaBuffer<f32>>,
        dlogprob: &mut CudaBuffer<f32>,
        stats: &mut CudaBuffer<SequenceStats>,
    ) -> Result<()> {
        let inputs = [
            offsets.len(),
            weights.len(),
            advantages.len(),
            new.len(),
            old.len(),
        ];
        let outputs = [dlogprob.len(), stats.len()];
        let with = reference.map(|r| r.len());
        check_grpo_loss(config, sequences, tokens, inputs, with, outputs)?;
        let mut turn = self.turn(
            "grpo_loss",
            &[
                offsets, weights, advantages, new, old, &reference, dlogprob, stats,
            ],
        )?;
        let scratch = turn.scratch(Kernels::GRPO_LOSS_SCRATCH)?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.grpo_loss(
                turn.stream,
                config,
                sequences,
                tokens,
                offsets.address(),
                weights.address(),
                advantages.address(),
                new.address(),
                old.address(),
                reference.map_or(0, |r| r.address()),
                dlogprob.address(),
                stats.address(),
                scratch,
                turn.fault("offsets"),
            )
        }
    }
}
