//! Weights of a Hugging Face folder: one `model.safetensors`, or shards listed in
//! `model.safetensors.index.json`.
//!
//! Read with positioned reads; the header is checked against the file's length before any tensor
//! is allocated.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};
use half::f16;
use serde::Deserialize;

use super::error::Error;

/// The format's own limit on a header.
const MAX_HEADER: u64 = 100_000_000;

const DAMAGED: &str = "the file is damaged or cut short: fetch it again";

/// The tensors of a folder, over all its shards.
#[derive(Debug)]
pub struct Safetensors {
    shards: Vec<Shard>,
    /// Tensor name to index in `shards`.
    index: BTreeMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
}

/// Reads which shard holds each tensor.
///
/// Shards must be plain file names: one with a path in it could name any file of the user.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_str(&super::read_text(path)?)
        .map_err(|e| Error::invalid(path, "weight_map", e.to_string(), "fetch the file again"))?;
    for (name, file) in &weight_map {
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(Error::invalid(
                path,
                name,
                format!("`{file}` is not a plain file name"),
                "list only files of the same folder",
            ));
        }
    }
    Ok(weight_map)
}

impl Safetensors {
    /// Opens the weights of a folder and checks all headers.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let index_path = folder.join(super::INDEX_FILE);
        if !index_path.exists() {
            let shard = Shard::open(folder.join(super::WEIGHTS_FILE))?;
            let index = shard
                .metadata
                .offset_keys()
                .into_iter()
                .map(|name| (name, 0))
                .collect();
            return Ok(Self {
                shards: vec![shard],
                index,
            });
        }

        let mut shards: Vec<Shard> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        let mut index = BTreeMap::new();
        for (name, file) in read_index(&index_path)? {
            let place = match places.get(&file) {
                Some(&place) => place,
                None => {
                    shards.push(Shard::open(folder.join(&file))?);
                    places.insert(file.clone(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            if shards[place].metadata.info(&name).is_none() {
                return Err(Error::invalid(
                    &shards[place].path,
                    &name,
                    format!(
                        "the tensor is missing although {} lists it",
                        super::INDEX_FILE
                    ),
                    "fetch the folder again",
                ));
            }
            index.insert(name, place);
        }
        Ok(Self { shards, index })
    }

    /// All tensor names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The file and the shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(&Path, &[usize])> {
        let (shard, info) = self.find(name)?;
        Some((&shard.path, &info.shape))
    }

    fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let shard = &self.shards[*self.index.get(name)?];
        Some((shard, shard.metadata.info(name)?))
    }

    /// Reads a tensor as f32. `None` if there is no such tensor.
    pub fn read(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        let Some((shard, info)) = self.find(name) else {
            return Ok(None);
        };
        let (start, end) = info.data_offsets;
        let mut raw = vec![0; end - start];
        shard
            .file
            .read_exact_at(&mut raw, shard.data_start + start as u64)
            .map_err(|e| {
                let problem = format!("cannot read the tensor: {e}");
                Error::invalid(&shard.path, name, problem, DAMAGED)
            })?;
        let (pairs, _) = raw.as_chunks::<2>();
        Ok(Some(match info.dtype {
            Dtype::F32 => raw
                .as_chunks()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect(),
            Dtype::F16 => pairs
                .iter()
                .map(|&b| f16::from_le_bytes(b).to_f32())
                .collect(),
            Dtype::BF16 => pairs
                .iter()
                .map(|&[a, b]| f32::from_le_bytes([0, 0, a, b]))
                .collect(),
            other => {
                return Err(Error::invalid(
                    &shard.path,
                    name,
                    format!("element type {other:?} is not supported"),
                    "convert the weights to F32, F16 or BF16",
                ));
            }
        }))
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(|e| Error::io(&path, "open", e))?;
        let len = file
            .metadata()
            .map_err(|e| Error::io(&path, "inspect", e))?
            .len();
        let header_error = |problem: String| Error::invalid(&path, "header", problem, DAMAGED);

        let mut size = [0; 8];
        file.read_exact_at(&mut size, 0)
            .map_err(|_| header_error(format!("the file has only {len} bytes")))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > len - 8 {
            return Err(header_error(format!(
                "{size} bytes do not fit the file of {len} bytes"
            )));
        }
        // At most MAX_HEADER and the file's length, so this neither truncates nor overcommits.
        let mut header = vec![0; size as usize];
        file.read_exact_at(&mut header, 8)
            .map_err(|e| header_error(e.to_string()))?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| header_error(e.to_string()))?;
        let data_start = 8 + size;
        if data_start.checked_add(metadata.data_len() as u64) != Some(len) {
            return Err(header_error(format!(
                "{} bytes of tensors are listed, the file has {}",
                metadata.data_len(),
                len - data_start
            )));
        }
        Ok(Self {
            path,
            file,
            data_start,
            metadata,
        })
    }
}
