//! What all passes of attention share: a product of small matrices with the tile of the result in
//! registers, the packing of its operands, and scratch memory.
//!
//! Every element of a product is one chain of fused multiply-adds over the inner dimension, from 0
//! up, so that its bits do not depend on the shape of the tile that it falls in.

use super::super::Level;
use super::super::simd::{Kernel, Simd};
use super::CHUNK;
use std::cell::RefCell;

/// Rows of a register tile.
const TILE: usize = 6;

/// What becomes of a tile of the product `t`.
#[derive(Clone, Copy)]
pub(super) enum End {
    /// `c = t`.
    Set,
    /// `c = c + t`.
    Add,
    /// `c = c * old[row] + t * new[row]`.
    Merge { old: *const f32, new: *const f32 },
}

/// How far the inner dimension goes.
#[derive(Clone, Copy)]
pub(super) enum Depth {
    /// As far for all rows.
    All(usize),
    /// For every row its own, never falling from row to row.
    Rows(*const usize),
}

/// `c[rows, cols] = a[rows, depth] b[depth, cols]`. Columns are rounded up to whole vectors: rows
/// of `b` and `c` must be long enough.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub a: *const f32,
    /// From a row of `a` to the next.
    pub a_row: usize,
    /// From an inner index of `a` to the next.
    pub a_step: usize,
    pub b: *const f32,
    /// From a row of `b` to the next.
    pub b_row: usize,
    pub c: *mut f32,
    /// From a row of `c` to the next.
    pub c_row: usize,
    pub rows: usize,
    pub cols: usize,
    pub depth: Depth,
    pub end: End,
}

impl Product {
    /// Computes it.
    ///
    /// # Safety
    /// All pointers are valid for the shape, and `c` lies apart from the others.
    pub(super) unsafe fn run(self, level: Level) {
        level.dispatch(Tiles(self));
    }

    /// # Safety
    /// As `run`, inside of `Level::dispatch`.
    #[inline(always)]
    unsafe fn tiles<S: Simd>(self) {
        let mut row = 0;
        while row < self.rows {
            // SAFETY: the rows from `row` on exist.
            let done = unsafe {
                match self.rows - row {
                    1 => self.tile_rows::<S, 1>(row),
                    2 => self.tile_rows::<S, 2>(row),
                    3 => self.tile_rows::<S, 3>(row),
                    4 => self.tile_rows::<S, 4>(row),
                    5 => self.tile_rows::<S, 5>(row),
                    _ => self.tile_rows::<S, TILE>(row),
                }
            };
            row += done;
        }
    }

    /// `R` rows from `row` on. The tile is as wide as the registers allow: 16, or 32 where vectors
    /// have 4 or 16 lanes.
    #[inline(always)]
    unsafe fn tile_rows<S: Simd, const R: usize>(self, row: usize) -> usize {
        let end = self.cols.div_ceil(S::LANES);
        let mut at = 0;
        // SAFETY: by the caller; the columns up to `end` vectors exist.
        unsafe {
            if R <= 3 || S::LANES != 8 {
                while at + 4 <= end {
                    self.tile::<S, R, 4>(row, at * S::LANES);
                    at += 4;
                }
            }
            while at + 2 <= end {
                self.tile::<S, R, 2>(row, at * S::LANES);
                at += 2;
            }
            if at < end {
                self.tile::<S, R, 1>(row, at * S::LANES);
            }
        }
        R
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(self, row: usize, col: usize) {
        // SAFETY: by the caller, rows `row .. row + R` and columns `col .. col + V * LANES` exist.
        unsafe {
            let mut acc = [[S::zero(); V]; R];
            let mut a = self.a.add(row * self.a_row);
            let mut b = self.b.add(col);
            let mut limits = [0; R];
            match self.depth {
                Depth::All(depth) => limits = [depth; R],
                Depth::Rows(of) => {
                    for (r, limit) in limits.iter_mut().enumerate() {
                        *limit = *of.add(row + r);
                    }
                }
            }
            for _ in 0..limits[0] {
                // The fewer of the two operands are held, so that 16 registers do.
                if R < V {
                    let mut left = [S::zero(); R];
                    for (r, left) in left.iter_mut().enumerate() {
                        *left = S::splat(*a.add(r * self.a_row));
                    }
                    for v in 0..V {
                        let right = S::load(b.add(v * S::LANES));
                        for (left, acc) in left.iter().zip(&mut acc) {
                            acc[v] = left.fma(right, acc[v]);
                        }
                    }
                } else {
                    let mut right = [S::zero(); V];
                    for (v, right) in right.iter_mut().enumerate() {
                        *right = S::load(b.add(v * S::LANES));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let left = S::splat(*a.add(r * self.a_row));
                        for v in 0..V {
                            acc[v] = left.fma(right[v], acc[v]);
                        }
                    }
                }
                a = a.add(self.a_step);
                b = b.add(self.b_row);
            }
            // The steps that only later rows take.
            for k in limits[0]..limits[R - 1] {
                for (r, acc) in acc.iter_mut().enumerate() {
                    if k < limits[r] {
                        let left = S::splat(*a.add(r * self.a_row));
                        for (v, acc) in acc.iter_mut().enumerate() {
                            *acc = left.fma(S::load(b.add(v * S::LANES)), *acc);
                        }
                    }
                }
                a = a.add(self.a_step);
                b = b.add(self.b_row);
            }
            for (r, acc) in acc.iter().enumerate() {
                let c = self.c.add((row + r) * self.c_row + col);
                for (v, &t) in acc.iter().enumerate() {
                    let c = c.add(v * S::LANES);
                    let value = match self.end {
                        End::Set => t,
                        End::Add => S::load(c).add(t),
                        End::Merge { old, new } => {
                            let (old, new) = (*old.add(row + r), *new.add(row + r));
                            t.fma(S::splat(new), S::load(c).mul(S::splat(old)))
                        }
                    };
                    value.store(c);
                }
            }
        }
    }
}

/// A valid product.
struct Tiles(Product);

impl Kernel for Tiles {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: inside of `dispatch`; only `Product::run` makes this, of a valid product.
        unsafe { self.0.tiles::<S>() }
    }
}

/// Width of a row of `head_dim` values in scratch memory: whole vectors of any level.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Writes the columns of `[rows.len(), head_dim]`: `dst[d * CHUNK + i] = rows[i][d]`.
///
/// # Safety
/// Each row is readable for `head_dim` values.
pub(super) unsafe fn pack_columns(
    level: Level,
    rows: &[*const f32],
    head_dim: usize,
    dst: &mut [f32],
) {
    assert!(rows.len() <= CHUNK && dst.len() >= head_dim * CHUNK);
    level.dispatch(PackColumns {
        rows,
        head_dim,
        dst,
    });
}

struct PackColumns<'a> {
    rows: &'a [*const f32],
    head_dim: usize,
    dst: &'a mut [f32],
}

impl Kernel for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let Self { rows, head_dim, .. } = self;
        let whole_rows = rows.len() - rows.len() % S::LANES;
        let whole_dims = head_dim - head_dim % S::LANES;
        let dst = self.dst.as_mut_ptr();
        // SAFETY: inside of `dispatch`, by `pack_columns`, whose caller vouches for the rows;
        // squares lie inside of rows and `dst`, the rest is done one by one.
        unsafe {
            for i in (0..whole_rows).step_by(S::LANES) {
                for d in (0..whole_dims).step_by(S::LANES) {
                    S::transpose(rows.as_ptr().add(i), d, dst.add(d * CHUNK + i), CHUNK);
                }
            }
            for (i, &row) in rows.iter().enumerate() {
                let done = if i < whole_rows { whole_dims } else { 0 };
                for d in done..head_dim {
                    *dst.add(d * CHUNK + i) = *row.add(d);
                }
            }
        }
    }
}

/// Copies rows of `head_dim` values to rows of `padded(head_dim)`; the padding becomes 0.
///
/// # Safety
/// Each row is readable for `head_dim` values.
pub(super) unsafe fn pack_rows(rows: &[*const f32], head_dim: usize, dst: &mut [f32]) {
    assert!(dst.len() >= rows.len() * padded(head_dim));
    for (&row, dst) in rows.iter().zip(dst.chunks_exact_mut(padded(head_dim))) {
        // SAFETY: by the caller.
        let row = unsafe { std::slice::from_raw_parts(row, head_dim) };
        dst[..head_dim].copy_from_slice(row);
        dst[head_dim..].fill(0.0);
    }
}

/// A cache line, so that vectors in scratch memory do not straddle two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Lends runs of scratch memory of at least `sizes`, of arbitrary content, kept by the thread from
/// call to call.
pub(super) fn with_scratch<const N: usize, T>(
    sizes: [usize; N],
    body: impl FnOnce([&mut [f32]; N]) -> T,
) -> T {
    thread_local! {
        static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let lines = sizes.map(|n| n.div_ceil(16));
    let mut memory = LINES.take();
    if memory.len() < lines.iter().sum() {
        memory.resize(lines.iter().sum(), Line([0.0; 16]));
    }
    let mut rest = &mut memory[..];
    let runs = lines.map(|n| {
        let (run, more) = std::mem::take(&mut rest).split_at_mut(n);
        rest = more;
        // SAFETY: a Line is 16 values without padding.
        unsafe { std::slice::from_raw_parts_mut(run.as_mut_ptr().cast::<f32>(), 16 * n) }
    });
    let result = body(runs);
    LINES.set(memory);
    result
}
