//! `y = x wᵀ` by dot products: the forward product of linear layers and of the head.
//!
//! Every element of `y` is reduced in one order that depends on `inputs` alone: `inputs` is cut into
//! equal chunks of at most 1024; in a chunk one vector accumulates fused products from its start on
//! (the tail padded with zeros) and is summed by [`Simd::sum`]; the chunks' sums are added from left
//! to right. So a row has the same bits alone (decode, at the speed of memory) and among thousands
//! (prefill and training, at the speed of the multipliers): only the tile around the accumulator
//! differs. Chunks keep a tile's rows in the L1 cache, and errors small.
//!
//! Weights in bf16 are widened as they are read where rows are few, and once a panel where they are
//! many.

use super::Stored;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Kernel, Level, Simd, prefetch};

/// Most inputs that one vector accumulates: 4 rows of x and 3 of w are 28 KiB of L1.
const CHUNK: usize = 1024;
/// Outputs whose weights are swept by all rows before the next: a chunk of them lies in L2 (192 KiB).
pub(crate) const PANEL: usize = 48;
/// The same where weights are read once or twice: whole tiles, near each other in memory.
const NARROW: usize = 12;
/// Up to here, the weights come from memory faster than the rows use them up.
const FEW: usize = 16;
/// From here on, a panel of bf16 is widened once rather than at each read.
const WIDEN: usize = 9;

/// `rows` x `outputs` dot products.
pub(crate) struct Dots<'a, W> {
    /// `[rows, inputs]`.
    pub x: &'a [f32],
    /// `[outputs, inputs]`.
    pub w: &'a [W],
    /// `[outputs]`.
    pub bias: Option<&'a [f32]>,
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
}

impl<W: Stored> Dots<'_, W> {
    /// Writes the products to `y[row * stride + output]`.
    ///
    /// # Safety
    /// `y` is valid for writes of `outputs` elements at each row, and nothing else accesses them.
    pub(crate) unsafe fn write(&self, level: Level, y: *mut f32, stride: usize) {
        assert!(self.x.len() >= self.rows * self.inputs, "x is too short");
        assert!(self.w.len() >= self.outputs * self.inputs, "w is too short");
        assert!(self.bias.is_none_or(|b| b.len() >= self.outputs), "bias");
        level.dispatch(Write {
            dots: self,
            y,
            stride,
        });
    }
}

struct Write<'a, 'b, W> {
    dots: &'a Dots<'b, W>,
    y: *mut f32,
    stride: usize,
}

impl<W: Stored> Kernel for Write<'_, '_, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let d = self.dots;
        let widen = W::WIDENS && d.rows >= WIDEN;
        let panel = if d.rows < WIDEN { NARROW } else { PANEL };
        let chunk = d
            .inputs
            .div_ceil(d.inputs.div_ceil(CHUNK).max(1))
            .next_multiple_of(16)
            .max(1);
        // One more line than the chunk: rows of a panel must not fall on the same cache sets.
        let padded = chunk + 16;
        let mut out = Out {
            y: self.y,
            stride: self.stride,
            add: false,
        };
        let mut wide = Scratch::new(if widen { PANEL * padded } else { 0 });
        for o in (0..d.outputs).step_by(panel) {
            let outputs = panel.min(d.outputs - o);
            // SAFETY: column `o` is inside of the rows of `y`.
            out.y = unsafe { self.y.add(o) };
            for k in (0..d.inputs.max(1)).step_by(chunk) {
                let len = chunk.min(d.inputs - k);
                out.add = k > 0;
                // SAFETY: inside of `dispatch`; all of the panel's rows and columns are inside of
                // `x`, `w` and `y`, as `write` checked or its caller promised.
                unsafe {
                    let x = d.x.as_ptr().add(k);
                    let w = d.w.as_ptr().add(o * d.inputs + k);
                    if widen {
                        for o in 0..outputs {
                            let to = wide[o * padded..][..len].as_mut_ptr();
                            copy::<S, W>(w.add(o * d.inputs), to, len);
                        }
                        let w = wide.as_ptr();
                        sweep::<S, f32>(x, d.inputs, w, padded, len, d.rows, outputs, false, out);
                    } else {
                        let fetch = d.rows <= FEW;
                        sweep::<S, W>(x, d.inputs, w, d.inputs, len, d.rows, outputs, fetch, out);
                    }
                }
            }
            if let Some(bias) = d.bias {
                for r in 0..d.rows {
                    for (c, b) in bias[o..o + outputs].iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { *out.y.add(r * out.stride + c) += b };
                    }
                }
            }
        }
    }
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
struct Out {
    y: *mut f32,
    stride: usize,
    /// Add to what the chunks before have left there.
    add: bool,
}

impl Out {
    /// # Safety
    /// The element is inside of the rows and outputs.
    #[inline(always)]
    unsafe fn put(self, row: usize, output: usize, sum: f32) {
        // SAFETY: by the caller.
        unsafe {
            let y = self.y.add(row * self.stride + output);
            *y = if self.add { *y + sum } else { sum };
        }
    }
}

/// Widens `len` values.
///
/// # Safety
/// As [`Simd`]; `from` is readable and `to` writable for `len`.
#[inline(always)]
pub(super) unsafe fn copy<S: Simd, W: Stored>(from: *const W, to: *mut f32, len: usize) {
    // SAFETY: by the caller.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= len {
            W::load::<S>(from.add(i)).store(to.add(i));
            i += S::LANES;
        }
        if i < len {
            W::load_part::<S>(from.add(i), len - i).store_part(to.add(i), len - i);
        }
    }
}

/// All rows against all outputs of a panel, over one chunk. With `fetch`, eight rows at a time while
/// memory brings the weights.
///
/// # Safety
/// As [`Simd`]; `rows` rows of `x`, `outputs` rows of `w` and `rows` x `outputs` of `out` are valid.
#[inline(always)]
unsafe fn sweep<S: Simd, W: Stored>(
    x: *const f32,
    x_stride: usize,
    w: *const W,
    w_stride: usize,
    len: usize,
    rows: usize,
    outputs: usize,
    fetch: bool,
    out: Out,
) {
    // SAFETY: by the caller; every tile is inside of the rows and outputs.
    unsafe {
        let mut r = 0;
        // `$tiles` tiles of `$rows` rows read the same weights, the second time from L1.
        macro_rules! rows {
            ($tiles:literal, $rows:literal, $outputs:literal, $fetch:literal) => {{
                let mut o = 0;
                while o < outputs {
                    let whole = o + $outputs <= outputs;
                    for t in 0..$tiles {
                        let x = x.add((r + t * $rows) * x_stride);
                        let out = Out {
                            y: out.y.add((r + t * $rows) * out.stride),
                            ..out
                        };
                        if !whole {
                            tile::<S, W, $rows, 1, false>(x, x_stride, w, w_stride, len, out, o);
                        } else if $fetch && t == 0 {
                            tile::<S, W, $rows, $outputs, true>(
                                x, x_stride, w, w_stride, len, out, o,
                            );
                        } else {
                            tile::<S, W, $rows, $outputs, false>(
                                x, x_stride, w, w_stride, len, out, o,
                            );
                        }
                    }
                    o += if whole { $outputs } else { 1 };
                }
                r += $tiles * $rows;
            }};
        }
        // Accumulators, one vector of w each and one of x fill 16 or 32 registers.
        if S::REGISTERS >= 32 {
            while r + 8 <= rows {
                rows!(1, 8, 3, true);
            }
        } else if fetch {
            while r + 8 <= rows {
                rows!(2, 4, 3, true);
            }
        }
        while r + 4 <= rows {
            rows!(1, 4, 3, false);
        }
        match rows - r {
            3 => rows!(1, 3, 4, true),
            2 => rows!(1, 2, 4, true),
            1 => rows!(1, 1, 4, true),
            _ => {}
        }
        debug_assert_eq!(r, rows);
    }
}

/// The dot products of `R` rows and the outputs `o .. o + O`, over one chunk. With `FETCH`, memory is
/// asked for the weights of the next tile meanwhile: rows are too short for the processor to guess.
///
/// # Safety
/// As [`sweep`].
#[inline(always)]
unsafe fn tile<S: Simd, W: Stored, const R: usize, const O: usize, const FETCH: bool>(
    x: *const f32,
    x_stride: usize,
    w: *const W,
    w_stride: usize,
    len: usize,
    out: Out,
    o: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        let w = w.add(o * w_stride);
        let mut acc = [[S::zero(); O]; R];
        let mut i = 0;
        while i + S::LANES <= len {
            let mut wv = [S::zero(); O];
            for (c, wv) in wv.iter_mut().enumerate() {
                let w = w.add(c * w_stride + i);
                *wv = W::load::<S>(w);
                if FETCH {
                    prefetch(w.wrapping_add(O * w_stride));
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let xv = S::load(x.add(r * x_stride + i));
                for (acc, wv) in acc.iter_mut().zip(wv) {
                    *acc = xv.fma(wv, *acc);
                }
            }
            i += S::LANES;
        }
        if i < len {
            for (r, acc) in acc.iter_mut().enumerate() {
                let xv = S::load_part(x.add(r * x_stride + i), len - i, 0.0);
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = xv.fma(W::load_part::<S>(w.add(c * w_stride + i), len - i), *acc);
                }
            }
        }
        let mut n = 0;
        while n + 4 <= R * O {
            let sums = S::sum4([
                acc[n / O][n % O],
                acc[(n + 1) / O][(n + 1) % O],
                acc[(n + 2) / O][(n + 2) % O],
                acc[(n + 3) / O][(n + 3) % O],
            ]);
            for (i, sum) in sums.into_iter().enumerate() {
                out.put((n + i) / O, o + (n + i) % O, sum);
            }
            n += 4;
        }
        while n < R * O {
            out.put(n / O, o + n % O, acc[n / O][n % O].sum());
            n += 1;
        }
    }
}
