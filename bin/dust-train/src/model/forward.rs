//! The forward pass: one function for training and for rollout, so that both give the same bits.

use super::workspace::{LayerActivations, Workspace};
use super::{Activation, Batch, Model};
use anyhow::{Result, ensure};
use dust_kernels::{
    Backend,
    attention::{PagedBatch, Segment},
    gemm::LinearShape,
    logprob::HeadShape,
    norm::NormShape,
};

/// The keys and the values of one layer in the cache.
pub type LayerCache<B> = (Activation<B>, Activation<B>);

/// The paged sequences of a rollout step, and the cache they lie in.
pub struct Paged<'a, B: Backend> {
    /// The sequences.
    pub batch: PagedBatch<'a, B>,
    /// Cache slot of each row.
    pub slots: &'a B::Buf<u32>,
    /// Keys and values of every layer.
    pub cache: &'a mut [LayerCache<B>],
}

/// What the rows of a pass attend to.
pub enum Attend<'a, B: Backend> {
    /// Each other, in packed sequences.
    Packed(&'a [Segment]),
    /// A paged cache, which the pass also extends.
    Paged(Paged<'a, B>),
}

impl<B: Backend> Model<B> {
    /// Runs the rows of `batch`: the last norm's output is then in [`Workspace::hidden`].
    ///
    /// # Errors
    /// More rows than the workspace has room for, a position that is too large, a token outside of
    /// the vocabulary.
    pub fn forward(&self, device: &B, ws: &mut Workspace<B>, batch: &Batch) -> Result<()> {
        self.set_rows(device, ws, &batch.tokens, &batch.positions)?;
        let attend = &mut Attend::Packed(&batch.segments);
        self.run(device, ws, batch.rows(), attend)
    }

    /// Puts the rows of the next [`Model::run`] into the workspace.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn set_rows(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        tokens: &[u32],
        positions: &[u32],
    ) -> Result<()> {
        ws.check_rows(tokens.len())?;
        if let Some(&p) = positions.iter().max() {
            ensure!(
                (p as usize) < self.max_positions(),
                "a sequence of {} tokens is longer than the model's {} positions",
                p + 1,
                self.max_positions()
            );
        }
        device.write(&mut ws.tokens, 0, tokens)?;
        device.write(&mut ws.positions, 0, positions)?;
        Ok(())
    }

    /// Runs the first `rows` rows that were set, attending as `attend` says. Reads and writes device
    /// memory alone, so that a paged pass can be recorded.
    ///
    /// # Errors
    /// More rows than the workspace has room for; what the device reports.
    pub fn run(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        rows: usize,
        attend: &mut Attend<'_, B>,
    ) -> Result<()> {
        ws.check_rows(rows)?;
        let hidden = self.config.hidden;
        let shape = NormShape {
            rows,
            width: hidden,
        };
        let eps = self.config.rms_eps as f32;

        let first = ws.residual_index(0);
        device.embed(
            rows,
            hidden,
            &ws.tokens,
            self.params.embed.weight(),
            &mut ws.residual[first],
        )?;
        for (index, layer) in self.params.layers.iter().enumerate() {
            let slot = index % ws.layers.len();
            let input = ws.residual_index(index);
            if index == 0 {
                let acts = &mut ws.layers[slot];
                device.rms_norm(
                    shape,
                    eps,
                    &ws.residual[input],
                    layer.attn_norm.vector()?,
                    &mut acts.attn_normed,
                    &mut acts.attn_rstd,
                )?;
            }
            self.layer(device, ws, rows, index, attend)?;
            // The feed-forward branch joins the stream together with the norm of what comes next.
            let output = ws.residual_index(index + 1);
            let [next] = ws.residual.get_disjoint_mut([output])?;
            let next_slot = (index + 1) % ws.layers.len();
            let (weight, mid) = match self.params.layers.get(index + 1) {
                Some(next_layer) => (next_layer.attn_norm.vector()?, slot),
                None => (self.params.norm.vector()?, slot),
            };
            if index + 1 == self.config.layers {
                device.add_rms_norm(
                    shape,
                    eps,
                    &ws.layers[mid].mid,
                    &ws.branch,
                    weight,
                    next,
                    &mut ws.final_normed,
                    &mut ws.final_rstd,
                )?;
            } else if next_slot == slot {
                let LayerActivations {
                    mid,
                    attn_normed,
                    attn_rstd,
                    ..
                } = &mut ws.layers[slot];
                device.add_rms_norm(
                    shape,
                    eps,
                    mid,
                    &ws.branch,
                    weight,
                    next,
                    attn_normed,
                    attn_rstd,
                )?;
            } else {
                let [now, following] = ws.layers.get_disjoint_mut([slot, next_slot])?;
                device.add_rms_norm(
                    shape,
                    eps,
                    &now.mid,
                    &ws.branch,
                    weight,
                    next,
                    &mut following.attn_normed,
                    &mut following.attn_rstd,
                )?;
            }
        }
        Ok(())
    }

    /// One layer from its normed input: fills its activations, leaves the feed-forward branch in
    /// `ws.branch`.
    pub(super) fn layer(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        rows: usize,
        index: usize,
        attend: &mut Attend<'_, B>,
    ) -> Result<()> {
        let layer = &self.params.layers[index];
        let (config, heads) = (&self.config, self.heads());
        let eps = config.rms_eps as f32;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let shape = |inputs, outputs| LinearShape {
            rows,
            inputs,
            outputs,
        };
        let slot = index % ws.layers.len();
        let input = ws.residual_index(index);
        let acts = &mut ws.layers[slot];

        let qkv_bias = layer.qkv_bias.as_ref().map(|b| b.vector()).transpose()?;
        let qkv_shape = shape(config.hidden, heads.qkv_width());
        let qkv_out = match &mut acts.qkv_raw {
            Some((raw, _)) => raw,
            None => &mut acts.qkv,
        };
        device.linear(
            qkv_shape,
            &acts.attn_normed,
            layer.qkv.weight(),
            qkv_bias,
            qkv_out,
        )?;
        if let (Some((raw, rstd)), Some((q, k))) = (&mut acts.qkv_raw, &layer.qk_norm) {
            device.qk_norm(
                rows,
                heads,
                eps,
                raw,
                q.vector()?,
                k.vector()?,
                &mut acts.qkv,
                rstd,
            )?;
        }
        device.rope(
            rows,
            heads,
            &ws.positions,
            &self.cos,
            &self.sin,
            false,
            &mut acts.qkv,
        )?;
        match attend {
            Attend::Packed(segments) => device.attention(
                rows,
                heads,
                scale,
                segments,
                &acts.qkv,
                &mut acts.attn,
                &mut acts.lse,
            )?,
            Attend::Paged(paged) => {
                let (k, v) = &mut paged.cache[index];
                device.cache_write(rows, heads, &acts.qkv, paged.slots, k, v)?;
                device.attention_paged(
                    heads,
                    scale,
                    paged.batch,
                    &acts.qkv,
                    k,
                    v,
                    &mut acts.attn,
                )?;
            }
        }
        device.linear(
            shape(heads.out_width(), config.hidden),
            &acts.attn,
            layer.out.weight(),
            None,
            &mut ws.branch,
        )?;
        device.add_rms_norm(
            NormShape {
                rows,
                width: config.hidden,
            },
            eps,
            &ws.residual[input],
            &ws.branch,
            layer.mlp_norm.vector()?,
            &mut acts.mid,
            &mut acts.mlp_normed,
            &mut acts.mlp_rstd,
        )?;
        device.linear(
            shape(config.hidden, 2 * config.intermediate),
            &acts.mlp_normed,
            layer.gate_up.weight(),
            None,
            &mut acts.gate_up,
        )?;
        device.swiglu(
            rows,
            config.intermediate,
            &acts.gate_up,
            &mut acts.activated,
        )?;
        device.linear(
            shape(config.intermediate, config.hidden),
            &acts.activated,
            layer.down.weight(),
            None,
            &mut ws.branch,
        )?;
        Ok(())
    }

    /// Scores the targets of `batch` after [`Model::forward`]: fills `ws.head`.
    ///
    /// # Errors
    /// A target outside of the vocabulary; a temperature that is not positive.
    pub fn logprobs(
        &self,
        device: &B,
        ws: &mut Workspace<B>,
        batch: &Batch,
        temperature: f32,
    ) -> Result<()> {
        let targets = batch.targets.len();
        ws.reserve_targets(device, &self.config, targets)?;
        let head = &mut ws.head;
        head.temperature = temperature;
        device.write(&mut head.rows, 0, &batch.target_rows)?;
        device.write(&mut head.targets, 0, &batch.targets)?;
        device.gather_rows(
            targets,
            self.config.hidden,
            &head.rows,
            &ws.final_normed,
            &mut head.x,
        )?;
        device.logprob(
            self.head_shape(targets),
            temperature,
            &head.x,
            self.head(),
            &head.targets,
            &mut head.logprob,
            &mut head.lse,
            &mut head.entropy,
        )?;
        Ok(())
    }

    pub(crate) fn head_shape(&self, rows: usize) -> HeadShape {
        HeadShape {
            rows,
            hidden: self.config.hidden,
            vocab: self.config.vocab_size,
        }
    }
}
