//! Forward pass of one block of query rows, for training, prefill and decode alike.
//!
//! A chunk of keys is packed once, transposed, and serves all rows of the block and all query heads
//! of the group. Scores, probabilities and weighted values are then products of matrices with the
//! tile in registers. The maximum, the sum and the values of the chunk are merged into those of the
//! chunks before by `exp(old - max)` and `exp(new - max)`, also for the first chunk.
//!
//! Values are added up only as far as a row may see: a probability of 0 times a stale NaN would be
//! NaN.

use super::super::simd::{Kernel, Simd};
use super::keys::Keys;
use super::tile::{Depth, End, Product, pack_columns, pack_rows, padded, with_scratch};
use crate::attention::{CHUNK, Heads};

/// Query rows times heads of a group that one task aims at.
const BLOCK: usize = 96;
/// Below this many rows a copy of the values costs more than it saves.
const PACK_VALUES: usize = 16;

/// Query rows of a block.
pub(super) fn block_rows(heads: Heads) -> usize {
    (BLOCK / heads.group()).max(1)
}

/// Adjacent query rows and the key/value head that they read.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub heads: Heads,
    pub scale: f32,
    pub qkv: &'a [f32],
    pub keys: Keys<'a>,
    /// First packed row.
    pub row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
    pub kv_head: usize,
}

impl Block<'_> {
    /// Rows of the products: each query head of each row, heads innermost.
    pub(super) fn lines(&self) -> usize {
        self.rows * self.heads.group()
    }

    /// Where the queries of every line begin.
    pub(super) fn queries(&self) -> Vec<*const f32> {
        let Heads { head_dim, .. } = self.heads;
        let group = self.heads.group();
        (0..self.lines())
            .map(|line| {
                let row = (self.row + line / group) * self.heads.qkv_width();
                let head = self.kv_head * group + line % group;
                self.qkv[row + head * head_dim..][..head_dim].as_ptr()
            })
            .collect()
    }

    /// Keys in the sight of the last row.
    pub(super) fn context(&self) -> usize {
        self.position + self.rows
    }

    /// How many keys of the chunk that begins at `first` each line may see.
    pub(super) fn limits(&self, first: usize, limits: &mut [usize]) {
        let group = self.heads.group();
        for (row, limits) in limits.chunks_exact_mut(group).enumerate() {
            limits.fill((self.position + row + 1).saturating_sub(first).min(CHUNK));
        }
    }

    /// Runs `write` with the outputs of the block, `padded(head_dim)` apart, and the log-sum-exps.
    pub(super) fn forward(self, level: super::super::Level, write: impl FnOnce(&[f32], &[f32])) {
        let width = padded(self.heads.head_dim);
        let lines = self.lines();
        let vectors = lines.next_multiple_of(16) + 16;
        let sizes = [
            lines * width,
            self.heads.head_dim * CHUNK,
            CHUNK * width,
            lines * CHUNK,
            lines * width,
            6 * vectors,
        ];
        with_scratch(sizes, |[queries, keys, values, scores, out, state]| {
            let mut states = state.chunks_exact_mut(vectors);
            let mut next = || states.next().unwrap_or_default();
            let (max, sum) = (next(), next());
            level.dispatch(Forward {
                block: self,
                queries,
                keys,
                values,
                scores,
                out,
                max,
                sum,
                chunk_max: next(),
                chunk_sum: next(),
                old: next(),
                new: next(),
            });
            write(out, max);
        });
    }
}

/// The kernel and its scratch memory. In the end `out` holds the outputs, `max` the log-sum-exps.
struct Forward<'a> {
    block: Block<'a>,
    queries: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    chunk_max: &'a mut [f32],
    chunk_sum: &'a mut [f32],
    old: &'a mut [f32],
    new: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { block, .. } = self;
        let head_dim = block.heads.head_dim;
        let width = padded(head_dim);
        let lines = block.lines();
        let mut limits = vec![0; lines];
        // SAFETY: inside of `dispatch`; `Block::forward` sized the scratch memory for `lines`
        // lines, and `Keys` and `queries` check that rows lie inside of their buffers.
        unsafe {
            pack_rows(&block.queries(), head_dim, self.queries);
            self.out.fill(0.0);
            self.sum.fill(0.0);
            self.max.fill(f32::NEG_INFINITY);
            for first in (0..block.context()).step_by(CHUNK) {
                let count = CHUNK.min(block.context() - first);
                block.limits(first, &mut limits);
                // Lines before it see nothing of this chunk.
                let from = first.saturating_sub(block.position) * block.heads.group();
                let lines = lines - from;
                let limits = &limits[from..];
                let chunk = block.keys.chunk(first, count);
                pack_columns::<S>(&chunk.keys[..count], head_dim, self.keys);
                let scores = self.scores.as_mut_ptr();
                Product {
                    a: self.queries.as_ptr().add(from * width),
                    a_row: width,
                    a_step: 1,
                    b: self.keys.as_ptr(),
                    b_row: CHUNK,
                    c: scores,
                    c_row: CHUNK,
                    rows: lines,
                    cols: count,
                    depth: Depth::All(head_dim),
                    end: End::Set,
                }
                .run::<S>();
                for (line, &limit) in limits.iter().enumerate() {
                    let row = scores.add(line * CHUNK);
                    let (max, sum) = softmax::<S>(row, limit, block.scale);
                    self.chunk_max[from + line] = max;
                    self.chunk_sum[from + line] = sum;
                }
                // Whole vectors, past the last line too: the arrays are long enough.
                for at in (from..from + lines).step_by(S::LANES) {
                    let (max, sum) = (self.max[at..].as_mut_ptr(), self.sum[at..].as_mut_ptr());
                    let (before, here) = (S::load(max), S::load(self.chunk_max[at..].as_ptr()));
                    let both = before.max(here);
                    let (old, new) = (before.sub(both).exp(), here.sub(both).exp());
                    let here = S::load(self.chunk_sum[at..].as_ptr());
                    both.store(max);
                    here.fma(new, S::load(sum).mul(old)).store(sum);
                    old.store(self.old[at..].as_mut_ptr());
                    new.store(self.new[at..].as_mut_ptr());
                }
                let (values, values_row) = match chunk.values_stride {
                    Some(stride) if lines < PACK_VALUES && head_dim.is_multiple_of(S::LANES) => {
                        (chunk.values[0], stride)
                    }
                    _ => {
                        pack_rows(&chunk.values[..count], head_dim, self.values);
                        (self.values.as_ptr(), width)
                    }
                };
                Product {
                    a: scores,
                    a_row: CHUNK,
                    a_step: 1,
                    b: values,
                    b_row: values_row,
                    c: self.out.as_mut_ptr().add(from * width),
                    c_row: width,
                    rows: lines,
                    cols: head_dim,
                    depth: Depth::Rows(limits.as_ptr()),
                    end: End::Merge {
                        old: self.old.as_ptr().add(from),
                        new: self.new.as_ptr().add(from),
                    },
                }
                .run::<S>();
            }
            for (line, out) in self.out.chunks_exact_mut(width).take(lines).enumerate() {
                let scale = S::splat(1.0 / self.sum[line]);
                for at in (0..width).step_by(S::LANES) {
                    let out = out.as_mut_ptr().add(at);
                    S::load(out).mul(scale).store(out);
                }
                self.max[line] += self.sum[line].ln();
            }
        }
    }
}

/// Turns `limit` (1 to `CHUNK`) raw scores into `exp(scale * score - max)`; returns the maximum and
/// the sum.
///
/// # Safety
/// Inside of `Level::dispatch`; `row` holds `CHUNK` values.
#[inline(always)]
unsafe fn softmax<S: Simd>(row: *mut f32, limit: usize, scale: f32) -> (f32, f32) {
    let whole = limit - limit % S::LANES;
    // SAFETY: `CHUNK` is a multiple of the lanes, so whole vectors lie inside of the row.
    unsafe {
        let scale = S::splat(scale);
        let mut max = S::splat(f32::NEG_INFINITY);
        for at in (0..limit).step_by(S::LANES) {
            let place = row.add(at);
            let mut score = S::load(place).mul(scale);
            score.store(place);
            if at == whole {
                score = S::load_part(place, limit - whole, f32::NEG_INFINITY);
                score.store(place);
            }
            max = max.max(score);
        }
        let max = max.max_lane();
        let most = S::splat(max);
        let mut sum = S::zero();
        for at in (0..limit).step_by(S::LANES) {
            let p = S::load(row.add(at)).sub(most).exp();
            p.store(row.add(at));
            sum = sum.add(p);
        }
        (max, sum.sum())
    }
}
