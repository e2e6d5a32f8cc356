//! Checkpoints of training: everything that the next step depends on, in one file.
//!
//! Master weights and moments as flat f32 arrays named `param.I`, `m.I`, `v.I` in the order of the
//! parameter tree; the step and the hash of the group file in the metadata.

use super::super::RunFolder;
use super::optimizer::Optimizer;
use crate::model::{Model, Params, Stored};
use anyhow::{Context, Result, bail, ensure};
use dust_kernels::{Backend, Buffer};
use half::bf16;
use safetensors::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;

/// The file of the last checkpoint.
pub const STATE: &str = "state.safetensors";

struct Flat {
    shape: [usize; 1],
    values: Vec<f32>,
}

impl View for Flat {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(bytemuck::cast_slice(&self.values))
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

/// Writes the state after `steps` steps, in one step.
pub(super) fn save<B: Backend>(
    device: &B,
    run: &RunFolder,
    model: &Model<B>,
    optimizer: &Optimizer<B>,
    steps: usize,
    groups: &str,
) -> Result<()> {
    let mut tensors = Vec::new();
    let mut add = |kind: &str, i: usize, values: Vec<f32>| {
        let shape = [values.len()];
        tensors.push((format!("{kind}.{i}"), Flat { shape, values }));
    };
    for (i, stored) in model.params.iter().enumerate() {
        add("param", i, stored.download(device)?);
    }
    for (kind, tree) in [("m", &optimizer.m), ("v", &optimizer.v)] {
        for (i, buffer) in tree.iter().enumerate() {
            add(kind, i, device.download(buffer)?);
        }
    }
    let metadata = HashMap::from([
        ("steps".to_owned(), steps.to_string()),
        ("updates".to_owned(), optimizer.updates.to_string()),
        ("groups_sha256".to_owned(), groups.to_owned()),
    ]);
    let path = run.file(STATE);
    let partial = run.file(&format!("{STATE}.partial"));
    safetensors::serialize_to_file(tensors, Some(metadata), &partial)
        .with_context(|| format!("{}: cannot be written", partial.display()))?;
    File::open(&partial)?.sync_all()?;
    fs::rename(&partial, &path)
        .with_context(|| format!("{}: cannot be written", path.display()))?;
    Ok(())
}

/// Removes the checkpoint, if there is one.
pub(super) fn remove(run: &RunFolder) -> Result<()> {
    let path = run.file(STATE);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("{}: cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

/// Reads the state into `model` and `optimizer`; returns the steps that it is after, 0 where there is
/// none.
pub(super) fn load<B: Backend>(
    device: &B,
    run: &RunFolder,
    model: &mut Model<B>,
    optimizer: &mut Optimizer<B>,
    groups: &str,
) -> Result<usize> {
    let path = run.file(STATE);
    if !path.exists() {
        return Ok(0);
    }
    let bytes = fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let name = path.display();
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .map_err(|e| anyhow::anyhow!("{name}: damaged: {e}; remove it to train from the start"))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let field = |key: &str| {
        metadata.get(key).with_context(|| {
            format!("{name}: {key}: missing; remove the file to train from the start")
        })
    };
    ensure!(
        field("groups_sha256")? == groups,
        "{name}: groups_sha256: the checkpoint was trained on another group file; \
         remove it to train from the start"
    );
    let steps = field("steps")?
        .parse()
        .with_context(|| format!("{name}: steps"))?;
    optimizer.updates = field("updates")?
        .parse()
        .with_context(|| format!("{name}: updates"))?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{name}: damaged"))?;
    let values = |kind: &str, i: usize, len: usize| -> Result<Vec<f32>> {
        let tensor = tensors
            .tensor(&format!("{kind}.{i}"))
            .with_context(|| format!("{name}: {kind}.{i}"))?;
        ensure!(
            tensor.dtype() == Dtype::F32 && tensor.shape() == [len],
            "{name}: {kind}.{i}: has shape {:?}, the model needs [{len}]",
            tensor.shape()
        );
        // The file does not align its data, so no cast.
        let bytes = tensor.data().as_chunks::<4>().0;
        Ok(bytes.iter().map(|&b| f32::from_le_bytes(b)).collect())
    };
    for (i, stored) in model.params.iter_mut().enumerate() {
        match stored {
            Stored::F32(master) => device.write(master, 0, &values("param", i, master.len())?)?,
            Stored::Mixed(master, copy) => {
                let values = values("param", i, master.len())?;
                let half: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                device.write(master, 0, &values)?;
                device.write(copy, 0, &half)?;
            }
            Stored::Bf16(_) => bail!("the model was loaded without master weights"),
        }
    }
    let moments = |kind: &str, tree: &mut Params<B::Buf<f32>>| -> Result<()> {
        for (i, buffer) in tree.iter_mut().enumerate() {
            device.write(buffer, 0, &values(kind, i, buffer.len())?)?;
        }
        Ok(())
    };
    moments("m", &mut optimizer.m)?;
    moments("v", &mut optimizer.v)?;
    Ok(steps)
}
