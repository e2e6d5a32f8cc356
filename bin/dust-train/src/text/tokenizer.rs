//! Text to tokens and back: crate `tokenizers`, fed from `tokenizer.json` or from the vocabulary
//! and merges in a GGUF file.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    Tokenizer as HfTokenizer,
};

use crate::checkpoint::{Error, Gguf};

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    path: PathBuf,
    /// Recognises special tokens in the text.
    special: HfTokenizer,
    /// Takes them for plain text.
    literal: HfTokenizer,
    prefix: Vec<u32>,
    bos: Option<String>,
    eos: Option<String>,
    stops: Vec<u32>,
    vocab_size: usize,
    /// Names of special tokens.
    control: Vec<String>,
    /// Names of other added tokens that are spelled like tags.
    tags: Vec<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if there is one, `tokenizer_config.json` of a folder. `eos` are
    /// the stop tokens that the model's other files name.
    pub fn from_folder(folder: &Path, eos: &[u32]) -> Result<Self, Error> {
        #[derive(Deserialize, Default)]
        struct Config {
            bos_token: Option<Value>,
            eos_token: Option<Value>,
        }
        let path = folder.join("tokenizer.json");
        let text = crate::checkpoint::read_text(&path)?;
        let hf = HfTokenizer::from_bytes(text).map_err(|e| invalid(&path, "JSON", e))?;
        let config_path = folder.join("tokenizer_config.json");
        let config: Config = match config_path.exists() {
            true => serde_json::from_str(&crate::checkpoint::read_text(&config_path)?)
                .map_err(|e| invalid(&config_path, "JSON", e))?,
            false => Config::default(),
        };
        // A token is written as a string or as an object with its properties.
        let token = |value: Option<Value>| match value {
            Some(Value::String(token)) => Some(token),
            Some(object) => object["content"].as_str().map(str::to_owned),
            None => None,
        };
        Self::new(
            &path,
            hf,
            token(config.bos_token),
            token(config.eos_token),
            eos,
        )
    }

    /// Builds the tokenizer from a GGUF file's metadata. Byte-level BPE only (`gpt2` in the file),
    /// which is what all supported families but Llama 1 and 2 use.
    pub fn from_gguf(gguf: &Gguf, eos: &[u32]) -> Result<Self, Error> {
        let path = gguf.path();
        let absent = |key: &str| {
            let remedy = "convert the model again, or use its Hugging Face folder";
            Error::invalid(path, key, "is missing", remedy)
        };
        let key = "tokenizer.ggml.model";
        let model = gguf.string(key)?.ok_or_else(|| absent(key))?;
        if model != "gpt2" {
            let remedy = "use the model's Hugging Face folder, which has a tokenizer.json";
            let problem = format!("the tokenizer type `{model}` is not supported");
            return Err(Error::invalid(path, key, problem, remedy));
        }

        let key = "tokenizer.ggml.tokens";
        let tokens = gguf.strings(key)?.ok_or_else(|| absent(key))?;
        let vocab: Vec<(String, u32)> = tokens.iter().cloned().zip(0..).collect();
        let key = "tokenizer.ggml.merges";
        let merges = gguf
            .strings(key)?
            .ok_or_else(|| absent(key))?
            .iter()
            .map(|merge| {
                let pair = merge.split_once(' ');
                pair.map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .ok_or_else(|| invalid(path, key, format!("`{merge}` is not a pair")))
            })
            .collect::<Result<Vec<_>, _>>()?;

        let key = "tokenizer.ggml.pre";
        let pre = gguf.string(key)?.ok_or_else(|| absent(key))?;
        let scheme = Scheme::from_name(pre).ok_or_else(|| {
            let remedy = "use the model's Hugging Face folder, which has a tokenizer.json";
            Error::invalid(path, key, format!("`{pre}` is not supported"), remedy)
        })?;
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
            .ignore_merges(scheme == Scheme::Llama3)
            .build()
            .map_err(|e| invalid(path, "tokenizer.ggml.merges", e))?;
        let mut hf = HfTokenizer::new(bpe);
        hf.with_pre_tokenizer(Some(
            scheme.pre_tokenizer().map_err(|e| invalid(path, key, e))?,
        ));
        hf.with_normalizer(scheme.normalizer())
            .map_err(|e| invalid(path, key, e))?;
        hf.with_decoder(Some(ByteLevel::default()));

        let key = "tokenizer.ggml.token_type";
        let types = gguf.integers(key)?.ok_or_else(|| absent(key))?;
        if types.len() != tokens.len() {
            let problem = format!("{} types for {} tokens", types.len(), tokens.len());
            return Err(invalid(path, key, problem));
        }
        hf.add_tokens(tokens.iter().zip(types).filter_map(|(token, ty)| match ty {
            2 | 3 => Some(AddedToken::from(token.clone(), true).normalized(false)),
            4 => Some(AddedToken::from(token.clone(), false).normalized(false)),
            _ => None,
        }))
        .map_err(|e| invalid(path, key, e))?;

        let token = |key: &str| -> Result<Option<String>, Error> {
            let key = format!("tokenizer.ggml.{key}");
            gguf.unsigned(&key)?
                .map(|id| {
                    let token = tokens.get(id).cloned();
                    token.ok_or_else(|| invalid(path, &key, format!("there is no token {id}")))
                })
                .transpose()
        };
        let (bos, eos_token) = (token("bos_token_id")?, token("eos_token_id")?);
        if let (Some(bos), Some(true)) = (&bos, gguf.bool("tokenizer.ggml.add_bos_token")?) {
            let id = hf.token_to_id(bos).unwrap_or_default();
            let processor = TemplateProcessing::builder()
                .try_single(format!("{bos} $A"))
                .and_then(|b| b.try_pair(format!("{bos} $A {bos} $B:1")))
                .map_err(|e| invalid(path, "tokenizer.ggml.bos_token_id", e))?
                .special_tokens(vec![(bos.clone(), id)])
                .build()
                .map_err(|e| invalid(path, "tokenizer.ggml.bos_token_id", e))?;
            hf.with_post_processor(Some(processor));
        }
        Self::new(path, hf, bos, eos_token, eos)
    }

    fn new(
        path: &Path,
        mut special: HfTokenizer,
        bos: Option<String>,
        eos: Option<String>,
        other_eos: &[u32],
    ) -> Result<Self, Error> {
        // Both are settings of a training data loader that some files carry along.
        special.with_padding(None);
        special
            .with_truncation(None)
            .map_err(|e| invalid(path, "truncation", e))?;
        let empty = special
            .encode("", true)
            .map_err(|e| invalid(path, "post_processor", e))?;
        let mut literal = special.clone();
        literal.set_encode_special_tokens(true);
        let mut stops = other_eos.to_vec();
        if let Some(id) = eos.as_ref().and_then(|eos| special.token_to_id(eos))
            && !stops.contains(&id)
        {
            stops.push(id);
        }
        let last = special.get_vocab(true).into_values().max();
        let added = special.get_added_tokens_decoder().into_values();
        let (control, others): (Vec<_>, Vec<_>) = added.partition(|token| token.special);
        let is_tag = |name: &String| name.starts_with('<') && name.ends_with('>');
        Ok(Self {
            control: control.into_iter().map(|token| token.content).collect(),
            tags: others
                .into_iter()
                .map(|token| token.content)
                .filter(is_tag)
                .collect(),
            path: path.to_owned(),
            prefix: empty.get_ids().to_vec(),
            vocab_size: last.map_or(0, |id| id as usize + 1),
            special,
            literal,
            bos,
            eos,
            stops,
        })
    }

    /// The tokens of a text. With `allow_special`, the names of special tokens in the text (such as
    /// `<|im_end|>`) become those tokens: right for a rendered chat template, wrong for text that
    /// someone else wrote. Nothing is put before the text; see [`prefix`](Self::prefix).
    pub fn encode(&self, text: &str, allow_special: bool) -> Result<Vec<u32>, Error> {
        let tokenizer = if allow_special {
            &self.special
        } else {
            &self.literal
        };
        let encoding = tokenizer.encode_fast(text, false).map_err(|e| {
            let problem = format!("cannot tokenize a text of {} bytes: {e}", text.len());
            Error::invalid(&self.path, "model", problem, "shorten or change the text")
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens. Special tokens appear by their names, ids outside of the vocabulary not
    /// at all, and bytes that are not UTF-8 as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.special.decode(tokens, false).unwrap_or_default()
    }

    /// A decoder that takes one token at a time.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder {
            tokenizer: self,
            window: Vec::new(),
            context: 0,
            shown: 0,
        }
    }

    /// What the tokenizer puts before a plain text: the BOS token for Llama 3, nothing for SmolLM2
    /// and Qwen. A chat template writes it itself.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, special or not.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.special.token_to_id(token)
    }

    /// The token with an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.special.id_to_token(id)
    }

    /// The name of the token that begins a text.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// The name of the token that ends an answer.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// The tokens that end an answer, from all of the model's files.
    pub fn eos_ids(&self) -> &[u32] {
        &self.stops
    }

    /// The names of special tokens, and with `tags` of other added tokens that are spelled like tags
    /// (`<think>` of Qwen3, which its vocabulary does not call special).
    pub(super) fn control_tokens(&self, tags: bool) -> impl Iterator<Item = &str> {
        let tags = self.tags.iter().filter(move |_| tags);
        self.control.iter().chain(tags).map(String::as_str)
    }

    /// The content of a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String, Error> {
        self.special
            .to_string(true)
            .map_err(|e| invalid(&self.path, "JSON", e))
    }
}

/// Decodes a growing sequence and shows only whole characters.
///
/// A character can be spread over several tokens: as long as the text ends in the middle of one,
/// the end is held back.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens that were shown last, as context (without it, some tokenizers drop the space
    /// before a word), then those that are held back.
    window: Vec<u32>,
    /// How many tokens of the window are context.
    context: usize,
    /// Bytes of text that the context stands for.
    shown: usize,
}

impl StreamDecoder<'_> {
    /// Adds a token and returns the text that it completes, which may be empty.
    pub fn push(&mut self, token: u32) -> String {
        // A character has at most 4 bytes; so many tokens without a whole one are not text.
        const HELD: usize = 16;
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window);
        if text.ends_with('\u{fffd}') && self.window.len() - self.context < HELD {
            return String::new();
        }
        self.window.drain(..self.context);
        self.context = self.window.len();
        let from = std::mem::replace(&mut self.shown, self.tokenizer.decode(&self.window).len());
        text.get(from..).unwrap_or_default().to_owned()
    }

    /// The text that is still held back.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.window);
        text.get(self.shown..).unwrap_or_default().to_owned()
    }
}

/// How a byte-level BPE tokenizer cuts a text into words before it merges within them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Gpt2,
    SmolLm,
    Qwen2,
    Llama3,
}

impl Scheme {
    /// By the name in `tokenizer.ggml.pre`.
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" | "gpt-2" => Self::Gpt2,
            "smollm" => Self::SmolLm,
            "qwen2" | "deepseek-r1-qwen" => Self::Qwen2,
            "llama-bpe" | "llama3" | "llama-v3" => Self::Llama3,
            _ => return None,
        })
    }

    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let split = |digits: &str| {
            // Contractions; words with one leading sign; digits; runs of signs; line ends; spaces,
            // the last of which stays with the word that follows.
            let pattern = format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            Split::new(
                SplitPattern::Regex(pattern),
                SplitDelimiterBehavior::Isolated,
                false,
            )
        };
        let bytes = |own_pattern| ByteLevel::new(false, true, own_pattern).into();
        Ok(match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            Self::Qwen2 => Sequence::new(vec![split(r"\p{N}")?.into(), bytes(false)]).into(),
            Self::Llama3 => Sequence::new(vec![split(r"\p{N}{1,3}")?.into(), bytes(false)]).into(),
        })
    }

    fn normalizer(self) -> Option<NormalizerWrapper> {
        (self == Self::Qwen2).then(|| NFC.into())
    }
}

fn invalid(file: &Path, field: &str, problem: impl std::fmt::Display) -> Error {
    let remedy = "fetch the file again";
    Error::invalid(file, field, problem.to_string(), remedy)
}
