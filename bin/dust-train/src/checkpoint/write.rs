//! Writing a model as a Hugging Face folder that `transformers` loads.
//!
//! The folder appears whole or not at all: it is written under another name beside its place,
//! flushed to the disk, and renamed.

use std::borrow::Cow;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Metadata, TensorInfo};
use half::bf16;
use serde_json::{Map, Value, json};

use super::error::Error;
use super::gguf::Gguf;
use super::{INDEX_FILE, ModelConfig, WEIGHTS_FILE};
use crate::text::Tokenizer;

/// Weights above this many bytes are split into shards, as `transformers` does.
const SHARD_BYTES: usize = 5_000_000_000;

/// The text files of a model besides `config.json`.
pub(super) const TEXT_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// The element type of written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits: exact.
    F32,
    /// The upper 16 bits, rounded to nearest even.
    Bf16,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }

    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn safetensors(self) -> ::safetensors::Dtype {
        match self {
            Self::F32 => ::safetensors::Dtype::F32,
            Self::Bf16 => ::safetensors::Dtype::BF16,
        }
    }

    fn write(self, data: &[f32], out: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(1 << 16);
        for chunk in data.chunks(1 << 14) {
            bytes.clear();
            match self {
                Self::F32 => bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes())),
                Self::Bf16 => {
                    bytes.extend(chunk.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()))
                }
            }
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// Writes a model to `folder`, which appears whole or not at all. A folder that already holds a
/// model is replaced in one step; any other existing path is refused.
///
/// `tensor` delivers each tensor of [`ModelConfig::expected_tensors`] by name, one at a time;
/// `text_files` are those of [`Checkpoint::text_files`](super::Checkpoint::text_files).
pub fn save<'a>(
    folder: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    text_files: &[(String, Vec<u8>)],
    tensor: impl Fn(&str) -> Result<Cow<'a, [f32]>, Error>,
) -> Result<(), Error> {
    save_sharded(folder, config, dtype, text_files, tensor, SHARD_BYTES)
}

fn save_sharded<'a>(
    folder: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    text_files: &[(String, Vec<u8>)],
    tensor: impl Fn(&str) -> Result<Cow<'a, [f32]>, Error>,
    shard_bytes: usize,
) -> Result<(), Error> {
    let replace = folder.exists();
    if replace && !folder.join("config.json").exists() {
        let remedy = "choose another folder or remove it";
        return Err(Error::invalid(
            folder,
            "folder",
            "exists and holds no model",
            remedy,
        ));
    }
    let (parent, partial) = partial_path(folder)?;
    fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, "create", e))?;
    // What a killed process has left.
    remove_if_there(&partial)?;
    fs::create_dir(&partial).map_err(|e| Error::io(&partial, "create", e))?;

    let written = write_weights(&partial, config, dtype, tensor, shard_bytes)
        .and_then(|()| {
            for (name, bytes) in text_files {
                write_file(&partial.join(name), bytes)?;
            }
            if !text_files
                .iter()
                .any(|(name, _)| name == "generation_config.json")
            {
                write_json(
                    &partial.join("generation_config.json"),
                    &config.to_hf_generation(),
                )?;
            }
            write_json(&partial.join("config.json"), &config.to_hf(dtype.name()))?;
            sync(&partial)
        })
        .and_then(|()| {
            if replace {
                exchange(&partial, folder)
            } else {
                fs::rename(&partial, folder)
            }
            .map_err(|e| Error::io(folder, "move the finished folder to its place", e))?;
            sync(&parent)
        });
    // After an error the partial folder, after an exchange the old model.
    let removed = remove_if_there(&partial);
    written.and(removed)
}

/// The parent of `folder`, and a hidden sibling to write to.
fn partial_path(folder: &Path) -> Result<(PathBuf, PathBuf), Error> {
    let name = folder.file_name().ok_or_else(|| {
        Error::invalid(
            folder,
            "folder",
            "has no name",
            "give a path that ends in a name",
        )
    })?;
    let parent = match folder.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".partial");
    let partial = parent.join(hidden);
    Ok((parent, partial))
}

fn remove_if_there(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(folder, "remove", e)),
        _ => Ok(()),
    }
}

/// Swaps two folders in one step, so that at no moment the name is without a model.
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let a = CString::new(a.as_os_str().as_bytes())?;
    let b = CString::new(b.as_os_str().as_bytes())?;
    // SAFETY: both pointers are to NUL-terminated strings that outlive the call; the call keeps
    // neither.
    let done = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn write_weights<'a>(
    folder: &Path,
    config: &ModelConfig,
    dtype: Dtype,
    tensor: impl Fn(&str) -> Result<Cow<'a, [f32]>, Error>,
    shard_bytes: usize,
) -> Result<(), Error> {
    let bytes = |shape: &[usize]| shape.iter().product::<usize>() * dtype.size();
    let mut shards: Vec<Vec<(String, Vec<usize>)>> = Vec::new();
    let mut room = 0;
    let mut total = 0;
    for (name, shape) in config.expected_tensors() {
        let size = bytes(&shape);
        total += size;
        match shards.last_mut() {
            Some(shard) if size <= room => shard.push((name, shape)),
            _ => {
                shards.push(vec![(name, shape)]);
                room = shard_bytes;
            }
        }
        room = room.saturating_sub(size);
    }

    let count = shards.len();
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => WEIGHTS_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        for (name, _) in &shard {
            weight_map.insert(name.clone(), file.clone().into());
        }
        write_shard(&folder.join(file), shard, dtype, &tensor)?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&folder.join(INDEX_FILE), &index)?;
    }
    Ok(())
}

/// Writes one safetensors file, a tensor at a time, so that never more than one is held.
fn write_shard<'a>(
    path: &Path,
    tensors: Vec<(String, Vec<usize>)>,
    dtype: Dtype,
    tensor: &impl Fn(&str) -> Result<Cow<'a, [f32]>, Error>,
) -> Result<(), Error> {
    let failed = |e| Error::io(path, "write", e);
    let mut end = 0;
    let entries: Vec<(String, TensorInfo)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let start = end;
            end += shape.iter().product::<usize>() * dtype.size();
            let info = TensorInfo {
                dtype: dtype.safetensors(),
                shape,
                data_offsets: (start, end),
            };
            (name, info)
        })
        .collect();
    let format = [("format".to_owned(), "pt".to_owned())].into();
    let metadata = Metadata::new(Some(format), entries.clone())
        .map_err(|e| failed(io::Error::other(e.to_string())))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| failed(e.into()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = File::create_new(path).map_err(failed)?;
    let mut out = BufWriter::new(file);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for (name, info) in entries {
        let data = tensor(&name)?;
        let wanted: usize = info.shape.iter().product();
        if data.len() != wanted {
            let problem = format!("{} elements instead of {wanted}", data.len());
            let remedy = "save the weights with the description that they were made for";
            return Err(Error::invalid(path, name, problem, remedy));
        }
        dtype.write(&data, &mut out).map_err(failed)?;
    }
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)
}

fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(path, "write", e))
}

/// Makes the entries of a folder durable.
fn sync(folder: &Path) -> Result<(), Error> {
    File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io(folder, "flush", e))
}

/// The text files of a folder, unchanged.
pub(super) fn text_files_of_folder(folder: &Path) -> Result<Vec<(String, Vec<u8>)>, Error> {
    TEXT_FILES
        .iter()
        .filter(|name| folder.join(name).exists())
        .map(|name| {
            let path = folder.join(name);
            let bytes = fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
            Ok(((*name).to_owned(), bytes))
        })
        .collect()
}

/// The text files that a GGUF file's metadata stand for.
pub(super) fn text_files_of_gguf(
    gguf: &Gguf,
    config: &ModelConfig,
) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let tokenizer = Tokenizer::from_gguf(gguf, &config.eos)?;
    let mut json = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.max_positions,
    });
    for (name, key) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ] {
        let id = gguf.unsigned(&format!("tokenizer.ggml.{key}"))?;
        let token = id.and_then(|id| tokenizer.token(u32::try_from(id).ok()?));
        if let Some(token) = token {
            json[name] = token.into();
        }
    }
    if let Some(template) = gguf.string("tokenizer.chat_template")? {
        json["chat_template"] = template.into();
    }
    Ok(vec![
        (
            "tokenizer.json".to_owned(),
            tokenizer.to_json()?.into_bytes(),
        ),
        (
            "tokenizer_config.json".to_owned(),
            format!("{json:#}\n").into_bytes(),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn shards_hold_every_tensor_once_and_load_back() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/tiny.gguf");
        let model = Checkpoint::open(path.to_str().unwrap()).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("model");
        let limit = 10_000;
        let tensor = |name: &str| Ok(Cow::Owned(model.tensor(name)?.data));
        save_sharded(&folder, model.config(), Dtype::F32, &[], tensor, limit).unwrap();
        let shards = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.path().extension().is_some_and(|e| e == "safetensors"));
        // Only the embedding is larger than the limit by itself.
        let sizes: Vec<u64> = shards
            .map(|entry| entry.metadata().unwrap().len())
            .collect();
        assert!(sizes.len() > 5, "{sizes:?}");
        let large = sizes.iter().filter(|&&s| s > limit as u64 + 2000).count();
        assert_eq!(large, 1, "{sizes:?}");
        let copy = Checkpoint::open(folder.to_str().unwrap()).unwrap();
        for name in model.names() {
            assert_eq!(copy.tensor(&name).unwrap(), model.tensor(&name).unwrap());
        }
    }
}
