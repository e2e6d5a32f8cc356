//! AdamW over the parameter tree, with a global gradient norm, all on the device.

use crate::model::{Model, Params, Spec, Stored};
use anyhow::{Result, bail};
use dust_kernels::{Backend, adamw::AdamWConfig};

/// Gradients and moments of every parameter.
pub struct Optimizer<B: Backend> {
    /// Gradients; the backward pass adds to them, a step sets them to 0 again.
    pub grads: Params<B::Buf<f32>>,
    /// First moments.
    pub m: Params<B::Buf<f32>>,
    /// Second moments.
    pub v: Params<B::Buf<f32>>,
    /// Updates so far.
    pub updates: u32,
    specs: Params<Spec>,
    squares: B::Buf<f32>,
    norm: B::Buf<f32>,
    scale: B::Buf<f32>,
}

impl<B: Backend> Optimizer<B> {
    /// Zeros.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &B, model: &Model<B>) -> Result<Self> {
        let specs = Params::specs(&model.config);
        Ok(Self {
            grads: model.zeros_like(device)?,
            m: model.zeros_like(device)?,
            v: model.zeros_like(device)?,
            updates: 0,
            squares: device.zeros(specs.iter().count())?,
            specs,
            norm: device.zeros(1)?,
            scale: device.zeros(1)?,
        })
    }

    /// Forgets the updates so far.
    ///
    /// # Errors
    /// What the device reports.
    pub fn reset(&mut self, device: &B) -> Result<()> {
        self.updates = 0;
        for moment in self.m.iter_mut().chain(self.v.iter_mut()) {
            device.fill_zero(moment)?;
        }
        Ok(())
    }

    /// One update with the gradients clipped to a global norm of `max_norm`; returns the norm before
    /// clipping. `config.step` is set here, and `config.weight_decay` applies to matrices only. A norm
    /// that is not finite leaves everything as it was.
    ///
    /// # Errors
    /// A model that was loaded without master weights.
    pub fn step(
        &mut self,
        device: &B,
        model: &mut Model<B>,
        config: AdamWConfig,
        max_norm: f32,
    ) -> Result<f32> {
        let mut count = 0;
        for (i, (spec, grad)) in self.specs.iter().zip(self.grads.iter()).enumerate() {
            device.sum_of_squares(spec.len(), grad, &mut self.squares, i)?;
            count += 1;
        }
        device.clip_scale(
            count,
            max_norm,
            &self.squares,
            &mut self.norm,
            &mut self.scale,
        )?;
        self.updates += 1;
        let trees = self
            .specs
            .iter()
            .zip(model.params.iter_mut())
            .zip(self.grads.iter_mut())
            .zip(self.m.iter_mut().zip(self.v.iter_mut()));
        for (((spec, stored), grad), (m, v)) in trees {
            let config = AdamWConfig {
                step: self.updates,
                weight_decay: if spec.matrix {
                    config.weight_decay
                } else {
                    0.0
                },
                ..config
            };
            let (master, copy) = match stored {
                Stored::F32(master) => (master, None),
                Stored::Mixed(master, copy) => (master, Some(copy)),
                Stored::Bf16(_) => bail!("the model was loaded without master weights"),
            };
            device.adamw(&config, spec.len(), &self.scale, grad, master, m, v, copy)?;
            device.fill_zero(grad)?;
        }
        let mut norm = [0.0];
        device.read(&self.norm, 0, &mut norm)?;
        if !norm[0].is_finite() {
            self.updates -= 1;
        }
        Ok(norm[0])
    }
}
