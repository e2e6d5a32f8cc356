//! Warp-wide arithmetic: one call computes all 32 lanes.

use crate::widened;
use std::sync::LazyLock;

/// Lanes of a warp.
pub const WARP: usize = 32;

/// One 32-bit register of a warp. A 64-bit register is two of them, seen as 32 u64.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Lanes(pub [u32; WARP]);

impl Lanes {
    /// All lanes zero.
    pub const ZERO: Lanes = Lanes([0; WARP]);
}

/// Writes a lane of register `at`.
#[inline(always)]
pub fn set_lane(regs: &mut [Lanes], at: usize, lane: usize, wide: bool, bits: u64) {
    if wide {
        let pair = &mut regs[at..at + 2];
        // SAFETY: two `Lanes` are 64 words, that is 32 u64, aligned to 64 bytes.
        unsafe { *(pair.as_mut_ptr() as *mut u64).add(lane) = bits };
    } else {
        regs[at].0[lane] = bits as u32;
    }
}

/// Reads a lane of register `at`.
#[inline(always)]
pub fn get_lane(regs: &[Lanes], at: usize, lane: usize, wide: bool) -> u64 {
    if wide {
        let pair = &regs[at..at + 2];
        // SAFETY: as in `set_lane`.
        unsafe { *(pair.as_ptr() as *const u64).add(lane) }
    } else {
        regs[at].0[lane] as u64
    }
}

/// The lanes of 64-bit register `at`.
#[inline(always)]
pub fn wide_lanes(regs: &[Lanes], at: usize) -> &[u64; WARP] {
    let pair = &regs[at..at + 2];
    // SAFETY: as in `set_lane`.
    unsafe { &*pair.as_ptr().cast() }
}

/// As [`wide_lanes`], to be written.
#[inline(always)]
pub fn wide_lanes_mut(regs: &mut [Lanes], at: usize) -> &mut [u64; WARP] {
    let pair = &mut regs[at..at + 2];
    // SAFETY: as in `set_lane`.
    unsafe { &mut *pair.as_mut_ptr().cast() }
}

/// Computes all lanes of a register from up to three others. Tells whether it has 64 bits.
///
/// # Safety
/// Each pointer must be valid for the width that the function was made for: one `Lanes` for
/// types of up to 32 bits, two for 64 bits. They may be equal.
pub type AluFn =
    unsafe fn(d: *mut Lanes, a: *const Lanes, b: *const Lanes, c: *const Lanes) -> bool;

/// Compares two registers; a bit a lane.
///
/// # Safety
/// As for [`AluFn`].
pub type CmpFn = unsafe fn(a: *const Lanes, b: *const Lanes) -> u32;

/// Calls an [`AluFn`], and keeps the lanes of `d` that are not in the mask. Kept out of line:
/// partly masked instructions are rare.
///
/// # Safety
/// As for [`AluFn`].
#[inline(never)]
pub unsafe fn masked(
    f: AluFn,
    d: *mut Lanes,
    a: *const Lanes,
    b: *const Lanes,
    c: *const Lanes,
    mask: u32,
) {
    let mut out = [Lanes::ZERO; 2];
    // SAFETY: the caller's; `out` has room for either width, and `d` for the one told.
    unsafe {
        if f(out.as_mut_ptr(), a, b, c) {
            blend(d.cast::<u64>(), out.as_ptr().cast(), mask);
        } else {
            blend(d.cast::<u32>(), out.as_ptr().cast(), mask);
        }
    }
}

/// Copies the lanes of a mask.
///
/// # Safety
/// Both pointers are valid for 32 words.
#[inline(always)]
unsafe fn blend<W: Copy>(d: *mut W, from: *const W, mask: u32) {
    for i in 0..WARP {
        // SAFETY: the caller's.
        unsafe {
            let (new, old) = (*from.add(i), *d.add(i));
            *d.add(i) = if mask >> i & 1 == 1 { new } else { old };
        }
    }
}

widened! {
    /// Lanes of `mask`: register `d` becomes `a` where `choose` has a bit, `b` where not.
    pub fn select(
        regs: &mut [Lanes],
        d: usize,
        a: usize,
        b: usize,
        choose: u32,
        mask: u32,
        wide: bool,
    ) {
        if wide {
            let (a, b) = (*wide_lanes(regs, a), *wide_lanes(regs, b));
            pick(wide_lanes_mut(regs, d), &a, &b, choose, mask);
        } else {
            let (a, b) = (regs[a].0, regs[b].0);
            pick(&mut regs[d].0, &a, &b, choose, mask);
        }
    }
}

/// As [`select`].
#[inline(always)]
fn pick<W: Copy>(d: &mut [W; WARP], a: &[W; WARP], b: &[W; WARP], choose: u32, mask: u32) {
    for (i, d) in d.iter_mut().enumerate() {
        let chosen = if choose >> i & 1 == 1 { a[i] } else { b[i] };
        *d = if mask >> i & 1 == 1 { chosen } else { *d };
    }
}

/// A type that a lane of a register can be read as.
pub trait Lane: Copy + Default {
    /// The word that a lane of the register is.
    type Word: Copy + Default;
    /// The value as that word.
    fn word(self) -> Self::Word;
    /// Reads lane `i`.
    ///
    /// # Safety
    /// `p` is valid for the register's width and `i < 32`.
    unsafe fn get(p: *const Lanes, i: usize) -> Self;
}

macro_rules! lane_type {
    ($($t:ty: $w:ty, |$x:ident| $from:expr, |$y:ident| $to:expr;)*) => {$(
        impl Lane for $t {
            #[inline(always)]
            unsafe fn get(p: *const Lanes, i: usize) -> Self {
                // SAFETY: the caller gives a register of 32 words of this width.
                let $x = unsafe { *(p as *const $w).add(i) };
                $from
            }
            type Word = $w;
            #[inline(always)]
            fn word(self) -> $w {
                let $y = self;
                $to
            }
        }
    )*};
}

/// A bf16 in the low half of a word.
#[derive(Clone, Copy, Default)]
pub struct Bf(pub u16);
/// An f16 in the low half of a word.
#[derive(Clone, Copy, Default)]
pub struct Hf(pub u16);

lane_type! {
    u32: u32, |x| x, |v| v;
    i32: u32, |x| x as i32, |v| v as u32;
    f32: u32, |x| f32::from_bits(x), |v| v.to_bits();
    u64: u64, |x| x, |v| v;
    i64: u64, |x| x as i64, |v| v as u64;
    f64: u64, |x| f64::from_bits(x), |v| v.to_bits();
    u16: u32, |x| x as u16, |v| v as u32;
    i16: u32, |x| x as i16, |v| v as u16 as u32;
    u8: u32, |x| x as u8, |v| v as u32;
    i8: u32, |x| x as i8, |v| v as u8 as u32;
    Bf: u32, |x| Bf(x as u16), |v| v.0 as u32;
    Hf: u32, |x| Hf(x as u16), |v| v.0 as u32;
}

/// Whether the wide versions of the functions can run here.
#[inline(always)]
pub fn wide() -> bool {
    static WIDE: LazyLock<bool> = LazyLock::new(detect);
    *WIDE
}

fn detect() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Defines functions that are compiled a second time for hosts with AVX2, and chosen when called.
#[macro_export]
#[doc(hidden)]
macro_rules! widened {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $t:ty),* $(,)?) $(-> $r:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $t),*) $(-> $r)? {
            #[inline(always)]
            fn body($($arg: $t),*) $(-> $r)? $body
            #[cfg(target_arch = "x86_64")]
            if $crate::machine::lanes::wide() {
                #[target_feature(enable = "avx2,fma,bmi2,lzcnt,popcnt")]
                fn fast($($arg: $t),*) $(-> $r)? {
                    body($($arg),*)
                }
                // SAFETY: `wide` says that the host has these features.
                return unsafe { fast($($arg),*) };
            }
            body($($arg),*)
        }
    )*};
}

/// Makes an [`AluFn`] from a scalar expression: `alu!(f32; a: f32, b: f32; a + b)`.
/// The expression must be defined for every input: it is also computed for lanes that are off.
#[macro_export]
#[doc(hidden)]
macro_rules! alu {
    ($r:ty; $a:ident: $at:ty; $e:expr) => {
        $crate::alu!($r; $a: $at, _b: u32, _c: u32; $e)
    };
    ($r:ty; $a:ident: $at:ty, $b:ident: $bt:ty; $e:expr) => {
        $crate::alu!($r; $a: $at, $b: $bt, _c: u32; $e)
    };
    ($r:ty; $a:ident: $at:ty, $b:ident: $bt:ty, $c:ident: $ct:ty; $e:expr) => {{
        use $crate::machine::lanes::{Lane, Lanes, WARP};
        #[inline(always)]
        unsafe fn body(d: *mut Lanes, a: *const Lanes, b: *const Lanes, c: *const Lanes) -> bool {
            // `d` may be an operand: all lanes are computed before the first is written.
            let mut out = [<$r as Lane>::Word::default(); WARP];
            for (i, slot) in out.iter_mut().enumerate() {
                // SAFETY: the caller of an AluFn gives registers of the right width.
                let ($a, $b, $c) = unsafe { (<$at>::get(a, i), <$bt>::get(b, i), <$ct>::get(c, i)) };
                let value: $r = $e;
                *slot = value.word();
            }
            // SAFETY: as above.
            unsafe { d.cast::<[<$r as Lane>::Word; WARP]>().write(out) };
            size_of::<<$r as Lane>::Word>() == 8
        }
        // For hosts without AVX2: rarely run, so compiled for size.
        #[cold]
        unsafe fn plain(d: *mut Lanes, a: *const Lanes, b: *const Lanes, c: *const Lanes) -> bool {
            // SAFETY: same contract.
            unsafe { body(d, a, b, c) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,bmi2,lzcnt,popcnt")]
        unsafe fn fast(d: *mut Lanes, a: *const Lanes, b: *const Lanes, c: *const Lanes) -> bool {
            // SAFETY: same contract.
            unsafe { body(d, a, b, c) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        use plain as fast;
        let chosen: $crate::machine::lanes::AluFn =
            if $crate::machine::lanes::wide() { fast } else { plain };
        chosen
    }};
}

/// Makes a [`CmpFn`]: `cmp!(a: i32, b: i32; a < b)`.
#[macro_export]
#[doc(hidden)]
macro_rules! cmp {
    ($a:ident: $at:ty, $b:ident: $bt:ty; $e:expr) => {{
        use $crate::machine::lanes::{CmpFn, Lane, Lanes, WARP};
        #[inline(always)]
        unsafe fn body(a: *const Lanes, b: *const Lanes) -> u32 {
            let mut bits = [0u32; WARP];
            for (i, bit) in bits.iter_mut().enumerate() {
                // SAFETY: the caller of a CmpFn gives registers of the right width.
                let ($a, $b) = unsafe { (<$at>::get(a, i), <$bt>::get(b, i)) };
                *bit = (($e) as u32) << i;
            }
            bits.iter().fold(0, |m, b| m | b)
        }
        #[cold]
        unsafe fn plain(a: *const Lanes, b: *const Lanes) -> u32 {
            // SAFETY: same contract.
            unsafe { body(a, b) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,bmi2,lzcnt,popcnt")]
        unsafe fn fast(a: *const Lanes, b: *const Lanes) -> u32 {
            // SAFETY: same contract.
            unsafe { body(a, b) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        use plain as fast;
        let chosen: CmpFn = if $crate::machine::lanes::wide() {
            fast
        } else {
            plain
        };
        chosen
    }};
}
