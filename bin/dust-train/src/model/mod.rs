//! Llama, Qwen2 and Qwen3 on any back end: loading, forward, backward, saving.

mod backward;
mod batch;
mod forward;
mod params;
mod workspace;

pub use batch::{Batch, Target};
pub use forward::{Attend, LayerCache, Paged};
pub use params::{LayerParams, Params, Spec};
pub use workspace::{LogprobBuffers, Purpose, Workspace};

use crate::checkpoint::{self, Checkpoint, Dtype, ModelConfig};
use anyhow::{Result, ensure};
use dust_kernels::{Backend, Buffer, Device, Weight, attention::Heads};
use half::bf16;
use std::any::TypeId;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// A buffer in the device's format of activations.
pub type Activation<B> = <B as Device>::Buf<<B as Device>::Elem>;

/// How matrices are stored. Norms and biases are always f32, and so is all arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[derive(clap::ValueEnum)]
pub enum Storage {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight; training keeps f32 master weights beside them.
    Bf16,
}

impl Storage {
    /// What is asked for, or what suits the device: f32 where activations are f32, else bf16.
    ///
    /// # Errors
    /// f32 on a device that reads bf16 alone.
    pub fn on<B: Backend>(wanted: Option<Self>) -> Result<Self> {
        let f32s = TypeId::of::<B::Elem>() == TypeId::of::<f32>();
        ensure!(
            f32s || wanted != Some(Storage::F32),
            "f32 matrices are for the CPU: leave the storage (model.storage, --dtype) out, or say bf16"
        );
        Ok(wanted.unwrap_or(if f32s { Storage::F32 } else { Storage::Bf16 }))
    }
}

/// A parameter on the device.
pub enum Stored<B: Backend> {
    /// As f32.
    F32(B::Buf<f32>),
    /// As bf16 only: for inference.
    Bf16(B::Buf<bf16>),
    /// The f32 master of the optimizer and the bf16 copy that the kernels read.
    Mixed(B::Buf<f32>, B::Buf<bf16>),
}

impl<B: Backend> Stored<B> {
    /// What a linear layer reads.
    pub fn weight(&self) -> Weight<'_, B> {
        match self {
            Stored::F32(b) => Weight::F32(b),
            Stored::Bf16(b) | Stored::Mixed(_, b) => Weight::Bf16(b),
        }
    }

    /// A norm or a bias, which `load` always stores as f32.
    pub(crate) fn vector(&self) -> Result<&B::Buf<f32>> {
        match self {
            Stored::F32(b) => Ok(b),
            _ => anyhow::bail!("a vector parameter is stored as bf16"),
        }
    }

    /// The most precise values at hand, on the host.
    ///
    /// # Errors
    /// Only what the device reports.
    pub fn download(&self, device: &B) -> Result<Vec<f32>> {
        let len = match self {
            Stored::F32(b) | Stored::Mixed(b, _) => b.len(),
            Stored::Bf16(b) => b.len(),
        };
        self.download_range(device, 0, len)
    }

    fn download_range(&self, device: &B, start: usize, len: usize) -> Result<Vec<f32>> {
        match self {
            Stored::F32(b) | Stored::Mixed(b, _) => {
                let mut values = vec![0.0; len];
                device.read(b, start, &mut values)?;
                Ok(values)
            }
            Stored::Bf16(b) => {
                let mut values = vec![bf16::ZERO; len];
                device.read(b, start, &mut values)?;
                Ok(values.into_iter().map(bf16::to_f32).collect())
            }
        }
    }

    fn upload(device: &B, values: &[f32], storage: Storage, train: bool) -> Result<Self> {
        if storage == Storage::F32 {
            return Ok(Stored::F32(device.upload(values)?));
        }
        let half: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        let half = device.upload(&half)?;
        Ok(if train {
            Stored::Mixed(device.upload(values)?, half)
        } else {
            Stored::Bf16(half)
        })
    }
}

/// A model on a device.
pub struct Model<B: Backend> {
    /// Its shape.
    pub config: ModelConfig,
    /// Its parameters.
    pub params: Params<Stored<B>>,
    /// Cosines of the rotation, `[max_positions, head_dim / 2]`.
    pub(crate) cos: B::Buf<f32>,
    /// Sines of the rotation.
    pub(crate) sin: B::Buf<f32>,
    positions: usize,
}

/// Longest context whose rotation table is made at loading.
const MAX_TABLE: usize = 65_536;

impl<B: Backend> Model<B> {
    /// Loads a checkpoint onto the device. `train` keeps f32 master weights where `storage` is
    /// bf16.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape than the configuration says.
    pub fn load(
        device: &B,
        checkpoint: &Checkpoint,
        storage: Storage,
        train: bool,
    ) -> Result<Self> {
        let config = checkpoint.config().clone();
        let params = Params::specs(&config).try_map(|spec| -> Result<_> {
            let mut values = Vec::with_capacity(spec.len());
            for (name, rows) in &spec.parts {
                let tensor = checkpoint.tensor(name)?;
                ensure!(
                    tensor.shape == spec.part_shape(*rows),
                    "{}: `{name}` has shape {:?}, the configuration asks for {:?}",
                    checkpoint.path().display(),
                    tensor.shape,
                    spec.part_shape(*rows)
                );
                values.extend_from_slice(&tensor.data);
            }
            let storage = if spec.matrix { storage } else { Storage::F32 };
            Stored::upload(device, &values, storage, train)
        })?;
        Self::with_params(device, config, params)
    }

    /// A model from parameters that are on the device already.
    ///
    /// # Errors
    /// Only what the device reports.
    pub fn with_params(device: &B, config: ModelConfig, params: Params<Stored<B>>) -> Result<Self> {
        let frequencies = config.rope_frequencies();
        let positions = config.max_positions.min(MAX_TABLE);
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..positions)
                .flat_map(|p| {
                    frequencies
                        .inverse
                        .iter()
                        .map(move |w| (f(p as f64 * w) * frequencies.attention_factor) as f32)
                })
                .collect()
        };
        Ok(Self {
            cos: device.upload(&table(f64::cos))?,
            sin: device.upload(&table(f64::sin))?,
            positions,
            config,
            params,
        })
    }

    /// The heads of its attention layers.
    pub fn heads(&self) -> Heads {
        Heads {
            q_heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// Longest sequence that it can run.
    pub fn max_positions(&self) -> usize {
        self.positions
    }

    /// How many parameters it has.
    pub fn parameter_count(&self) -> usize {
        Params::specs(&self.config).iter().map(Spec::len).sum()
    }

    /// The head: its own, or the embedding where tied.
    pub(crate) fn head(&self) -> Weight<'_, B> {
        self.params
            .head
            .as_ref()
            .unwrap_or(&self.params.embed)
            .weight()
    }

    /// Zeros of the shape of every parameter: gradients, moments.
    ///
    /// # Errors
    /// Out of memory.
    pub fn zeros_like(&self, device: &B) -> Result<Params<B::Buf<f32>>> {
        Params::specs(&self.config).try_map(|spec| Ok(device.zeros(spec.len())?))
    }

    /// Writes a Hugging Face folder: the weights with the checkpoint's names, and `text_files`
    /// (tokenizer, chat template) beside them.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn save(
        &self,
        device: &B,
        folder: &Path,
        dtype: Dtype,
        text_files: &[(String, Vec<u8>)],
    ) -> Result<()> {
        let mut parts = HashMap::new();
        for (spec, stored) in Params::specs(&self.config).iter().zip(self.params.iter()) {
            let mut start = 0;
            for (name, rows) in &spec.parts {
                let len = rows * spec.columns;
                parts.insert(name.clone(), (stored, start, len));
                start += len;
            }
        }
        checkpoint::save(folder, &self.config, dtype, text_files, |name| {
            let file = folder.join(name);
            let failed = |why: String| checkpoint::Error::invalid(&file, name, why, "");
            let (stored, start, len) = *parts
                .get(name)
                .ok_or_else(|| failed("the model has no such tensor".into()))?;
            let values = stored
                .download_range(device, start, len)
                .map_err(|e| failed(e.to_string()))?;
            Ok(Cow::Owned(values))
        })?;
        Ok(())
    }
}

/// Copies of parameters, for the frozen reference of the KL term: weights only.
pub fn freeze<B: Backend>(device: &B, model: &Model<B>) -> Result<Model<B>> {
    fn copy<B: Backend, T: dust_kernels::Element>(device: &B, b: &B::Buf<T>) -> Result<B::Buf<T>> {
        let mut new = device.zeros(b.len())?;
        device.copy(b, 0, &mut new, 0, b.len())?;
        Ok(new)
    }
    let params = model.params.try_map(|stored| -> Result<_> {
        Ok(match stored {
            Stored::F32(b) => Stored::F32(copy::<B, f32>(device, b)?),
            Stored::Bf16(b) | Stored::Mixed(_, b) => Stored::Bf16(copy::<B, bf16>(device, b)?),
        })
    })?;
    Model::with_params(device, model.config.clone(), params)
}
