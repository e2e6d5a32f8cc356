//! Causal grouped-query attention over packed sequences, in the flash style (Dao et al. 2022,
//! arXiv 2205.14135): the scores are never stored, only each row's log-sum-exp.
//!
//! **One canonical reduction.** A query's keys are cut into chunks from position 0 of its sequence:
//! 64 on the CPU, 256 with CUDA. Each chunk is reduced from a fresh state (maximum, sum, weighted
//! values) and chunk states are merged left to right. Prefill, decode from pages, shared prefixes
//! and training all follow it, so that a token's output has the same bits on every path.

mod check;

pub(crate) use check::{
    check_attention, check_attention_backward, check_cache_write, check_disjoint, check_paged,
};

use crate::{Device, Error, Result};

/// Tokens of a page of the key/value cache.
pub const PAGE: usize = 64;

/// The heads of an attention layer. Rows of queries, keys and values are packed:
/// `[rows, q_heads + 2 * kv_heads, head_dim]`, queries first, then keys, then values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads; query head `h` reads key/value head `h / (q_heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of a packed row: `(q_heads + 2 * kv_heads) * head_dim`.
    pub fn qkv_width(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Width of an output row: `q_heads * head_dim`.
    pub fn out_width(&self) -> usize {
        self.q_heads * self.head_dim
    }
    /// Width of a row of the key (or value) cache: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// Elements of a packed row before the keys.
    pub fn k_offset(&self) -> usize {
        self.q_heads * self.head_dim
    }
    /// Elements of a packed row before the values.
    pub fn v_offset(&self) -> usize {
        (self.q_heads + self.kv_heads) * self.head_dim
    }
    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }
    /// Refuses head counts that attention cannot split.
    ///
    /// # Errors
    /// A zero, or `q_heads` that is no multiple of `kv_heads`.
    pub fn check(&self, op: &'static str) -> Result<()> {
        if self.q_heads == 0 || self.kv_heads == 0 || self.head_dim == 0 {
            return Err(Error::invalid(op, format!("no count may be 0: {self:?}")));
        }
        if !self.q_heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(
                op,
                format!("q_heads must be a multiple of kv_heads: {self:?}"),
            ));
        }
        Ok(())
    }
}

/// One sequence of a packed batch: `len` rows from `start` on, seen after an optional prefix that
/// other sequences may share. Its tokens have positions `prefix_len ..  prefix_len + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Segment {
    /// First packed row of its own tokens.
    pub start: u32,
    /// Own tokens.
    pub len: u32,
    /// First packed row of the prefix.
    pub prefix_start: u32,
    /// Tokens of the prefix; 0 where there is none.
    pub prefix_len: u32,
}

/// One sequence of a paged call: `q_len` query rows from `q_start` on, the last tokens of a context
/// of `context` tokens whose keys and values lie in the pages `pages[first_page ..]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct PagedSequence {
    /// First packed row of its queries.
    pub q_start: u32,
    /// Query rows: 1 in decode, more in prefill.
    pub q_len: u32,
    /// Tokens in the cache for it, those of this call included.
    pub context: u32,
    /// Where its run of page numbers begins in `pages`; it has `ceil(context / PAGE)` of them.
    pub first_page: u32,
}

/// The sequences of a paged call. They lie in device memory, and the figures beside them fix the
/// size of the launch: a recorded call serves every step whose sequences keep within the bounds.
pub struct PagedBatch<'a, D: Device> {
    /// The sequences, in any order; those without queries take no part.
    pub sequences: &'a D::Buf<PagedSequence>,
    /// How many there are.
    pub count: usize,
    /// Packed rows of queries and outputs; no sequence's queries go beyond.
    pub rows: usize,
    /// At least every sequence's `q_len`.
    pub max_q_len: usize,
    /// At least every sequence's `context`.
    pub max_context: usize,
    /// The page numbers of all sequences.
    pub pages: &'a D::Buf<u32>,
}

impl<D: Device> Clone for PagedBatch<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for PagedBatch<'_, D> {}

/// Attention, for training (packed) and rollout (paged).
pub trait Attention: Device {
    /// Causal attention of every segment over its prefix and itself.
    ///
    /// `out` is `[rows, q_heads, head_dim]`, `lse` `[rows, q_heads]`: the natural logarithm of the
    /// sum of `exp(scale * q.k)`. Rows that no segment covers are left as they are.
    ///
    /// # Errors
    /// Short buffers, segments outside of `rows`, a prefix that is not the whole or the beginning
    /// of a segment without a prefix, overlapping segments; on a CUDA device heads of other than 64
    /// or 128 elements.
    fn attention(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &Self::Buf<Self::Elem>,
        out: &mut Self::Buf<Self::Elem>,
        lse: &mut Self::Buf<f32>,
    ) -> Result<()>;

    /// Writes the gradient of `qkv` to `dqkv`. The gradients of a shared prefix's keys and values
    /// are summed over its users in the order of the segments, without atomics.
    ///
    /// `delta` `[rows, q_heads]` is a workspace.
    ///
    /// # Errors
    /// As [`Attention::attention`].
    fn attention_backward(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &Self::Buf<Self::Elem>,
        out: &Self::Buf<Self::Elem>,
        lse: &Self::Buf<f32>,
        dout: &Self::Buf<Self::Elem>,
        delta: &mut Self::Buf<f32>,
        dqkv: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// Copies the keys and values of `rows` packed rows to their slots of the cache; slot
    /// `page * PAGE + place`. The caches are `[pages, PAGE, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// Short buffers, a slot outside of the cache; heads as for [`Attention::attention`].
    fn cache_write(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &Self::Buf<Self::Elem>,
        slots: &Self::Buf<u32>,
        k_cache: &mut Self::Buf<Self::Elem>,
        v_cache: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;

    /// Causal attention of every sequence's query rows over its pages, in one call for prefill and
    /// decode alike. The queries are read from `qkv`, keys and values from the cache only.
    ///
    /// No two sequences may have a query row in common.
    ///
    /// # Errors
    /// Short buffers, a page outside of the cache, `q_len > context`, a sequence beyond the bounds
    /// of `batch`; heads as for [`Attention::attention`].
    fn attention_paged(
        &self,
        heads: Heads,
        scale: f32,
        batch: PagedBatch<'_, Self>,
        qkv: &Self::Buf<Self::Elem>,
        k_cache: &Self::Buf<Self::Elem>,
        v_cache: &Self::Buf<Self::Elem>,
        out: &mut Self::Buf<Self::Elem>,
    ) -> Result<()>;
}
