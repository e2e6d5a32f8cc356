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
use super::forward::Block;
use super::tile::{Depth, End, Product, pack_columns, pack_rows, padded, with_scratch};
use crate::attention::{CHUNK, Heads};

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
    ///
    /// # Safety
    /// Inside of `Level::dispatch`; the scratch memory is large enough for the block.
    #[inline(always)]
    unsafe fn load(&mut self, block: &Block, gradients: &Gradients) {
        // SAFETY: both check that their rows lie inside of their buffers.
        unsafe {
            pack_rows(&block.queries(), block.heads.head_dim, self.queries);
            pack_rows(&gradients.douts(block), block.heads.head_dim, self.douts);
        }
    }

    /// Fills `p` and `ds` of the block's lines and `count` keys; 0 from each line's limit on.
    ///
    /// # Safety
    /// As for `load`, which was called, and `keys` and `values` hold the chunk.
    #[inline(always)]
    unsafe fn compute<S: Simd>(
        &mut self,
        block: &Block,
        gradients: &Gradients,
        count: usize,
        limits: &[usize],
    ) {
        let width = padded(block.heads.head_dim);
        let (p, ds) = (self.p.as_mut_ptr(), self.ds.as_mut_ptr());
        let product = Product {
            a: self.queries.as_ptr(),
            a_row: width,
            a_step: 1,
            b: self.keys.as_ptr(),
            b_row: CHUNK,
            c: p,
            c_row: CHUNK,
            rows: block.lines(),
            cols: count,
            depth: Depth::All(block.heads.head_dim),
            end: End::Set,
        };
        // SAFETY: by the caller; a line's row holds `CHUNK` values, a multiple of the lanes.
        unsafe {
            product.run::<S>();
            Product {
                a: self.douts.as_ptr(),
                b: self.values.as_ptr(),
                c: ds,
                ..product
            }
            .run::<S>();
            let scale = S::splat(block.scale);
            for ((line, at), &limit) in gradients.by_line(block).enumerate().zip(limits) {
                let lse = S::splat(gradients.lse[at]);
                let delta = S::splat(gradients.delta[at]);
                let (p, ds) = (p.add(line * CHUNK), ds.add(line * CHUNK));
                for key in (0..limit).step_by(S::LANES) {
                    let (p, ds) = (p.add(key), ds.add(key));
                    let probability = S::load(p).mul(scale).sub(lse).exp();
                    probability.store(p);
                    let ds_here = S::load(ds).sub(delta).mul(probability).mul(scale);
                    ds_here.store(ds);
                }
                for key in limit..count {
                    *p.add(key) = 0.0;
                    *ds.add(key) = 0.0;
                }
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
            level.dispatch(QueryGradient {
                block,
                gradients,
                scores: Scores {
                    queries,
                    douts,
                    keys,
                    values,
                    p,
                    ds,
                },
                key_rows,
                dq,
            });
            write(dq);
        },
    );
}

struct QueryGradient<'a> {
    block: Block<'a>,
    gradients: Gradients<'a>,
    scores: Scores<'a>,
    key_rows: &'a mut [f32],
    dq: &'a mut [f32],
}

impl Kernel for QueryGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let Self { block, .. } = self;
        let head_dim = block.heads.head_dim;
        let width = padded(head_dim);
        let mut limits = vec![0; block.lines()];
        // SAFETY: inside of `dispatch`; `query_gradient` sized the scratch memory for the block.
        unsafe {
            self.dq.fill(0.0);
            self.scores.load(&block, &self.gradients);
            for first in (0..block.context()).step_by(CHUNK) {
                let count = CHUNK.min(block.context() - first);
                block.limits(first, &mut limits);
                let chunk = block.keys.chunk(first, count);
                pack_columns::<S>(&chunk.keys[..count], head_dim, self.scores.keys);
                pack_columns::<S>(&chunk.values[..count], head_dim, self.scores.values);
                pack_rows(&chunk.keys[..count], head_dim, self.key_rows);
                self.scores
                    .compute::<S>(&block, &self.gradients, count, &limits);
                Product {
                    a: self.scores.ds.as_ptr(),
                    a_row: CHUNK,
                    a_step: 1,
                    b: self.key_rows.as_ptr(),
                    b_row: width,
                    c: self.dq.as_mut_ptr(),
                    c_row: width,
                    rows: block.lines(),
                    cols: head_dim,
                    depth: Depth::Rows(limits.as_ptr()),
                    end: End::Add,
                }
                .run::<S>();
            }
        }
    }
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
pub(super) fn key_gradient<'a>(
    level: Level,
    model: Block<'a>,
    gradients: Gradients<'a>,
    first: usize,
    count: usize,
    readers: &[Reader],
    write: impl FnOnce(&[f32], &[f32]),
) {
    let head_dim = model.heads.head_dim;
    let width = padded(head_dim);
    let lines = super::forward::block_rows(model.heads) * model.heads.group();
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
        level.dispatch(KeyGradient {
            model,
            gradients,
            first,
            count,
            readers,
            scores: Scores {
                queries,
                douts,
                keys,
                values,
                p,
                ds,
            },
            dk,
            dv,
        });
        write(dk, dv);
    });
}

struct KeyGradient<'a, 'b> {
    model: Block<'a>,
    gradients: Gradients<'a>,
    first: usize,
    count: usize,
    readers: &'b [Reader],
    scores: Scores<'b>,
    dk: &'b mut [f32],
    dv: &'b mut [f32],
}

impl Kernel for KeyGradient<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let heads = self.model.heads;
        let group = heads.group();
        let width = padded(heads.head_dim);
        let chunk = self.model.keys.chunk(self.first, self.count);
        let mut limits = Vec::new();
        // SAFETY: inside of `dispatch`; `key_gradient` sized the scratch memory for blocks of
        // `block_rows` rows and `CHUNK` keys.
        unsafe {
            self.dk.fill(0.0);
            self.dv.fill(0.0);
            pack_columns::<S>(&chunk.keys[..self.count], heads.head_dim, self.scores.keys);
            pack_columns::<S>(
                &chunk.values[..self.count],
                heads.head_dim,
                self.scores.values,
            );
            for reader in self.readers {
                let step = super::forward::block_rows(heads);
                for from in (0..reader.rows).step_by(step) {
                    let block = Block {
                        row: reader.row + from,
                        rows: step.min(reader.rows - from),
                        ..self.model
                    };
                    limits.clear();
                    limits.extend((0..block.lines()).map(|line| match reader.causal {
                        true => (from + line / group + 1).min(reader.keys),
                        false => reader.keys,
                    }));
                    self.scores.load(&block, &self.gradients);
                    self.scores
                        .compute::<S>(&block, &self.gradients, reader.keys, &limits);
                    let product = Product {
                        a: self.scores.ds.as_ptr(),
                        a_row: 1,
                        a_step: CHUNK,
                        b: self.scores.queries.as_ptr(),
                        b_row: width,
                        c: self.dk.as_mut_ptr(),
                        c_row: width,
                        rows: reader.keys,
                        cols: heads.head_dim,
                        depth: Depth::All(block.lines()),
                        end: End::Add,
                    };
                    product.run::<S>();
                    Product {
                        a: self.scores.p.as_ptr(),
                        b: self.scores.douts.as_ptr(),
                        c: self.dv.as_mut_ptr(),
                        ..product
                    }
                    .run::<S>();
                }
            }
        }
    }
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
