//! Rotary frequencies and the ways to stretch them over longer contexts.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::fields::Fields;
use super::{Error, Gguf, ModelConfig};

/// How the rotary frequencies are stretched to contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`: positions are interpolated.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// YaRN (Peng et al., 2023, arXiv:2309.00071): high frequencies kept, low ones divided by
    /// `factor`, a linear ramp between; queries and keys are scaled to keep the entropy.
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length of pre-training.
        original_positions: usize,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided by the whole factor.
        beta_slow: f64,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's rule: as YaRN, but with the ramp in the number of rotations and without scaling
    /// of queries and keys.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Rotations over the original context below which a frequency is divided.
        low_freq_factor: f64,
        /// Rotations above which a frequency is kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_positions: usize,
    },
}

/// What the rotary kernel needs.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// Angle per position of each of the `head_dim / 2` pairs.
    pub inverse: Vec<f64>,
    /// Factor on cosine and sine; 1 except for YaRN.
    pub attention_factor: f64,
}

impl ModelConfig {
    /// The model's rotary frequencies: pair `i` turns by `theta^(-2i / head_dim)` a position,
    /// stretched as [`RopeScaling`] says. The formulas are those of `transformers`
    /// (`modeling_rope_utils.py`), in f64 where it has f32.
    pub fn rope_frequencies(&self) -> RopeFrequencies {
        let dim = self.head_dim as f64;
        let plain: Vec<f64> = (0..self.head_dim / 2)
            .map(|i| self.rope_theta.powf(-2.0 * i as f64 / dim))
            .collect();
        let map = |f: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
            plain.iter().enumerate().map(|(i, &x)| f(i, x)).collect()
        };
        match self.rope_scaling {
            RopeScaling::None => RopeFrequencies {
                inverse: plain,
                attention_factor: 1.0,
            },
            RopeScaling::Linear { factor } => RopeFrequencies {
                inverse: map(&|_, x| x / factor),
                attention_factor: 1.0,
            },
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                // The pair that makes `rotations` turns over the original context.
                let pair = |rotations: f64| {
                    let positions = original_positions as f64;
                    dim * (positions / (rotations * TAU)).ln() / (2.0 * self.rope_theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                RopeFrequencies {
                    inverse: map(&|i, x| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        x / factor * ramp + x * (1.0 - ramp)
                    }),
                    attention_factor,
                }
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => RopeFrequencies {
                inverse: map(&|_, x| {
                    let rotations = original_positions as f64 * x / TAU;
                    let keep = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    x / factor * (1.0 - keep) + x * keep
                }),
                attention_factor: 1.0,
            },
        }
    }
}

/// YaRN's factor on cosine and sine: `0.1 mscale ln(factor) + 1` (equation 22 of the paper).
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// Base and scaling from `config.json`: the older `rope_theta` and `rope_scaling`, or the newer
/// `rope_parameters` that holds both.
pub(super) fn from_hf(fields: &Fields, max_positions: usize) -> Result<(f64, RopeScaling), Error> {
    let mut theta = fields.float("rope_theta")?;
    let mut scaling = RopeScaling::None;
    for place in ["rope_scaling", "rope_parameters"] {
        if let Some(json) = fields.get(place) {
            let rope = Fields::new(fields.file(), place, json)?;
            theta = rope.float("rope_theta")?.or(theta);
            if rope
                .float("partial_rotary_factor")?
                .is_some_and(|f| f != 1.0)
            {
                let problem = "rotating only a part of each head is not supported";
                return Err(rope.error("partial_rotary_factor", problem, "use another model"));
            }
            scaling = scaling_from_hf(&rope, max_positions)?;
        }
    }
    Ok((theta.unwrap_or(10_000.0), scaling))
}

fn scaling_from_hf(rope: &Fields, max_positions: usize) -> Result<RopeScaling, Error> {
    let kind = match rope.optional_string("rope_type")? {
        Some(kind) => kind,
        None => rope.optional_string("type")?.unwrap_or("default"),
    };
    let original = || {
        let own = rope.unsigned("original_max_position_embeddings")?;
        Ok::<_, Error>(own.unwrap_or(max_positions))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: rope.required_float("factor")?,
        },
        "yarn" => {
            let original_positions = original()?;
            let factor = match rope.float("factor")? {
                Some(factor) => factor,
                None => max_positions as f64 / original_positions as f64,
            };
            let nonzero = |name| Ok::<_, Error>(rope.float(name)?.filter(|&x| x != 0.0));
            let mscales = (nonzero("mscale")?, nonzero("mscale_all_dim")?);
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                attention_factor: match (rope.float("attention_factor")?, mscales) {
                    (Some(given), _) => given,
                    (None, (Some(m), Some(all))) => {
                        yarn_mscale(factor, m) / yarn_mscale(factor, all)
                    }
                    (None, _) => yarn_mscale(factor, 1.0),
                },
                truncate: rope.bool("truncate")?.unwrap_or(true),
            }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required_float("factor")?,
            low_freq_factor: rope.required_float("low_freq_factor")?,
            high_freq_factor: rope.required_float("high_freq_factor")?,
            original_positions: rope.required("original_max_position_embeddings")?,
        },
        other => {
            let problem = format!("`{other}` is not supported");
            return Err(rope.error("rope_type", problem, "use default, linear, yarn or llama3"));
        }
    };
    scaling
        .check()
        .map_err(|problem| rope.error("rope_type", problem, "correct the file"))?;
    Ok(scaling)
}

/// Scaling from GGUF metadata. Llama 3's rule is not named there: the file holds its result, the
/// divisor of each frequency, as a tensor.
pub(super) fn from_gguf(gguf: &Gguf, config: &ModelConfig) -> Result<RopeScaling, Error> {
    let arch = config.architecture.name();
    let key = |suffix: &str| format!("{arch}.rope.scaling.{suffix}");
    if gguf.tensors().contains_key("rope_freqs.weight") {
        return llama3_from_divisors(gguf, config);
    }
    let factor = gguf.float(&key("factor"))?;
    let needed = || factor.ok_or_else(|| super::missing(gguf.path(), &key("factor")));
    let scaling = match gguf.string(&key("type"))?.unwrap_or("none") {
        "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed()? },
        "yarn" => {
            let factor = needed()?;
            let positions = gguf.unsigned(&key("original_context_length"))?;
            let float = |suffix| gguf.float(&key(suffix));
            RopeScaling::Yarn {
                factor,
                original_positions: positions.unwrap_or(config.max_positions),
                beta_fast: float("yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: float("yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: float("attn_factor")?.unwrap_or(1.0) * yarn_mscale(factor, 1.0),
                truncate: true,
            }
        }
        other => {
            let what = format!("the rotary scaling `{other}` is");
            return Err(super::unsupported(gguf.path(), &key("type"), &what));
        }
    };
    scaling.check().map_err(|problem| {
        Error::invalid(gguf.path(), key("factor"), problem, "convert it again")
    })?;
    Ok(scaling)
}

/// All Llama 3.1 and 3.2 models share the bounds 1 and 4 over 8192 positions and differ in the
/// factor alone, which is the largest divisor. The guess is accepted only if it gives the file's
/// divisors back.
fn llama3_from_divisors(gguf: &Gguf, config: &ModelConfig) -> Result<RopeScaling, Error> {
    const NAME: &str = "rope_freqs.weight";
    // Read only what has the right size.
    if gguf
        .tensors()
        .get(NAME)
        .is_none_or(|t| t.shape != [config.head_dim / 2])
    {
        let problem = format!("does not have {} elements", config.head_dim / 2);
        return Err(Error::invalid(
            gguf.path(),
            NAME,
            problem,
            "convert the model again",
        ));
    }
    let divisors = gguf.read(NAME)?;
    let plain = config.rope_frequencies().inverse;
    let guess = ModelConfig {
        rope_scaling: RopeScaling::Llama3 {
            factor: divisors.iter().copied().fold(1.0, f32::max).into(),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        },
        ..config.clone()
    };
    let close = guess
        .rope_frequencies()
        .inverse
        .iter()
        .zip(plain)
        .zip(&divisors)
        .all(|((scaled, plain), &d)| (plain / scaled - f64::from(d)).abs() < 1e-4 * f64::from(d));
    if !close {
        return Err(super::unsupported(
            gguf.path(),
            NAME,
            "rotary scaling other than Llama 3.1's is",
        ));
    }
    Ok(guess.rope_scaling)
}

impl RopeScaling {
    fn check(&self) -> Result<(), String> {
        let numbers = match *self {
            Self::None => vec![],
            Self::Linear { factor } => vec![("factor", factor)],
            Self::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => vec![
                ("factor", factor),
                (
                    "original_max_position_embeddings",
                    original_positions as f64,
                ),
                ("beta_fast", beta_fast),
                ("beta_slow", beta_slow),
                ("attention_factor", attention_factor),
            ],
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => vec![
                ("factor", factor),
                ("low_freq_factor", low_freq_factor),
                (
                    "high_freq_factor - low_freq_factor",
                    high_freq_factor - low_freq_factor,
                ),
                (
                    "original_max_position_embeddings",
                    original_positions as f64,
                ),
            ],
        };
        match numbers.iter().find(|(_, x)| !x.is_finite() || *x <= 0.0) {
            Some((name, x)) => Err(format!("{name} is {x}, not a positive number")),
            None => Ok(()),
        }
    }

    /// The value of `rope_scaling` in `config.json`.
    pub(super) fn to_hf(&self) -> Value {
        match *self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original_positions,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "attention_factor": attention_factor,
                "truncate": truncate,
            }),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_positions,
            }),
        }
    }
}
