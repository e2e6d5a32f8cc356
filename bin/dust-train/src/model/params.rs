//! The parameters of a model as a tree, generic over what is kept for each: a weight, a gradient, a
//! moment.
//!
//! Query, key and value projections are stored as one matrix, and so are gate and up: one product
//! where the Hugging Face layout has three and two. [`Spec`] says how each splits back.

use crate::checkpoint::ModelConfig;

/// What a parameter is called in a checkpoint and how it is shaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The checkpoint's tensors that are stacked here, top to bottom, with their rows.
    pub parts: Vec<(String, usize)>,
    /// Columns; 1 for a vector.
    pub columns: usize,
    /// Whether it is a matrix: matrices get weight decay and may be stored as bf16.
    pub matrix: bool,
}

impl Spec {
    fn matrix(parts: Vec<(String, usize)>, columns: usize) -> Self {
        Self {
            parts,
            columns,
            matrix: true,
        }
    }

    fn vector(parts: Vec<(String, usize)>) -> Self {
        Self {
            parts,
            columns: 1,
            matrix: false,
        }
    }

    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows).sum::<usize>() * self.columns
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of a part in the checkpoint.
    pub fn part_shape(&self, rows: usize) -> Vec<usize> {
        if self.matrix {
            vec![rows, self.columns]
        } else {
            vec![rows]
        }
    }
}

/// One layer's parameters.
#[derive(Debug, Clone)]
pub struct LayerParams<T> {
    /// Norm before attention, `[hidden]`.
    pub attn_norm: T,
    /// Query, key and value projections, `[(heads + 2 kv_heads) head_dim, hidden]`.
    pub qkv: T,
    /// Their biases (Qwen2).
    pub qkv_bias: Option<T>,
    /// Norms of query and key heads, `[head_dim]` each (Qwen3).
    pub qk_norm: Option<(T, T)>,
    /// Output projection, `[hidden, heads head_dim]`.
    pub out: T,
    /// Norm before the feed-forward layer, `[hidden]`.
    pub mlp_norm: T,
    /// Gate and up projections, `[2 intermediate, hidden]`.
    pub gate_up: T,
    /// Down projection, `[hidden, intermediate]`.
    pub down: T,
}

/// All parameters of a model.
#[derive(Debug, Clone)]
pub struct Params<T> {
    /// Token embedding, `[vocab, hidden]`; also the head where the two are tied.
    pub embed: T,
    /// The layers, bottom to top.
    pub layers: Vec<LayerParams<T>>,
    /// The last norm, `[hidden]`.
    pub norm: T,
    /// The head, `[vocab, hidden]`, where it is not tied.
    pub head: Option<T>,
}

impl Params<Spec> {
    /// The parameters that a model of this shape has.
    pub fn specs(config: &ModelConfig) -> Self {
        let hidden = config.hidden;
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let layers = (0..config.layers)
            .map(|i| {
                let name = |n: &str| format!("model.layers.{i}.{n}");
                let one = |n: &str, rows| vec![(name(n), rows)];
                let qkv = |suffix: &str| {
                    [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
                        .map(|(p, rows)| (name(&format!("self_attn.{p}.{suffix}")), rows))
                        .to_vec()
                };
                LayerParams {
                    attn_norm: Spec::vector(one("input_layernorm.weight", hidden)),
                    qkv: Spec::matrix(qkv("weight"), hidden),
                    qkv_bias: config.qkv_bias.then(|| Spec::vector(qkv("bias"))),
                    qk_norm: config.qk_norm.then(|| {
                        (
                            Spec::vector(one("self_attn.q_norm.weight", config.head_dim)),
                            Spec::vector(one("self_attn.k_norm.weight", config.head_dim)),
                        )
                    }),
                    out: Spec::matrix(one("self_attn.o_proj.weight", hidden), q),
                    mlp_norm: Spec::vector(one("post_attention_layernorm.weight", hidden)),
                    gate_up: Spec::matrix(
                        ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
                            .map(|n| (name(n), config.intermediate))
                            .to_vec(),
                        hidden,
                    ),
                    down: Spec::matrix(one("mlp.down_proj.weight", hidden), config.intermediate),
                }
            })
            .collect();
        let vocab = |name: &str| Spec::matrix(vec![(name.to_owned(), config.vocab_size)], hidden);
        Params {
            embed: vocab("model.embed_tokens.weight"),
            layers,
            norm: Spec::vector(vec![("model.norm.weight".to_owned(), hidden)]),
            head: (!config.tied).then(|| vocab("lm_head.weight")),
        }
    }
}

impl<T> LayerParams<T> {
    fn try_map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<LayerParams<U>, E> {
        Ok(LayerParams {
            attn_norm: f(&self.attn_norm)?,
            qkv: f(&self.qkv)?,
            qkv_bias: self.qkv_bias.as_ref().map(&mut *f).transpose()?,
            qk_norm: match &self.qk_norm {
                Some((q, k)) => Some((f(q)?, f(k)?)),
                None => None,
            },
            out: f(&self.out)?,
            mlp_norm: f(&self.mlp_norm)?,
            gate_up: f(&self.gate_up)?,
            down: f(&self.down)?,
        })
    }
}

impl<T> Params<T> {
    /// Another tree of the same shape, each leaf made by `f`, in the order of [`Params::iter`].
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(&self, mut f: impl FnMut(&T) -> Result<U, E>) -> Result<Params<U>, E> {
        Ok(Params {
            embed: f(&self.embed)?,
            layers: self
                .layers
                .iter()
                .map(|layer| layer.try_map(&mut f))
                .collect::<Result<_, E>>()?,
            norm: f(&self.norm)?,
            head: self.head.as_ref().map(&mut f).transpose()?,
        })
    }

    /// All leaves, always in the same order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let layers = self.layers.iter().flat_map(|l| {
            let (q, k) = l.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
            [Some(&l.attn_norm), Some(&l.qkv), l.qkv_bias.as_ref(), q, k]
                .into_iter()
                .chain([&l.out, &l.mlp_norm, &l.gate_up, &l.down].map(Some))
                .flatten()
        });
        std::iter::once(&self.embed)
            .chain(layers)
            .chain(std::iter::once(&self.norm))
            .chain(self.head.as_ref())
    }

    /// All leaves, mutably, in the order of [`Params::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let layers = self.layers.iter_mut().flat_map(|l| {
            let (q, k) = l.qk_norm.as_mut().map(|(q, k)| (q, k)).unzip();
            [
                Some(&mut l.attn_norm),
                Some(&mut l.qkv),
                l.qkv_bias.as_mut(),
                q,
                k,
            ]
            .into_iter()
            .chain([&mut l.out, &mut l.mlp_norm, &mut l.gate_up, &mut l.down].map(Some))
            .flatten()
        });
        std::iter::once(&mut self.embed)
            .chain(layers)
            .chain(std::iter::once(&mut self.norm))
            .chain(self.head.as_mut())
    }
}
