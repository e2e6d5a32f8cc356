//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with f32 master weights and moments, and the
//! global gradient norm, all on the device.

use crate::error::check_len;
use crate::{Device, Error, Result};
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
///
/// The norm never leaves the device: [`AdamW::sum_of_squares`] for each gradient,
/// [`AdamW::clip_scale`] once, then [`AdamW::adamw`] with the scale for each parameter.
///
/// ```
/// # fn main() -> dust_kernels::Result<()> {
/// use dust_kernels::{Cpu, Device, adamw::{AdamW, AdamWConfig}};
/// let cpu = Cpu::new();
/// let grad = cpu.upload(&[3.0f32, -4.0])?;
/// let mut param = cpu.upload(&[1.0f32, 1.0])?;
/// let (mut m, mut v) = (cpu.zeros(2)?, cpu.zeros(2)?);
/// let (mut squares, mut norm, mut scale) = (cpu.zeros(1)?, cpu.zeros(1)?, cpu.zeros(1)?);
/// cpu.sum_of_squares(2, &grad, &mut squares, 0)?;
/// cpu.clip_scale(1, 1.0, &squares, &mut norm, &mut scale)?;
/// assert_eq!(cpu.download(&norm)?, [5.0]);
/// let config = AdamWConfig { learning_rate: 0.1, weight_decay: 0.0, ..Default::default() };
/// cpu.adamw(&config, 2, &scale, &grad, &mut param, &mut m, &mut v, None)?;
/// // The first step is as long as the learning rate, whatever the gradient.
/// let param = cpu.download(&param)?;
/// assert!((param[0] - 0.9).abs() < 1e-6 && (param[1] - 1.1).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub trait AdamW: Device {
    /// One step over `len` parameters: with `g = scale[0] * grad`,
    /// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    /// `p -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * p)`; then `copy = bf16(p)`
    /// rounded to nearest even, where a copy is given (NaN stays NaN).
    ///
    /// A scale of 0 skips the step: nothing is written, so that a gradient with NaN or infinity,
    /// for which [`AdamW::clip_scale`] gives 0, harms neither parameters nor moments.
    ///
    /// # Errors
    /// Short buffers, `step` 0, a beta outside of `0 <= beta < 1`.
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

    /// `out[index] = sum of x[..len]^2`, in f64 over fixed blocks, rounded to f32 once; infinite
    /// from a norm of about 1.8e19 on.
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
    /// `min(1, max_norm / norm)`; a norm that is not finite gives scale 0, which [`AdamW::adamw`]
    /// takes as an order to skip the step. An infinite `max_norm` only measures.
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

/// What [`AdamW::adamw`] asks of its arguments; the lengths in their order.
pub(crate) fn check_adamw(
    config: &AdamWConfig,
    len: usize,
    [scale, grad, param, m, v]: [usize; 5],
    copy: Option<usize>,
) -> Result<()> {
    const OP: &str = "adamw";
    check_len(OP, "scale", scale, 1)?;
    check_len(OP, "grad", grad, len)?;
    check_len(OP, "param", param, len)?;
    check_len(OP, "m", m, len)?;
    check_len(OP, "v", v, len)?;
    if let Some(copy) = copy {
        check_len(OP, "copy", copy, len)?;
    }
    config.check()
}

impl AdamWConfig {
    /// The rules of the settings themselves.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "adamw";
        if self.step == 0 {
            return Err(Error::invalid(OP, "`step` is 0, steps count from 1"));
        }
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::invalid(
                    OP,
                    format!("`{name}` is {beta}, it must be at least 0 and below 1"),
                ));
            }
        }
        Ok(())
    }

    /// `1 / (1 - beta^step)` of both moments, made in f64.
    pub(crate) fn corrections(&self) -> [f32; 2] {
        [self.beta1, self.beta2]
            .map(|beta| (1.0 / (1.0 - f64::from(beta).powf(f64::from(self.step)))) as f32)
    }
}

/// What [`AdamW::clip_scale`] asks of its arguments; the lengths in their order.
pub(crate) fn check_clip_scale(
    sums: usize,
    max_norm: f32,
    [squares, norm, scale]: [usize; 3],
) -> Result<()> {
    const OP: &str = "clip_scale";
    check_len(OP, "squares", squares, sums)?;
    check_len(OP, "norm", norm, 1)?;
    check_len(OP, "scale", scale, 1)?;
    check_max_norm(max_norm)
}

/// The rule of a largest norm.
pub(crate) fn check_max_norm(max_norm: f32) -> Result<()> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::invalid(
            "clip_scale",
            format!("`max_norm` is {max_norm}, it must be positive"),
        ));
    }
    Ok(())
}

/// The lengths that [`AdamW::sum_of_squares`] needs.
pub(crate) fn check_sum_of_squares(len: usize, x: usize, out: usize, index: usize) -> Result<()> {
    check_len("sum_of_squares", "x", x, len)?;
    check_len("sum_of_squares", "out", out, index.saturating_add(1))
}
