//! Forward pass of one block of query rows, for training, prefill and decode alike.
//!
//! A chunk of keys is packed once, transposed, and serves all rows of the block and all query heads
//! of the group. Scores, probabilities and weighted values are then products of matrices with the
//! tile in registers. The maximum, the sum and the values of the chunk are merged into those of the
//! chunks before by `exp(old - max)` and `exp(new - max)`, also for the first chunk.
//!
//! Values are added up only as far as a row may see: a probability of 0 times a stale NaN would be
//! NaN.

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::CHUNK;
use super::keys::Keys;
use super::tile::{Depth, End, Product, pack_columns, pack_rows, padded, with_scratch};
use crate::attention::Heads;

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
    pub(super) fn forward(self, level: Level, write: impl FnOnce(&[f32], &[f32])) {
        let head_dim = self.heads.head_dim;
        let width = padded(head_dim);
        let lines = self.lines();
        // Whole vectors from any line on.
        let vectors = lines + 16;
        let sizes = [
            lines * width,
            head_dim * CHUNK,
            CHUNK * width,
            lines * CHUNK,
            lines * width,
            vectors,
            vectors,
            vectors,
            vectors,
            vectors,
            vectors,
        ];
        with_scratch(sizes, |scratch| {
            let [
                queries,
                keys,
                values,
                scores,
                out,
                max,
                sum,
                chunk_max,
                chunk_sum,
                old,
                new,
            ] = scratch;
            let mut limits = vec![0; lines];
            // SAFETY: the pointers of `queries` and `chunk` are to `head_dim` values.
            unsafe { pack_rows(&self.queries(), head_dim, queries) };
            out.fill(0.0);
            sum.fill(0.0);
            max.fill(f32::NEG_INFINITY);
            for first in (0..self.context()).step_by(CHUNK) {
                let count = CHUNK.min(self.context() - first);
                self.limits(first, &mut limits);
                // Lines before it see nothing of this chunk.
                let from = first.saturating_sub(self.position) * self.heads.group();
                let limits = &limits[from..];
                let chunk = self.keys.chunk(first, count);
                // SAFETY: as above.
                unsafe { pack_columns(level, &chunk.keys[..count], head_dim, keys) };
                let product = Product {
                    a: queries[from * width..].as_ptr(),
                    a_row: width,
                    a_step: 1,
                    b: keys.as_ptr(),
                    b_row: CHUNK,
                    c: scores.as_mut_ptr(),
                    c_row: CHUNK,
                    rows: limits.len(),
                    cols: count,
                    depth: Depth::All(head_dim),
                    end: End::Set,
                };
                // SAFETY: the scratch memory is that large, in separate runs.
                unsafe { product.run(level) };
                level.dispatch(Softmax {
                    scale: self.scale,
                    limits,
                    scores,
                    chunk_max: &mut chunk_max[from..],
                    chunk_sum: &mut chunk_sum[from..],
                    max: &mut max[from..],
                    sum: &mut sum[from..],
                    old: &mut old[from..],
                    new: &mut new[from..],
                });
                let (values, values_row) = match chunk.values_stride {
                    // 16 is a multiple of every level's lanes.
                    Some(stride) if limits.len() < PACK_VALUES && head_dim.is_multiple_of(16) => {
                        (chunk.values[0], stride)
                    }
                    _ => {
                        // SAFETY: as above.
                        unsafe { pack_rows(&chunk.values[..count], head_dim, values) };
                        (values.as_ptr(), width)
                    }
                };
                let product = Product {
                    a: scores.as_ptr(),
                    a_row: CHUNK,
                    b: values,
                    b_row: values_row,
                    c: out[from * width..].as_mut_ptr(),
                    c_row: width,
                    cols: head_dim,
                    depth: Depth::Rows(limits.as_ptr()),
                    end: End::Merge {
                        old: old[from..].as_ptr(),
                        new: new[from..].as_ptr(),
                    },
                    ..product
                };
                // SAFETY: as above, and a chunk of pages has whole rows of values, `stride` apart.
                unsafe { product.run(level) };
            }
            for (line, out) in out.chunks_exact_mut(width).take(lines).enumerate() {
                let scale = 1.0 / sum[line];
                out.iter_mut().for_each(|out| *out *= scale);
                max[line] += sum[line].ln();
            }
            write(out, max);
        });
    }
}

/// Probabilities of a chunk, and the merge of its state with that of the chunks before. All arrays
/// hold a value a line, with room for a whole vector from the last line on.
struct Softmax<'a> {
    scale: f32,
    limits: &'a [usize],
    /// Raw scores, `CHUNK` apart; in the end `exp(scale * score - chunk_max)`.
    scores: &'a mut [f32],
    chunk_max: &'a mut [f32],
    chunk_sum: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// What the values of the chunks before are multiplied by.
    old: &'a mut [f32],
    /// What the values of this chunk are multiplied by.
    new: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let lines = self.limits.len();
        for (line, row) in self.scores.chunks_exact_mut(CHUNK).take(lines).enumerate() {
            // SAFETY: inside of `dispatch`; a row has `CHUNK` values.
            let state = unsafe { softmax::<S>(row.as_mut_ptr(), self.limits[line], self.scale) };
            (self.chunk_max[line], self.chunk_sum[line]) = state;
        }
        for at in (0..lines).step_by(S::LANES) {
            let (max, sum) = (self.max[at..].as_mut_ptr(), self.sum[at..].as_mut_ptr());
            // SAFETY: inside of `dispatch`; a vector from each line on lies inside of the arrays.
            unsafe {
                let (before, here) = (S::load(max), S::load(self.chunk_max[at..].as_ptr()));
                let both = before.max(here);
                let (old, new) = (before.sub(both).exp(), here.sub(both).exp());
                let here = S::load(self.chunk_sum[at..].as_ptr());
                both.store(max);
                here.fma(new, S::load(sum).mul(old)).store(sum);
                old.store(self.old[at..].as_mut_ptr());
                new.store(self.new[at..].as_mut_ptr());
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
