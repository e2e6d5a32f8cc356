//! Model checkpoints: Hugging Face folders, GGUF files and hub repositories behind one type that
//! delivers every tensor as f32 under its Hugging Face name and layout.
//!
//! Nothing here trusts a file: sizes are compared with the file's length before memory is taken,
//! shapes with the model's description, and every error is one line.

mod config;
mod error;
mod gguf;
mod hub;
mod safetensors;
mod write;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::text::{ChatTemplate, Tokenizer};
use safetensors::Safetensors;

pub use config::{Architecture, ModelConfig, RopeFrequencies, RopeScaling};
pub use error::Error;
pub use gguf::quant::GgmlType;
pub use gguf::{Gguf, TensorInfo, Value};
pub use write::{Dtype, save};

const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A tensor in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `shape.product()` elements.
    pub data: Vec<f32>,
}

/// An open checkpoint, checked against its own description: every tensor that the architecture
/// needs is there with the right shape, and none besides.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Folder(Safetensors),
    Gguf(Gguf),
}

impl Checkpoint {
    /// Opens a Hugging Face folder, a `.gguf` file, or, when no such path exists, the hub
    /// repository `Owner/Name` or `Owner/Name@revision`, which is downloaded into the Hugging
    /// Face cache (`HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are honoured).
    pub fn open(path_or_repo: &str) -> Result<Self, Error> {
        let path = Path::new(path_or_repo);
        if path.is_dir() {
            Self::open_folder(path)
        } else if path.exists() {
            Self::open_gguf(path)
        } else {
            Self::open_folder(&hub::fetch(path_or_repo)?)
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, Error> {
        let config = ModelConfig::from_folder(folder)?;
        let weights = Safetensors::open(folder)?;
        let checkpoint = Self {
            path: folder.to_owned(),
            config,
            source: Source::Folder(weights),
        };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    fn open_gguf(path: &Path) -> Result<Self, Error> {
        let gguf = Gguf::open(path)?;
        let checkpoint = Self {
            path: path.to_owned(),
            config: ModelConfig::from_gguf(&gguf)?,
            source: Source::Gguf(gguf),
        };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The names of the tensors, in the order of the forward pass.
    pub fn names(&self) -> Vec<String> {
        let tensors = self.config.expected_tensors();
        tensors.into_iter().map(|(name, _)| name).collect()
    }

    /// Reads a tensor as f32, with the name and the layout (`[out, in]`, rotary halves apart) that
    /// Hugging Face gives it.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let absent = || {
            let problem = "the checkpoint has no such tensor";
            Error::invalid(&self.path, name, problem, "ask for one of its names")
        };
        let shape = self.shape(name).ok_or_else(absent)?;
        let data = match &self.source {
            Source::Folder(weights) => weights.read(name)?.ok_or_else(absent)?,
            Source::Gguf(gguf) => {
                let data = gguf.read(&gguf::gguf_name(name).ok_or_else(absent)?)?;
                let rotary = ["q_proj.weight", "k_proj.weight"];
                if self.config.architecture == Architecture::Llama
                    && rotary.iter().any(|end| name.ends_with(end))
                {
                    gguf::unpermute_rotary(&data, self.config.head_dim, self.config.hidden)
                } else {
                    data
                }
            }
        };
        Ok(Tensor { shape, data })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let tokenizer = match &self.source {
            Source::Folder(_) => Tokenizer::from_folder(&self.path, &self.config.eos)?,
            Source::Gguf(gguf) => Tokenizer::from_gguf(gguf, &self.config.eos)?,
        };
        let (have, need) = (self.config.vocab_size, tokenizer.vocab_size());
        if need > have {
            let problem = format!("{need} tokens do not fit the embedding of {have} rows");
            let remedy = "use the tokenizer that belongs to the model";
            return Err(Error::invalid(&self.path, "tokenizer", problem, remedy));
        }
        Ok(tokenizer)
    }

    /// The model's chat template, for the model's own tokenizer.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, Error> {
        match &self.source {
            Source::Folder(_) => ChatTemplate::from_folder(&self.path, tokenizer),
            Source::Gguf(gguf) => ChatTemplate::from_gguf(gguf, tokenizer),
        }
    }

    /// Name and content of the text files (tokenizer, chat template, generation defaults) that a
    /// copy of this model in a Hugging Face folder needs besides weights and `config.json`.
    pub fn text_files(&self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        match &self.source {
            Source::Folder(_) => write::text_files_of_folder(&self.path),
            Source::Gguf(gguf) => write::text_files_of_gguf(gguf, &self.config),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Folder(weights) => weights.info(name).map(|(_, shape)| shape.to_vec()),
            Source::Gguf(gguf) => {
                let info = gguf.tensors().get(&gguf::gguf_name(name)?)?;
                Some(info.shape.clone())
            }
        }
    }

    fn check_tensors(&self) -> Result<(), Error> {
        let expected = self.config.expected_tensors();
        for (name, shape) in &expected {
            let problem = match self.shape(name) {
                None => "the tensor is missing".to_owned(),
                Some(found) if found != *shape => {
                    format!("shape {found:?} instead of {shape:?}")
                }
                Some(_) => continue,
            };
            let remedy = "the weights do not fit the model's description: fetch both again";
            return Err(Error::invalid(&self.path, name, problem, remedy));
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let gguf_known: BTreeSet<String>;
        let stranger = match &self.source {
            Source::Folder(weights) => weights.names().find(|name| {
                // Tables that some exporters store, and the second copy of a tied head.
                let harmless = name.ends_with("rotary_emb.inv_freq")
                    || (self.config.tied && *name == "lm_head.weight");
                !known.contains(name) && !harmless
            }),
            Source::Gguf(gguf) => {
                gguf_known = known
                    .iter()
                    .filter_map(|name| gguf::gguf_name(name))
                    .collect();
                let mut names = gguf.tensors().keys().map(String::as_str);
                names.find(|name| !gguf_known.contains(*name) && *name != "rope_freqs.weight")
            }
        };
        match stranger {
            None => Ok(()),
            Some(name) => Err(Error::invalid(
                &self.path,
                name,
                format!(
                    "a {} model has no such tensor",
                    self.config.architecture.name()
                ),
                "use a plain causal language model without adapters or extra heads",
            )),
        }
    }
}

/// Reads a text file that is small by nature. The limit keeps a wrong file from filling memory.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    const LIMIT: u64 = 1 << 28;
    let len = std::fs::metadata(path)
        .map_err(|e| Error::io(path, "open", e))?
        .len();
    if len > LIMIT {
        let problem = format!("{len} bytes are more than the limit of {LIMIT}");
        return Err(Error::invalid(
            path,
            "size",
            problem,
            "give the model's own file",
        ));
    }
    std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))
}
