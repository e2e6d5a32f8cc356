//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with f32 master weights and moments, and the
//! global gradient norm, all on the device.

use crate::{Device, Result};
use half::bf16;

/// One step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// This step's number, from 1 on, for the bias correction.
    pub step: u32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig {
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 1,
        }
    }
}

/// The optimizer.
pub trait AdamW: Device {
    /// One step over `len` parameters: with `g = scale[0] * grad`,
    /// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    /// `p -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * p)`; then `copy = bf16(p)`
    /// rounded to nearest even, where a copy is given.
    ///
    /// # Errors
    /// Short buffers, `step` 0.
    fn adamw(
        &self,
        config: &AdamWConfig,
        len: usize,
        scale: &Self::Buf<f32>,
        grad: &Self::Buf<f32>,
        param: &mut Self::Buf<f32>,
        m: &mut Self::Buf<f32>,
        v: &mut Self::Buf<f32>,
        copy: Option<&mut Self::Buf<bf16>>,
    ) -> Result<()>;

    /// `out[index] = sum of x[..len]^2`, in a fixed order.
    ///
    /// # Errors
    /// Short buffers.
    fn sum_of_squares(
        &self,
        len: usize,
        x: &Self::Buf<f32>,
        out: &mut Self::Buf<f32>,
        index: usize,
    ) -> Result<()>;

    /// From the sums of squares of all gradients: `norm[0]` is the global norm, `scale[0]` is
    /// `min(1, max_norm / norm)`; a norm that is not finite gives scale 0, so that the step changes
    /// no moment by it.
    ///
    /// # Errors
    /// Short buffers, a `max_norm` that is not positive.
    fn clip_scale(
        &self,
        sums: usize,
        max_norm: f32,
        squares: &Self::Buf<f32>,
        norm: &mut Self::Buf<f32>,
        scale: &mut Self::Buf<f32>,
    ) -> Result<()>;
}
