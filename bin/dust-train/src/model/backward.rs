//! The backward pass, written by hand, layer by layer from the top.

use super::workspace::{LayerActivations, Workspace};
use super::{Attend, Batch, LayerParams, Model, Params};
use anyhow::{Context, Result};
use dust_kernels::{Backend, attention::Segment, gemm::LinearShape, norm::NormShape};

impl<B: Backend> Model<B> {
    /// Adds to `grads` the gradient of a loss whose derivative with respect to each target's
    /// log-probability is in `ws.head.dlogprob`, after [`Model::forward`] and [`Model::logprobs`]
    /// of the same batch.
    ///
    /// # Errors
    /// A workspace that was made for the forward pass only.
    pub fn backward(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        batch: &Batch,
        grads: &mut Params<B::Buf<f32>>,
    ) -> Result<()> {
        let (rows, targets) = (batch.rows(), batch.targets.len());
        let hidden = self.config.hidden;
        let shape = NormShape {
            rows,
            width: hidden,
        };
        let head = &mut ws.head;
        device.logprob_backward(
            self.head_shape(targets),
            head.temperature,
            &head.x,
            self.head(),
            &head.targets,
            &head.lse,
            &head.dlogprob,
            &mut head.dx,
            Some(grads.head.as_mut().unwrap_or(&mut grads.embed)),
        )?;

        let g = ws
            .gradients
            .as_mut()
            .context("this workspace is for the forward pass only")?;
        device.fill_zero(&mut g.hidden)?;
        device.scatter_add_rows(targets, hidden, &head.rows, &head.dx, &mut g.hidden)?;
        device.fill_zero(&mut g.residual)?;
        device.rms_norm_backward(
            shape,
            &g.hidden,
            &ws.residual[self.config.layers],
            self.params.norm.vector()?,
            &ws.final_rstd,
            &mut g.residual,
            &mut grads.norm,
        )?;
        for index in (0..self.config.layers).rev() {
            if ws.recomputes() {
                self.recompute_layer(device, ws, rows, index, &batch.segments)?;
            }
            self.layer_backward(
                device,
                ws,
                rows,
                index,
                &batch.segments,
                &mut grads.layers[index],
            )?;
        }
        let g = ws
            .gradients
            .as_ref()
            .context("this workspace is for the forward pass only")?;
        device.embed_backward(rows, hidden, &ws.tokens, &g.residual, &mut grads.embed)?;
        Ok(())
    }

    /// Fills the shared activations with those of layer `index`, from its saved input.
    fn recompute_layer(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        rows: usize,
        index: usize,
        segments: &[Segment],
    ) -> Result<()> {
        let acts = &mut ws.layers[0];
        device.rms_norm(
            NormShape {
                rows,
                width: self.config.hidden,
            },
            self.config.rms_eps as f32,
            &ws.residual[index],
            self.params.layers[index].attn_norm.vector()?,
            &mut acts.attn_normed,
            &mut acts.attn_rstd,
        )?;
        self.layer(device, ws, rows, index, &mut Attend::Packed(segments))
    }

    fn layer_backward(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        rows: usize,
        index: usize,
        segments: &[Segment],
        grads: &mut LayerParams<B::Buf<f32>>,
    ) -> Result<()> {
        let layer = &self.params.layers[index];
        let (config, heads) = (&self.config, self.heads());
        let shape = |inputs, outputs| LinearShape {
            rows,
            inputs,
            outputs,
        };
        let norm_shape = NormShape {
            rows,
            width: config.hidden,
        };
        let slot = index % ws.layers.len();
        let LayerActivations {
            attn_normed,
            attn_rstd,
            qkv_raw,
            qkv,
            attn,
            lse,
            mid,
            mlp_normed,
            mlp_rstd,
            gate_up,
            activated,
        } = &ws.layers[slot];
        let g = ws
            .gradients
            .as_mut()
            .context("this workspace is for the forward pass only")?;

        // Feed-forward branch: the stream's gradient goes through it and around it.
        let down = shape(config.intermediate, config.hidden);
        device.linear_dw(down, activated, &g.residual, &mut grads.down)?;
        device.linear_dx(down, &g.residual, layer.down.weight(), &mut g.activated)?;
        device.swiglu_backward(
            rows,
            config.intermediate,
            gate_up,
            &g.activated,
            &mut g.gate_up,
        )?;
        let up = shape(config.hidden, 2 * config.intermediate);
        device.linear_dw(up, mlp_normed, &g.gate_up, &mut grads.gate_up)?;
        device.linear_dx(up, &g.gate_up, layer.gate_up.weight(), &mut g.hidden)?;
        device.rms_norm_backward(
            norm_shape,
            &g.hidden,
            mid,
            layer.mlp_norm.vector()?,
            mlp_rstd,
            &mut g.residual,
            &mut grads.mlp_norm,
        )?;

        // Attention branch.
        let out = shape(heads.out_width(), config.hidden);
        device.linear_dw(out, attn, &g.residual, &mut grads.out)?;
        device.linear_dx(out, &g.residual, layer.out.weight(), &mut g.attn)?;
        device.attention_backward(
            rows,
            heads,
            1.0 / (config.head_dim as f32).sqrt(),
            segments,
            qkv,
            attn,
            lse,
            &g.attn,
            &mut g.delta,
            &mut g.qkv,
        )?;
        device.rope(
            rows,
            heads,
            &ws.positions,
            &self.cos,
            &self.sin,
            true,
            &mut g.qkv,
        )?;
        if let (Some((raw, rstd)), Some((q, k)), Some((dq, dk))) =
            (qkv_raw, &layer.qk_norm, &mut grads.qk_norm)
        {
            device.qk_norm_backward(
                rows,
                heads,
                raw,
                q.vector()?,
                k.vector()?,
                rstd,
                &mut g.qkv,
                dq,
                dk,
            )?;
        }
        let qkv_shape = shape(config.hidden, heads.qkv_width());
        if let Some(dbias) = &mut grads.qkv_bias {
            device.linear_dbias(qkv_shape, &g.qkv, dbias)?;
        }
        device.linear_dw(qkv_shape, attn_normed, &g.qkv, &mut grads.qkv)?;
        device.linear_dx(qkv_shape, &g.qkv, layer.qkv.weight(), &mut g.hidden)?;
        device.rms_norm_backward(
            norm_shape,
            &g.hidden,
            &ws.residual[index],
            layer.attn_norm.vector()?,
            attn_rstd,
            &mut g.residual,
            &mut grads.attn_norm,
        )?;
        Ok(())
    }
}
