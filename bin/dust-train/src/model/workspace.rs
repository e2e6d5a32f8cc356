//! Memory for one forward and backward pass, allocated once and used for every batch.

use super::Activation;
use crate::checkpoint::ModelConfig;
use anyhow::Result;
use dust_kernels::{Backend, Buffer, attention::Heads};

/// What one layer's backward pass needs from its forward pass.
pub(super) struct LayerActivations<B: Backend> {
    pub attn_normed: B::Buf<B::Elem>,
    pub attn_rstd: B::Buf<f32>,
    /// Before the norm of query and key heads (Qwen3), and that norm's statistics.
    pub qkv_raw: Option<(Activation<B>, B::Buf<f32>)>,
    pub qkv: B::Buf<B::Elem>,
    pub attn: B::Buf<B::Elem>,
    pub lse: B::Buf<f32>,
    pub mid: B::Buf<B::Elem>,
    pub mlp_normed: B::Buf<B::Elem>,
    pub mlp_rstd: B::Buf<f32>,
    pub gate_up: B::Buf<B::Elem>,
    pub activated: B::Buf<B::Elem>,
}

impl<B: Backend> LayerActivations<B> {
    fn new(device: &B, config: &ModelConfig, rows: usize) -> Result<Self> {
        let heads = heads(config);
        let qkv = rows * heads.qkv_width();
        Ok(Self {
            attn_normed: device.zeros(rows * config.hidden)?,
            attn_rstd: device.zeros(rows)?,
            qkv_raw: if config.qk_norm {
                let stats = rows * (config.heads + config.kv_heads);
                Some((device.zeros(qkv)?, device.zeros(stats)?))
            } else {
                None
            },
            qkv: device.zeros(qkv)?,
            attn: device.zeros(rows * heads.out_width())?,
            lse: device.zeros(rows * config.heads)?,
            mid: device.zeros(rows * config.hidden)?,
            mlp_normed: device.zeros(rows * config.hidden)?,
            mlp_rstd: device.zeros(rows)?,
            gate_up: device.zeros(rows * 2 * config.intermediate)?,
            activated: device.zeros(rows * config.intermediate)?,
        })
    }
}

/// The backward pass's own buffers.
pub(super) struct Gradients<B: Backend> {
    pub residual: B::Buf<B::Elem>,
    pub hidden: B::Buf<B::Elem>,
    pub attn: B::Buf<B::Elem>,
    pub delta: B::Buf<f32>,
    pub qkv: B::Buf<B::Elem>,
    pub gate_up: B::Buf<B::Elem>,
    pub activated: B::Buf<B::Elem>,
}

/// Results of the head for a list of targets.
pub struct LogprobBuffers<B: Backend> {
    /// Hidden states, one a target.
    pub(super) x: B::Buf<B::Elem>,
    pub(super) dx: B::Buf<B::Elem>,
    pub(super) rows: B::Buf<u32>,
    pub(super) targets: B::Buf<u32>,
    /// Log-probability of each target.
    pub logprob: B::Buf<f32>,
    /// Log-sum-exp of each target's logits.
    pub lse: B::Buf<f32>,
    /// Entropy of each target's distribution, nats.
    pub entropy: B::Buf<f32>,
    /// For the loss to write: its derivative with respect to each log-probability.
    pub dlogprob: B::Buf<f32>,
    pub(super) temperature: f32,
    capacity: usize,
}

impl<B: Backend> LogprobBuffers<B> {
    fn new(device: &B, config: &ModelConfig, targets: usize) -> Result<Self> {
        Ok(Self {
            x: device.zeros(targets * config.hidden)?,
            dx: device.zeros(targets * config.hidden)?,
            rows: device.zeros(targets)?,
            targets: device.zeros(targets)?,
            logprob: device.zeros(targets)?,
            lse: device.zeros(targets)?,
            entropy: device.zeros(targets)?,
            dlogprob: device.zeros(targets)?,
            temperature: 1.0,
            capacity: targets,
        })
    }
}

/// All buffers of a pass over at most [`Workspace::rows`] rows.
pub struct Workspace<B: Backend> {
    rows: usize,
    pub(super) tokens: B::Buf<u32>,
    pub(super) positions: B::Buf<u32>,
    /// The residual stream at each layer's input, and at the end: what recomputation starts from.
    pub(super) residual: Vec<B::Buf<B::Elem>>,
    /// One per layer, or one for all: each layer's is then computed again in the backward pass.
    pub(super) layers: Vec<LayerActivations<B>>,
    pub(super) branch: B::Buf<B::Elem>,
    pub(super) final_normed: B::Buf<B::Elem>,
    pub(super) final_rstd: B::Buf<f32>,
    pub(super) gradients: Option<Gradients<B>>,
    /// The head's buffers, made by [`Workspace::reserve_targets`].
    pub head: LogprobBuffers<B>,
}

/// What a workspace is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Forward only: one layer's activations, overwritten by the next.
    Forward,
    /// Forward and backward; with `recompute` one layer's activations are kept instead of all.
    Train {
        /// Trade a second forward pass for the memory of the layers' activations.
        recompute: bool,
    },
}

impl<B: Backend> Workspace<B> {
    /// Buffers for at most `rows` rows.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &B, config: &ModelConfig, rows: usize, purpose: Purpose) -> Result<Self> {
        let train = purpose != Purpose::Forward;
        let keep_all = purpose == Purpose::Train { recompute: false };
        let width = rows * config.hidden;
        let heads = heads(config);
        let residuals = if train { config.layers + 1 } else { 2 };
        let kept = if keep_all { config.layers } else { 1 };
        Ok(Self {
            rows,
            tokens: device.zeros(rows)?,
            positions: device.zeros(rows)?,
            residual: (0..residuals)
                .map(|_| Ok(device.zeros(width)?))
                .collect::<Result<_>>()?,
            layers: (0..kept)
                .map(|_| LayerActivations::new(device, config, rows))
                .collect::<Result<_>>()?,
            branch: device.zeros(width)?,
            final_normed: device.zeros(width)?,
            final_rstd: device.zeros(rows)?,
            gradients: if train {
                Some(Gradients {
                    residual: device.zeros(width)?,
                    hidden: device.zeros(width)?,
                    attn: device.zeros(rows * heads.out_width())?,
                    delta: device.zeros(rows * config.heads)?,
                    qkv: device.zeros(rows * heads.qkv_width())?,
                    gate_up: device.zeros(rows * 2 * config.intermediate)?,
                    activated: device.zeros(rows * config.intermediate)?,
                })
            } else {
                None
            },
            head: LogprobBuffers::new(device, config, 0)?,
        })
    }

    /// The most rows that a batch may have.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The last norm's output, `[rows, hidden]`, after a forward pass.
    pub fn hidden(&self) -> &B::Buf<B::Elem> {
        &self.final_normed
    }

    /// Makes room for `targets` targets.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reserve_targets(
        &mut self,
        device: &B,
        config: &ModelConfig,
        targets: usize,
    ) -> Result<()> {
        if self.head.capacity < targets {
            self.head = LogprobBuffers::new(device, config, targets.next_power_of_two())?;
        }
        Ok(())
    }

    /// Where layer `index`'s input lies: all are kept in training, two take turns otherwise.
    pub(super) fn residual_index(&self, index: usize) -> usize {
        if self.gradients.is_some() {
            index
        } else {
            index % 2
        }
    }

    /// Whether the layers' activations have to be computed again in the backward pass.
    pub(super) fn recomputes(&self) -> bool {
        self.layers.len() == 1 && self.residual.len() > 2
    }

    /// Refuses a batch that has more rows than there is room for.
    pub(super) fn check_rows(&self, rows: usize) -> Result<()> {
        anyhow::ensure!(
            rows <= self.rows && self.tokens.len() >= rows,
            "the batch has {rows} rows, the workspace room for {}",
            self.rows
        );
        Ok(())
    }
}

fn heads(config: &ModelConfig) -> Heads {
    Heads {
        q_heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
    }
}
