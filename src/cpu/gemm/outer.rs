//! `c = a b` or `c += a b` by outer products: the gradients of linear layers and of the head.
//!
//! A tile of `c` (6 x 16 with AVX2) stays in registers while the reduced dimension `k` passes: two
//! vectors of `b`, one broadcast of `a` for each row. `a` and `b` are packed so that both are read
//! in a row: a strip of `b` from L1, a block of `a` from L2.
//!
//! Every element of `c` is reduced in one order that depends on `k` alone: blocks of [`KC`] from 0,
//! each from a fresh accumulator, added from left to right. How `c` is cut into tasks does not
//! matter.

use super::Stored;
use super::dot::copy;
use crate::cpu::Cpu;
use crate::cpu::pool::SharedMut;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Kernel, Simd};

/// Block of the reduced dimension: a strip of b, 16 wide, is 16 KiB of L1.
pub(crate) const KC: usize = 256;
/// Rows of c in a task: a block of a is 144 KiB of L2. A multiple of all tiles' heights.
const MC: usize = 144;
/// Most columns of c in a task.
const NC: usize = 1024;

/// `c[m, n] (+)= a[m, k] b[k, n]`, with `a[i, p]` at `i * a_row + p * a_col`.
pub(crate) struct Product<'a, B> {
    pub a: &'a [f32],
    /// One of the two strides is 1.
    pub a_row: usize,
    pub a_col: usize,
    /// Row-major.
    pub b: &'a [B],
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Add to `c` rather than overwrite it.
    pub add: bool,
}

impl<B: Stored> Product<'_, B> {
    /// Computes into `c`, row-major, on all threads.
    pub(crate) fn write(&self, cpu: &Cpu, c: &mut [f32]) {
        let (m, n, k) = (self.m, self.n, self.k);
        if m == 0 || n == 0 {
            return;
        }
        let c = &mut c[..m * n];
        if k == 0 {
            if !self.add {
                c.fill(0.0);
            }
            return;
        }
        assert!(self.a_row == 1 || self.a_col == 1, "strides of a");
        let last = (m - 1) * self.a_row + (k - 1) * self.a_col;
        assert!(last < self.a.len(), "a is too short");
        assert!(k * n <= self.b.len(), "b is too short");
        let mc = m.div_ceil(m.div_ceil(MC)).next_multiple_of(12);
        let blocks_m = m.div_ceil(mc);
        // Narrower blocks where there would be too few tasks to share.
        let mut nc = n.div_ceil(n.div_ceil(NC));
        while blocks_m * n.div_ceil(nc) < 4 * cpu.threads() && nc > 128 {
            nc = nc.div_ceil(2);
        }
        let nc = nc.next_multiple_of(32);
        let blocks_n = n.div_ceil(nc);
        let c = SharedMut::new(c);
        cpu.pool.run(blocks_m * blocks_n, |task| {
            let (i, j) = (task / blocks_n * mc, task % blocks_n * nc);
            cpu.level.dispatch(Block {
                product: self,
                c,
                i,
                j,
                rows: mc.min(m - i),
                columns: nc.min(n - j),
            });
        });
    }
}

/// A task: rows `i ..` and columns `j ..` of c.
struct Block<'a, 'b, B> {
    product: &'a Product<'b, B>,
    c: SharedMut<f32>,
    i: usize,
    j: usize,
    rows: usize,
    columns: usize,
}

impl<B: Stored> Kernel for Block<'_, '_, B> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        // Accumulators, two vectors of b and a broadcast fill 16 or 32 registers.
        if S::REGISTERS >= 32 {
            self.tiles::<S, 12>();
        } else {
            self.tiles::<S, 6>();
        }
    }
}

impl<B: Stored> Block<'_, '_, B> {
    #[inline(always)]
    fn tiles<S: Simd, const MR: usize>(&self) {
        let p = self.product;
        let nr = 2 * S::LANES;
        let (rows, columns) = (
            self.rows.next_multiple_of(MR),
            self.columns.next_multiple_of(nr),
        );
        let mut packed = Scratch::new((rows + columns) * KC);
        let (a, b) = packed.split_at_mut(rows * KC);
        for k in (0..p.k).step_by(KC) {
            let depth = KC.min(p.k - k);
            self.pack_a::<MR>(a, k, depth);
            // SAFETY: inside of `dispatch`.
            unsafe { self.pack_b::<S>(b, k, depth) };
            for j in (0..self.columns).step_by(nr) {
                let b = &b[j * depth..][..nr * depth];
                for i in (0..self.rows).step_by(MR) {
                    let a = &a[i * depth..][..MR * depth];
                    // SAFETY: inside of `dispatch`; the strips hold `depth` steps.
                    let tile = unsafe { tile::<S, MR>(a.as_ptr(), b.as_ptr(), depth) };
                    for (r, tile) in tile.into_iter().enumerate().take(self.rows - i) {
                        let width = nr.min(self.columns - j);
                        let at = (self.i + i + r) * p.n + self.j + j;
                        // SAFETY: no other task has these rows and columns of c.
                        let c = unsafe { self.c.slice(at, width) };
                        // SAFETY: inside of `dispatch`.
                        unsafe { put(c, tile, p.add || k > 0) };
                    }
                }
            }
        }
    }

    /// Strips of `MR` rows, `[k][MR]`, padded with zeros.
    #[inline(always)]
    fn pack_a<const MR: usize>(&self, packed: &mut [f32], k: usize, depth: usize) {
        let p = self.product;
        for (s, strip) in packed.chunks_exact_mut(MR * depth).enumerate() {
            let i = s * MR;
            if i >= self.rows {
                break;
            }
            let start = (self.i + i) * p.a_row + k * p.a_col;
            let height = MR.min(self.rows - i);
            if height < MR {
                for (q, to) in strip.chunks_exact_mut(MR).enumerate() {
                    to[height..].fill(0.0);
                    for (r, to) in to[..height].iter_mut().enumerate() {
                        *to = p.a[start + r * p.a_row + q * p.a_col];
                    }
                }
            } else if p.a_row == 1 {
                for (q, to) in strip.chunks_exact_mut(MR).enumerate() {
                    to.copy_from_slice(&p.a[start + q * p.a_col..][..MR]);
                }
            } else {
                let rows: [&[f32]; MR] =
                    std::array::from_fn(|r| &p.a[start + r * p.a_row..][..depth]);
                for (q, to) in strip.chunks_exact_mut(MR).enumerate() {
                    for (to, row) in to.iter_mut().zip(rows) {
                        *to = row[q];
                    }
                }
            }
        }
    }

    /// Strips of two vectors, `[k][2 * LANES]`, widened, padded with zeros.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    unsafe fn pack_b<S: Simd>(&self, packed: &mut [f32], k: usize, depth: usize) {
        let p = self.product;
        let nr = 2 * S::LANES;
        // Along the rows of b, which is how they lie in memory.
        for q in 0..depth {
            for j in (0..self.columns).step_by(nr) {
                let width = nr.min(self.columns - j);
                let from = &p.b[(k + q) * p.n + self.j + j..][..width];
                let to = &mut packed[j * depth + q * nr..][..nr];
                to[width..].fill(0.0);
                // SAFETY: both slices hold `width` values.
                unsafe { copy::<S, B>(from.as_ptr(), to.as_mut_ptr(), width) };
            }
        }
    }
}

/// The product of two strips.
///
/// # Safety
/// As [`Simd`]; `a` holds `depth * MR` values and `b` `depth * 2 * LANES`.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize>(
    mut a: *const f32,
    mut b: *const f32,
    depth: usize,
) -> [[S; 2]; MR] {
    // SAFETY: by the caller.
    unsafe {
        let mut acc = [[S::zero(); 2]; MR];
        for _ in 0..depth {
            let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = S::splat(*a.add(r));
                acc[0] = a.fma(b0, acc[0]);
                acc[1] = a.fma(b1, acc[1]);
            }
            a = a.add(MR);
            b = b.add(2 * S::LANES);
        }
        acc
    }
}

/// Writes a row of a tile to `c`, or adds it.
///
/// # Safety
/// As [`Simd`]; `c` is at most two vectors long.
#[inline(always)]
unsafe fn put<S: Simd>(c: &mut [f32], tile: [S; 2], add: bool) {
    for (c, v) in c.chunks_mut(S::LANES).zip(tile) {
        let (p, len) = (c.as_mut_ptr(), c.len());
        // SAFETY: `c` has `len` values.
        unsafe {
            if len == S::LANES {
                (if add { S::load(p).add(v) } else { v }).store(p);
            } else {
                let v = if add {
                    S::load_part(p, len, 0.0).add(v)
                } else {
                    v
                };
                v.store_part(p, len);
            }
        }
    }
}
