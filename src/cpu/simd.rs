//! Vectors of f32, one type a SIMD level, chosen at run time.
//!
//! A kernel is a [`Kernel`]: a struct of its arguments with a generic `run`. [`Level::dispatch`]
//! compiles it once for every level inside of a function that has the level's instructions switched
//! on. `run` and everything it calls must be `#[inline(always)]`, or it loses them; that includes
//! closures.
//!
//! Results have the same bits on every machine of one level, but levels differ: the number of lanes
//! is part of the order of a sum, and the portable level has no fused multiply-add.

use half::bf16;
use std::fmt;

/// A SIMD level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Plain arrays of 8; whatever the compiler makes of them.
    Portable,
    /// 8 lanes with fused multiply-add.
    Avx2,
    /// 16 lanes with fused multiply-add.
    Avx512,
    /// 4 lanes with fused multiply-add.
    Neon,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Portable => "portable code",
            Level::Avx2 => "AVX2",
            Level::Avx512 => "AVX-512",
            Level::Neon => "NEON",
        })
    }
}

impl Level {
    /// The widest level of this machine.
    pub fn detect() -> Self {
        [Level::Avx512, Level::Avx2, Level::Neon]
            .into_iter()
            .find(|l| l.available())
            .unwrap_or(Level::Portable)
    }

    /// Whether this machine has the level.
    pub fn available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "aarch64")]
            Level::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Runs a kernel with this level's vectors. The level must be available, which
    /// [`super::Cpu`] sees to.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu` holds only levels that `available` affirmed.
            Level::Avx2 => unsafe { x86::avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { x86::avx512(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of the base of this architecture.
            Level::Neon => unsafe { arm::neon(kernel) },
            _ => kernel.run::<Portable>(),
        }
    }
}

/// Asks for the cache line of `p`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE is part of the base of this architecture.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// A function that is generic over the SIMD level.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// The body; mark it `#[inline(always)]`.
    fn run<S: Simd>(self) -> Self::Output;
}

/// A vector of f32 of one level.
///
/// # Safety contract of the methods
/// All of them are `unsafe`: the level's instructions must be available (they are inside of
/// [`Level::dispatch`]), and pointers must be valid for the lanes they name.
pub(crate) trait Simd: Copy {
    /// Lanes of a vector.
    const LANES: usize;
    /// Vectors that the processor can name at once.
    const REGISTERS: usize;
    /// All lanes equal.
    unsafe fn splat(x: f32) -> Self;
    /// Reads `LANES` values.
    unsafe fn load(p: *const f32) -> Self;
    /// Reads `LANES` values of bf16 and widens them.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// Writes `LANES` values.
    unsafe fn store(self, p: *mut f32);
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`.
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self / b`.
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once where the level can.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The greater of each lane; `b` where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The lesser of each lane; `b` where either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// To the nearest whole number, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for whole numbers from -126 to 127.
    unsafe fn exp2_whole(self) -> Self;
    /// Square root.
    unsafe fn sqrt(self) -> Self;

    /// Zero.
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: by the caller.
        unsafe { Self::splat(0.0) }
    }

    /// Sum of the lanes by halving: lane `i` with lane `i + LANES / 2`, and so on.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut a = [0.0f32; 16];
        // SAFETY: the array has room for the widest vector.
        unsafe { self.store(a.as_mut_ptr()) };
        let mut n = Self::LANES;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                a[i] += a[i + n];
            }
        }
        a[0]
    }

    /// [`Simd::sum`] of four vectors, with the same bits.
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: by the caller.
        unsafe { [v[0].sum(), v[1].sum(), v[2].sum(), v[3].sum()] }
    }

    /// The greatest lane.
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        let mut a = [0.0f32; 16];
        // SAFETY: the array has room for the widest vector.
        unsafe { self.store(a.as_mut_ptr()) };
        let mut m = a[0];
        for &x in &a[1..Self::LANES] {
            m = if x > m { x } else { m };
        }
        m
    }

    /// `LANES` values of which only `n` are read; the others are `fill`.
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize, fill: f32) -> Self {
        let mut a = [fill; 16];
        // SAFETY: `n` values are readable by the caller's promise, and `n < LANES <= 16`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
            Self::load(a.as_ptr())
        }
    }

    /// As [`Simd::load_part`], from bf16, filled with 0.
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const bf16, n: usize) -> Self {
        let mut a = [bf16::ZERO; 16];
        // SAFETY: as in `load_part`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, a.as_mut_ptr(), n);
            Self::load_bf16(a.as_ptr())
        }
    }

    /// Writes the first `n` lanes.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        let mut a = [0.0f32; 16];
        // SAFETY: `n` values are writable by the caller's promise, and `n < LANES <= 16`.
        unsafe {
            self.store(a.as_mut_ptr());
            std::ptr::copy_nonoverlapping(a.as_ptr(), p, n);
        }
    }

    /// Transposes a square of `LANES`: `dst[j * stride + i] = rows[i][at + j]`.
    #[inline(always)]
    unsafe fn transpose(rows: *const *const f32, at: usize, dst: *mut f32, stride: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller's `LANES` rows are readable, and `dst` holds the square.
                unsafe { *dst.add(j * stride + i) = *(*rows.add(i)).add(at + j) }
            }
        }
    }

    /// `e^self` to about 1 ulp, NaN where it is NaN; 0 below -87.3 (also for negative infinity), the value at 88 above.
    ///
    /// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, ln 2 in two parts, then a polynomial of degree 6
    /// (the coefficients are those of Cephes' `expf`).
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: by the caller.
        unsafe {
            let low = Self::splat(-87.3);
            // The second operand of min and max is what a NaN comes through.
            let x = Self::splat(88.0).min(self);
            // 1 where x > low, else 0: kills what would need denormals.
            let keep = x
                .sub(low)
                .mul(Self::splat(f32::MAX))
                .max(Self::zero())
                .min(Self::splat(1.0));
            let x = low.max(x);
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let r = n.fma(Self::splat(-0.693_359_4), x);
            let r = n.fma(Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
                p = p.fma(r, Self::splat(c));
            }
            let y = p.fma(r.mul(r), r.add(Self::splat(1.0)));
            y.mul(n.exp2_whole()).mul(keep)
        }
    }
}

/// Eight lanes of plain code.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

macro_rules! lanes {
    ($a:ident, $b:ident, $e:expr) => {{
        let mut out = [0.0f32; 8];
        for i in 0..8 {
            let ($a, $b) = ($a.0[i], $b.0[i]);
            out[i] = $e;
        }
        Portable(out)
    }};
}

impl Simd for Portable {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by the caller.
        Portable(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: by the caller.
        let h = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        Portable(h.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: by the caller.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: no instructions beyond the base are used.
        unsafe { self.mul(b).add(c) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        let a = self;
        lanes!(a, b, if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Portable(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        Portable(
            self.0
                .map(|x| f32::from_bits((((x as i32) + 127) as u32) << 23)),
        )
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Portable(self.0.map(f32::sqrt))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Simd, bf16};
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// # Safety
    /// The machine has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx2>()
    }

    /// # Safety
    /// The machine has AVX-512 F, BW, DQ and VL, AVX2 and FMA.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx512>()
    }

    /// The tree of [`Simd::sum`] for four vectors side by side: 8 shuffles instead of 4 times 3.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sum4_avx2([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // Lane i + lane i + 4, of a and c, of b and d.
        let ac = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(a, c),
            _mm256_permute2f128_ps::<0x31>(a, c),
        );
        let bd = _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(b, d),
            _mm256_permute2f128_ps::<0x31>(b, d),
        );
        // Lane i + lane i + 2: two lanes each of a, b in the low half, of c, d in the high one.
        let (ac, bd) = (_mm256_castps_pd(ac), _mm256_castps_pd(bd));
        let abcd = _mm256_add_ps(
            _mm256_castpd_ps(_mm256_unpacklo_pd(ac, bd)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ac, bd)),
        );
        let (ab, cd) = (
            _mm256_castps256_ps128(abcd),
            _mm256_extractf128_ps::<1>(abcd),
        );
        let sums = _mm_add_ps(
            _mm_shuffle_ps::<0b10_00_10_00>(ab, cd),
            _mm_shuffle_ps::<0b11_01_11_01>(ab, cd),
        );
        let mut out = [0.0; 4];
        // SAFETY: the array has room for the four lanes.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }

    /// As [`sum4_avx2`], after lane i + lane i + 8.
    ///
    /// # Safety
    /// The machine has AVX-512 F and DQ, and AVX2.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    unsafe fn sum4_avx512([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: AVX2 is there.
        unsafe { sum4_avx2([halve(a), halve(b), halve(c), halve(d)]) }
    }

    /// # Safety
    /// The machine has AVX-512 F and DQ.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2")]
    unsafe fn halve(a: __m512) -> __m256 {
        _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
    }

    /// Four values of row `i` in the low lane and of row `i + 4` in the high one.
    ///
    /// # Safety
    /// Both rows are readable for 4 values from `at` on, and the machine has AVX.
    #[inline(always)]
    unsafe fn pair(rows: *const *const f32, i: usize, at: usize) -> __m256 {
        // SAFETY: by the caller.
        unsafe {
            let low = _mm_loadu_ps((*rows.add(i)).add(at));
            let high = _mm_loadu_ps((*rows.add(i + 4)).add(at));
            _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
        }
    }

    /// # Safety
    /// The contract of [`Simd::transpose`] for 8 lanes.
    #[inline(always)]
    unsafe fn transpose_8(rows: *const *const f32, at: usize, dst: *mut f32, stride: usize) {
        // SAFETY: the caller's 8 rows are readable for 8 values from `at` on, `dst` holds a square
        // of 8, and the machine has AVX.
        unsafe {
            for half in [0, 4] {
                let (a, b) = (pair(rows, 0, at + half), pair(rows, 1, at + half));
                let (c, d) = (pair(rows, 2, at + half), pair(rows, 3, at + half));
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                let columns = [
                    _mm256_shuffle_ps::<0x44>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0xEE>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm256_shuffle_ps::<0xEE>(ab_high, cd_high),
                ];
                for (j, column) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(dst.add((half + j) * stride), column);
                }
            }
        }
    }

    /// # Safety
    /// The contract of [`Simd::transpose`] for 16 lanes.
    #[inline(always)]
    unsafe fn transpose_16(rows: *const *const f32, at: usize, dst: *mut f32, stride: usize) {
        for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
            // SAFETY: a quarter of the caller's square.
            unsafe { transpose_8(rows.add(i), at + j, dst.add(j * stride + i), stride) }
        }
    }

    // In both: SAFETY of every intrinsic is the trait's contract, passed on to the caller.
    macro_rules! intel {
        ($name:ident, $lanes:literal, $registers:literal, $sum4:ident, $splat:ident, $load:ident, $store:ident, $add:ident,
         $sub:ident, $mul:ident, $div:ident, $fma:ident, $max:ident, $min:ident, $sqrt:ident,
         $transpose:ident, $round:expr, $loadh:expr, $exp2:expr) => {
            impl Simd for $name {
                const LANES: usize = $lanes;
                const REGISTERS: usize = $registers;
                #[inline(always)]
                unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
                    // SAFETY: the trait's contract.
                    unsafe { $sum4([v[0].0, v[1].0, v[2].0, v[3].0]) }
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $splat(x) })
                }
                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $load(p) })
                }
                #[inline(always)]
                unsafe fn load_bf16(p: *const bf16) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $loadh(p) })
                }
                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: the trait's contract.
                    unsafe { $store(p, self.0) }
                }
                #[inline(always)]
                unsafe fn add(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $add(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn sub(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $sub(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn mul(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $mul(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn div(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $div(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn fma(self, b: Self, c: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $fma(self.0, b.0, c.0) })
                }
                #[inline(always)]
                unsafe fn max(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $max(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn min(self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $min(self.0, b.0) })
                }
                #[inline(always)]
                unsafe fn round(self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $round(self.0) })
                }
                #[inline(always)]
                unsafe fn exp2_whole(self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $exp2(self.0) })
                }
                #[inline(always)]
                unsafe fn sqrt(self) -> Self {
                    // SAFETY: the trait's contract.
                    Self(unsafe { $sqrt(self.0) })
                }
                #[inline(always)]
                unsafe fn transpose(
                    rows: *const *const f32,
                    at: usize,
                    dst: *mut f32,
                    stride: usize,
                ) {
                    // SAFETY: the trait's contract.
                    unsafe { $transpose(rows, at, dst, stride) }
                }
            }
        };
    }

    intel!(
        Avx2,
        8,
        16,
        sum4_avx2,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_div_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        _mm256_sqrt_ps,
        transpose_8,
        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>,
        |p: *const bf16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
            _mm_loadu_si128(p.cast())
        ))),
        |x| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(x),
            _mm256_set1_epi32(127)
        )))
    );
    intel!(
        Avx512,
        16,
        32,
        sum4_avx512,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_div_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        _mm512_sqrt_ps,
        transpose_16,
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>,
        |p: *const bf16| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
            _mm256_loadu_si256(p.cast())
        ))),
        |x| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(x),
            _mm512_set1_epi32(127)
        )))
    );
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Kernel, Simd, bf16};
    use std::arch::aarch64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Neon(float32x4_t);

    /// # Safety
    /// The machine has NEON.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn neon<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Neon>()
    }

    impl Simd for Neon {
        const LANES: usize = 4;
        const REGISTERS: usize = 32;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vdupq_n_f32(x) })
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vld1q_f32(p) })
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: the trait's contract.
            unsafe { vst1q_f32(p, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vaddq_f32(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vsubq_f32(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vmulq_f32(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vdivq_f32(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn fma(self, b: Self, c: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vfmaq_f32(c.0, self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // SAFETY: the trait's contract; the select gives `b` where either is NaN.
            Self(unsafe { vbslq_f32(vcgtq_f32(self.0, b.0), self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn min(self, b: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { vbslq_f32(vcltq_f32(self.0, b.0), self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vrndnq_f32(self.0) })
        }
        #[inline(always)]
        unsafe fn exp2_whole(self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe {
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(
                    vcvtnq_s32_f32(self.0),
                    vdupq_n_s32(127),
                )))
            })
        }
        #[inline(always)]
        unsafe fn sqrt(self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { vsqrtq_f32(self.0) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            for run in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: inside of `dispatch`; the run has LANES values.
                unsafe { S::load(run.as_ptr()).exp().store(run.as_mut_ptr()) }
            }
        }
    }

    struct Sums<'a>(&'a [f32; 64]);
    impl Kernel for Sums<'_> {
        type Output = ([f32; 4], [f32; 4]);
        #[inline(always)]
        fn run<S: Simd>(self) -> Self::Output {
            let p = self.0.as_ptr();
            // SAFETY: inside of `dispatch`; 4 vectors of at most 16 lanes are 64 values.
            unsafe {
                let n = S::LANES;
                let v = [
                    S::load(p),
                    S::load(p.add(n)),
                    S::load(p.add(2 * n)),
                    S::load(p.add(3 * n)),
                ];
                (S::sum4(v), [v[0].sum(), v[1].sum(), v[2].sum(), v[3].sum()])
            }
        }
    }

    struct Transpose<'a>(&'a [f32], &'a mut [f32]);
    impl Kernel for Transpose<'_> {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self) -> usize {
            let rows: Vec<*const f32> = self.0.chunks(20).map(|row| row.as_ptr()).collect();
            // SAFETY: inside of `dispatch`; 16 rows of 20 values, read from 3 on, and 16 of 17.
            unsafe { S::transpose(rows.as_ptr(), 3, self.1.as_mut_ptr(), 17) }
            S::LANES
        }
    }

    #[test]
    fn four_sums_have_the_bits_of_one_sum_each() {
        let values: [f32; 64] =
            std::array::from_fn(|i| (i as f32 * 12.9898).sin() * 10f32.powi(i as i32 % 7 - 3));
        for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
            if level.available() {
                let (four, each) = level.dispatch(Sums(&values));
                assert_eq!(four.map(f32::to_bits), each.map(f32::to_bits), "{level}");
            }
        }
    }

    #[test]
    fn transpose_swaps_rows_and_columns() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
            if !level.available() {
                continue;
            }
            let input: Vec<f32> = (0..16 * 20).map(|i| i as f32).collect();
            let mut output = vec![-1.0; 16 * 17];
            let lanes = level.dispatch(Transpose(&input, &mut output));
            for (at, &value) in output.iter().enumerate() {
                let (j, i) = (at / 17, at % 17);
                let inside = i < lanes && j < lanes;
                let want = if inside { input[i * 20 + 3 + j] } else { -1.0 };
                assert_eq!(value, want, "{level}: row {i}, column {j}");
            }
        }
    }

    #[test]
    fn exp_is_close_on_every_level_of_this_machine() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
            if !level.available() {
                continue;
            }
            let input: Vec<f32> = (0..16 * 4000).map(|i| -87.0 + i as f32 * 0.0027).collect();
            let mut output = input.clone();
            level.dispatch(Exp(&mut output));
            for (x, y) in input.iter().zip(&output) {
                let want = f64::from(x.min(88.0)).exp();
                let error = (f64::from(*y) - want).abs() / want;
                assert!(error < 2.5e-7, "{level}: exp({x}) = {y}, want {want}");
            }
            let mut edges = [f32::NEG_INFINITY; 16];
            edges[1] = 0.0;
            edges[2] = -100.0;
            edges[3] = f32::MIN;
            edges[4] = f32::NAN;
            level.dispatch(Exp(&mut edges));
            assert_eq!(&edges[..4], &[0.0, 1.0, 0.0, 0.0], "{level}");
            assert!(edges[4].is_nan(), "{level}");
        }
    }
}
