//! The shape of a model: one description, read from a Hugging Face `config.json` or from GGUF
//! metadata, and written back as `config.json`.

mod fields;
mod rope;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::Error;
use super::gguf::Gguf;
use fields::Fields;
pub use rope::{RopeFrequencies, RopeScaling};

/// The model families that are supported. All are decoder-only transformers with RMSNorm, rotary
/// positions, grouped-query attention and SwiGLU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama 1 to 3 and what follows its layout (SmolLM2, TinyLlama).
    Llama,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3 dense: RMSNorm on each query and key head, head size independent of the width.
    Qwen3,
}

impl Architecture {
    /// The name in `config.json` (`model_type`) and in GGUF (`general.architecture`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    fn from_name(file: &Path, field: &str, name: &str) -> Result<Self, Error> {
        [Self::Llama, Self::Qwen2, Self::Qwen3]
            .into_iter()
            .find(|a| a.name() == name)
            .ok_or_else(|| {
                Error::invalid(
                    file,
                    field,
                    format!("architecture `{name}` is not supported"),
                    "use a llama, qwen2 or qwen3 (dense) model",
                )
            })
    }
}

/// Everything that the forward pass must know about a model besides its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Number of transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head; even.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched to longer contexts.
    pub rope_scaling: RopeScaling,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f64,
    /// Whether the head is the embedding matrix.
    pub tied: bool,
    /// Longest sequence that the model is meant for.
    pub max_positions: usize,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether each query and key head is normalised before the rotation.
    pub qk_norm: bool,
    /// The token that begins a text, if the model names one.
    pub bos: Option<u32>,
    /// The tokens that end an answer, from all of the model's files, without repetition.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Reads a Hugging Face folder's `config.json` and, for more stop tokens, its
    /// `generation_config.json` if there is one.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let mut config = Self::from_hf(&path, &read_json(&path)?)?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let json = read_json(&path)?;
            config.add_eos(Fields::new(&path, "", &json)?.tokens("eos_token_id")?);
        }
        Ok(config)
    }

    fn from_hf(path: &Path, json: &Value) -> Result<Self, Error> {
        let fields = Fields::new(path, "", json)?;
        let architecture =
            Architecture::from_name(path, "model_type", fields.string("model_type")?)?;
        refuse_unsupported(&fields, architecture)?;
        let heads = fields.required("num_attention_heads")?;
        let hidden: usize = fields.required("hidden_size")?;
        let kv_heads = match architecture {
            Architecture::Llama => fields.unsigned("num_key_value_heads")?.unwrap_or(heads),
            Architecture::Qwen2 | Architecture::Qwen3 => fields.required("num_key_value_heads")?,
        };
        let head_dim = match (fields.unsigned("head_dim")?, architecture) {
            (Some(head_dim), _) => head_dim,
            (None, Architecture::Qwen3) => 128,
            (None, _) => hidden.checked_div(heads).unwrap_or(0),
        };
        let max_positions = fields.required("max_position_embeddings")?;
        let (rope_theta, rope_scaling) = rope::from_hf(&fields, max_positions)?;
        let config = Self {
            architecture,
            vocab_size: fields.required("vocab_size")?,
            hidden,
            intermediate: fields.required("intermediate_size")?,
            layers: fields.required("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            rope_theta,
            rope_scaling,
            rms_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
            tied: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            bos: fields.tokens("bos_token_id")?.first().copied(),
            eos: fields.tokens("eos_token_id")?,
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Reads GGUF metadata. The head is tied exactly when the file has no `output.weight`.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let path = gguf.path();
        let name = gguf
            .string("general.architecture")?
            .ok_or_else(|| missing(path, "general.architecture"))?;
        let architecture = Architecture::from_name(path, "general.architecture", name)?;
        let key = |suffix: &str| format!("{name}.{suffix}");
        let optional = |suffix: &str| gguf.unsigned(&key(suffix));
        let required = |suffix: &str| optional(suffix)?.ok_or_else(|| missing(path, &key(suffix)));

        for (suffix, what) in [
            ("expert_count", "mixture-of-experts models are"),
            ("attention.sliding_window", "sliding-window attention is"),
        ] {
            if optional(suffix)?.is_some_and(|n| n > 0) {
                return Err(unsupported(path, &key(suffix), what));
            }
        }
        let hidden: usize = required("embedding_length")?;
        let heads: usize = required("attention.head_count")?;
        let head_dim = match optional("attention.key_length")? {
            Some(n) => n,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        for (suffix, what) in [
            (
                "attention.value_length",
                "a value size other than the key size is",
            ),
            (
                "rope.dimension_count",
                "rotating only a part of each head is",
            ),
        ] {
            if optional(suffix)?.is_some_and(|n| n != head_dim) {
                return Err(unsupported(path, &key(suffix), what));
            }
        }
        let vocab_size = gguf.tensors().get("token_embd.weight").map(|t| t.shape[0]);
        let max_positions = required("context_length")?;
        let mut config = Self {
            architecture,
            vocab_size: vocab_size.ok_or_else(|| missing(path, "token_embd.weight"))?,
            hidden,
            intermediate: required("feed_forward_length")?,
            layers: required("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rope_theta: gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: RopeScaling::None,
            rms_eps: gguf
                .float(&key("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| missing(path, &key("attention.layer_norm_rms_epsilon")))?,
            tied: !gguf.tensors().contains_key("output.weight"),
            max_positions,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            bos: token(gguf, "tokenizer.ggml.bos_token_id")?,
            eos: Vec::new(),
        };
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            config.add_eos(token(gguf, &format!("tokenizer.ggml.{key}"))?);
        }
        config.validate(path)?;
        config.rope_scaling = rope::from_gguf(gguf, &config)?;
        Ok(config)
    }

    fn add_eos(&mut self, tokens: impl IntoIterator<Item = u32>) {
        for token in tokens {
            if !self.eos.contains(&token) {
                self.eos.push(token);
            }
        }
    }

    /// The tensors that a checkpoint of this shape holds, with Hugging Face names and shapes.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab_size, self.hidden],
        )];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[self.hidden]);
            for (name, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                add(&format!("self_attn.{name}.weight"), &[rows, self.hidden]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}.bias"), &[rows]);
                }
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("self_attn.o_proj.weight", &[self.hidden, q]);
            add("post_attention_layernorm.weight", &[self.hidden]);
            add("mlp.gate_proj.weight", &[self.intermediate, self.hidden]);
            add("mlp.up_proj.weight", &[self.intermediate, self.hidden]);
            add("mlp.down_proj.weight", &[self.hidden, self.intermediate]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            tensors.push((
                "lm_head.weight".to_owned(),
                vec![self.vocab_size, self.hidden],
            ));
        }
        tensors
    }

    /// The `config.json` that `transformers` reads. `dtype` is the name of the weights' type, such
    /// as `bfloat16`.
    pub fn to_hf(&self, dtype: &str) -> Value {
        let mut json = json!({
            "architectures": [self.architecture.class()],
            "model_type": self.architecture.name(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf(),
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos_json(),
            "torch_dtype": dtype,
        });
        if self.architecture != Architecture::Qwen2 {
            json["attention_bias"] = Value::Bool(false);
        }
        json
    }

    /// The `generation_config.json` that makes other programs stop where this model stops.
    pub fn to_hf_generation(&self) -> Value {
        let mut json = Map::new();
        if let Some(bos) = self.bos {
            json.insert("bos_token_id".to_owned(), bos.into());
        }
        json.insert("eos_token_id".to_owned(), self.eos_json());
        Value::Object(json)
    }

    fn eos_json(&self) -> Value {
        match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        }
    }

    /// Bounds every size, so that no later product of two of them can overflow or divide by zero.
    fn validate(&self, file: &Path) -> Result<(), Error> {
        let check = |field: &str, good: bool, problem: &str| match good {
            true => Ok(()),
            false => {
                let remedy = "the model's description is damaged or not supported: fetch it again";
                Err(Error::invalid(file, field, problem, remedy))
            }
        };
        for (field, value, limit) in [
            ("vocabulary size", self.vocab_size, 1 << 24),
            ("hidden size", self.hidden, 1 << 20),
            ("intermediate size", self.intermediate, 1 << 24),
            ("number of layers", self.layers, 1 << 12),
            ("number of heads", self.heads, 1 << 12),
            ("number of key/value heads", self.kv_heads, 1 << 12),
            ("head size", self.head_dim, 1 << 12),
            ("number of positions", self.max_positions, 1 << 32),
        ] {
            let problem = format!("{value} is not between 1 and {limit}");
            check(field, (1..=limit).contains(&value), &problem)?;
        }
        check(
            "number of key/value heads",
            self.heads.is_multiple_of(self.kv_heads),
            &format!("{} does not divide the {} heads", self.kv_heads, self.heads),
        )?;
        check(
            "head size",
            self.head_dim.is_multiple_of(2),
            "is odd, so rotary pairs do not fit",
        )?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        check(
            "RMSNorm epsilon",
            positive(self.rms_eps),
            "is not a positive number",
        )?;
        let theta = self.rope_theta;
        check(
            "rope_theta",
            positive(theta) && theta > 1.0,
            "is not a number above 1",
        )?;
        let known = |token: u32| (token as usize) < self.vocab_size;
        check(
            "bos_token_id",
            self.bos.is_none_or(known),
            "is outside of the vocabulary",
        )
    }
}

/// Refuses what would silently change the model's function if it were ignored.
fn refuse_unsupported(fields: &Fields, architecture: Architecture) -> Result<(), Error> {
    let refuse = |field: &str, what: &str| Err(unsupported(fields.file(), field, what));
    if fields.get("quantization_config").is_some() {
        return refuse("quantization_config", "quantised safetensors are");
    }
    if let Some(act) = fields
        .optional_string("hidden_act")?
        .filter(|a| *a != "silu")
    {
        return refuse("hidden_act", &format!("the activation `{act}` is"));
    }
    if fields.bool("mlp_bias")?.unwrap_or(false) {
        return refuse("mlp_bias", "a bias in the feed-forward layer is");
    }
    // In both families this switch adds a bias to the output projection too.
    if architecture != Architecture::Qwen2 && fields.bool("attention_bias")?.unwrap_or(false) {
        return refuse("attention_bias", "a bias on all attention projections is");
    }
    if fields
        .float("partial_rotary_factor")?
        .is_some_and(|f| f != 1.0)
    {
        return refuse(
            "partial_rotary_factor",
            "rotating only a part of each head is",
        );
    }
    if architecture != Architecture::Llama && fields.bool("use_sliding_window")?.unwrap_or(false) {
        let first = fields.unsigned("max_window_layers")?.unwrap_or(0);
        if fields.get("sliding_window").is_some() && first < fields.required("num_hidden_layers")? {
            return refuse("use_sliding_window", "sliding-window attention is");
        }
    }
    let layer_types = fields.get("layer_types").and_then(Value::as_array);
    if layer_types.is_some_and(|types| types.iter().any(|t| t != "full_attention")) {
        return refuse("layer_types", "attention other than `full_attention` is");
    }
    Ok(())
}

fn token(gguf: &Gguf, key: &str) -> Result<Option<u32>, Error> {
    let token = gguf.unsigned(key)?;
    Ok(token.and_then(|t| u32::try_from(t).ok()))
}

fn read_json(path: &Path) -> Result<Value, Error> {
    serde_json::from_str(&super::read_text(path)?)
        .map_err(|e| Error::invalid(path, "JSON", e.to_string(), "fetch the file again"))
}

fn missing(file: &Path, field: &str) -> Error {
    Error::invalid(
        file,
        field,
        "is missing",
        "fetch or convert the model again",
    )
}

fn unsupported(file: &Path, field: &str, what: &str) -> Error {
    Error::invalid(
        file,
        field,
        format!("{what} not supported"),
        "use another model",
    )
}
