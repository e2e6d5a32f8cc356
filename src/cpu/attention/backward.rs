//! Backward pass, in two sweeps without atomics: by query block for `dq`, by key block for `dk` and
//! `dv`. Both recompute the probabilities from the log-sum-exp:
//! `p = exp(scale q.k - lse)`, `ds = scale p (dout.v - delta)`, `delta = dout.out`, then
//! `dq = ds k`, `dk = ds^T q`, `dv = p^T dout`.
//!
//! A key block is owned by one task, which goes through its readers in a fixed order: the rows of
//! its own segment, then those of the segments that have it as their prefix, in the order of the
//! segments. The recomputation of the scores for the second sweep (two of seven products) buys that
//! all tasks are independent.

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::CHUNK;
use super::forward::{Block, block_rows};
use super::tile::{Depth, End, Product, pack_columns, pack_rows, padded, with_scratch};
use crate::attention::Heads;

/// What a backward block reads beside queries, keys and values; all with a row for every packed row.
#[derive(Clone, Copy)]
pub(super) struct Gradients<'a> {
    pub dout: &'a [f32],
    pub lse: &'a [f32],
    pub delta: &'a [f32],
}

impl<'a> Gradients<'a> {
    /// Where the gradients of the outputs of every line of a block begin.
    fn douts(&self, block: &Block) -> Vec<*const f32> {
        let Heads { head_dim, .. } = block.heads;
        self.by_line(block)
            .map(|at| self.dout[at * head_dim..][..head_dim].as_ptr())
            .collect()
    }

    /// Index of every line of a block among all rows and heads.
    fn by_line(&self, block: &Block) -> impl Iterator<Item = usize> + use<> {
        let group = block.heads.group();
        let (row, heads) = (block.row, block.heads.q_heads);
        let head = block.kv_head * group;
        (0..block.lines()).map(move |line| (row + line / group) * heads + head + line % group)
    }
}

/// Scratch memory for the scores of a block against a chunk.
struct Scores<'a> {
    /// Queries, `padded(head_dim)` apart.
    queries: &'a mut [f32],
    douts: &'a mut [f32],
    /// The chunk's keys and values, transposed.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// Probabilities, `CHUNK` apart.
    p: &'a mut [f32],
    /// Gradients of the raw scores.
    ds: &'a mut [f32],
}

impl Scores<'_> {
    /// Packs the queries and output gradients of a block.
    fn load(&mut self, block: &Block, gradients: &Gradients) {
        let head_dim = block.heads.head_dim;
        // SAFETY: the pointers are to `head_dim` values.
        unsafe {
            pack_rows(&block.queries(), head_dim, self.queries);
            pack_rows(&gradients.douts(block), head_dim, self.douts);
        }
    }

    /// Fills `p` and `ds` of the block's lines, which `load` packed, and the first `count` of the
    /// packed keys; 0 from each line's limit on.
    fn compute(
        &mut self,
        level: Level,
        block: &Block,
        gradients: &Gradients,
        count: usize,
        limits: &[usize],
    ) {
        let width = padded(block.heads.head_dim);
        let product = Product {
            a: self.queries.as_ptr(),
            a_row: width,
            a_step: 1,
            b: self.keys.as_ptr(),
            b_row: CHUNK,
            c: self.p.as_mut_ptr(),
            c_row: CHUNK,
            rows: block.lines(),
            cols: count,
            depth: Depth::All(block.heads.head_dim),
            end: End::Set,
        };
        let output_product = Product {
            a: self.douts.as_ptr(),
            b: self.values.as_ptr(),
            c: self.ds.as_mut_ptr(),
            ..product
        };
        // SAFETY: the scratch memory is that large, in separate runs.
        unsafe {
            product.run(level);
            output_product.run(level);
        }
        level.dispatch(Differentiate {
            block,
            gradients,
            count,
            limits,
            p: self.p,
            ds: self.ds,
        });
    }
}

/// Turns raw scores into `p` and `dout.v` into `ds`, in place.
struct Differentiate<'a> {
    block: &'a Block<'a>,
    gradients: &'a Gradients<'a>,
    count: usize,
    limits: &'a [usize],
    p: &'a mut [f32],
    ds: &'a mut [f32],
}

impl Kernel for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let lines = self.gradients.by_line(self.block).zip(self.limits);
        let rows = self.p.chunks_exact_mut(CHUNK);
        let rows = rows.zip(self.ds.chunks_exact_mut(CHUNK));
        for ((at, &limit), (p_row, ds_row)) in lines.zip(rows) {
            // SAFETY: inside of `dispatch`; rows hold `CHUNK` values, a multiple of the lanes.
            unsafe {
                let scale = S::splat(self.block.scale);
                let lse = S::splat(self.gradients.lse[at]);
                let delta = S::splat(self.gradients.delta[at]);
                for key in (0..limit).step_by(S::LANES) {
                    let (p, ds) = (p_row.as_mut_ptr().add(key), ds_row.as_mut_ptr().add(key));
                    let probability = S::load(p).mul(scale).sub(lse).exp();
                    probability.store(p);
                    let gradient = S::load(ds).sub(delta).mul(probability).mul(scale);
                    gradient.store(ds);
                }
            }
            if limit < self.count {
                p_row[limit..self.count].fill(0.0);
                ds_row[limit..self.count].fill(0.0);
            }
        }
    }
}

/// The gradient of the queries of a block.
pub(super) fn query_gradient(
    level: Level,
    block: Block,
    gradients: Gradients,
    write: impl FnOnce(&[f32]),
) {
    let (head_dim, lines) = (block.heads.head_dim, block.lines());
    let width = padded(head_dim);
    let sizes = [
        lines * width,
        lines * width,
        head_dim * CHUNK,
        head_dim * CHUNK,
        lines * CHUNK,
        lines * CHUNK,
        CHUNK * width,
        lines * width,
    ];
    with_scratch(
        sizes,
        |[queries, douts, keys, values, p, ds, key_rows, dq]| {
            let mut scores = Scores {
                queries,
                douts,
                keys,
                values,
                p,
                ds,
            };
            let mut limits = vec![0; lines];
            dq.fill(0.0);
            scores.load(&block, &gradients);
            for first in (0..block.context()).step_by(CHUNK) {
                let count = CHUNK.min(block.context() - first);
                block.limits(first, &mut limits);
                let chunk = block.keys.chunk(first, count);
                // SAFETY: the chunk's pointers are to `head_dim` values.
                unsafe {
                    pack_columns(level, &chunk.keys[..count], head_dim, scores.keys);
                    pack_columns(level, &chunk.values[..count], head_dim, scores.values);
                    pack_rows(&chunk.keys[..count], head_dim, key_rows);
                }
                scores.compute(level, &block, &gradients, count, &limits);
                let product = Product {
                    a: scores.ds.as_ptr(),
                    a_row: CHUNK,
                    a_step: 1,
                    b: key_rows.as_ptr(),
                    b_row: width,
                    c: dq.as_mut_ptr(),
                    c_row: width,
                    rows: lines,
                    cols: head_dim,
                    depth: Depth::Rows(limits.as_ptr()),
                    end: End::Add,
                };
                // SAFETY: the scratch memory is that large, in separate runs.
                unsafe { product.run(level) };
            }
            write(dq);
        },
    );
}

/// One reader of a key block: query rows, and how many of the block's keys the first of them sees.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    /// First packed row.
    pub row: usize,
    pub rows: usize,
    /// Whether row `i` sees keys up to `i` of the block; else all rows see `keys`.
    pub causal: bool,
    /// The greatest number of keys that a row sees.
    pub keys: usize,
}

/// The gradients of `count` keys and values: those whose positions in `keys` begin at `first`.
pub(super) fn key_gradient(
    level: Level,
    model: Block,
    gradients: Gradients,
    first: usize,
    count: usize,
    readers: &[Reader],
    write: impl FnOnce(&[f32], &[f32]),
) {
    let head_dim = model.heads.head_dim;
    let width = padded(head_dim);
    let step = block_rows(model.heads);
    let lines = step * model.heads.group();
    let sizes = [
        lines * width,
        lines * width,
        head_dim * CHUNK,
        head_dim * CHUNK,
        lines * CHUNK,
        lines * CHUNK,
        CHUNK * width,
        CHUNK * width,
    ];
    with_scratch(sizes, |[queries, douts, keys, values, p, ds, dk, dv]| {
        let mut scores = Scores {
            queries,
            douts,
            keys,
            values,
            p,
            ds,
        };
        let mut limits = Vec::new();
        let chunk = model.keys.chunk(first, count);
        dk.fill(0.0);
        dv.fill(0.0);
        // SAFETY: the chunk's pointers are to `head_dim` values.
        unsafe {
            pack_columns(level, &chunk.keys[..count], head_dim, scores.keys);
            pack_columns(level, &chunk.values[..count], head_dim, scores.values);
        }
        for reader in readers {
            for from in (0..reader.rows).step_by(step) {
                let block = Block {
                    row: reader.row + from,
                    rows: step.min(reader.rows - from),
                    ..model
                };
                limits.clear();
                limits.extend((0..block.lines()).map(|line| match reader.causal {
                    true => (from + line / model.heads.group() + 1).min(reader.keys),
                    false => reader.keys,
                }));
                scores.load(&block, &gradients);
                scores.compute(level, &block, &gradients, reader.keys, &limits);
                let keys_product = Product {
                    a: scores.ds.as_ptr(),
                    a_row: 1,
                    a_step: CHUNK,
                    b: scores.queries.as_ptr(),
                    b_row: width,
                    c: dk.as_mut_ptr(),
                    c_row: width,
                    rows: reader.keys,
                    cols: head_dim,
                    depth: Depth::All(block.lines()),
                    end: End::Add,
                };
                let values_product = Product {
                    a: scores.p.as_ptr(),
                    b: scores.douts.as_ptr(),
                    c: dv.as_mut_ptr(),
                    ..keys_product
                };
                // SAFETY: the scratch memory is that large, in separate runs.
                unsafe {
                    keys_product.run(level);
                    values_product.run(level);
                }
            }
        }
        write(dk, dv);
    });
}

/// `delta[i] = dout[i] . out[i]` over runs of `head_dim`.
pub(super) struct RowDots<'a> {
    pub head_dim: usize,
    pub dout: &'a [f32],
    pub out: &'a [f32],
    pub delta: &'a mut [f32],
}

impl Kernel for RowDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let whole = self.head_dim - self.head_dim % S::LANES;
        let rows = self.dout.chunks_exact(self.head_dim);
        let outs = self.out.chunks_exact(self.head_dim);
        for ((dout, out), delta) in rows.zip(outs).zip(self.delta) {
            let (dout, out) = (dout.as_ptr(), out.as_ptr());
            // SAFETY: inside of `dispatch`; both runs have `head_dim` values.
            unsafe {
                let mut sum = S::zero();
                for at in (0..whole).step_by(S::LANES) {
                    sum = S::load(dout.add(at)).fma(S::load(out.add(at)), sum);
                }
                if whole < self.head_dim {
                    let rest = self.head_dim - whole;
                    let (dout, out) = (dout.add(whole), out.add(whole));
                    sum = S::load_part(dout, rest, 0.0).fma(S::load_part(out, rest, 0.0), sum);
                }
                *delta = sum.sum();
            }
        }
    }
}
