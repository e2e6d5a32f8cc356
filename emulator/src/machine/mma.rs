//! Matrix multiply-adds of a warp.
//!
//! With g = lane / 4, t = lane % 4 and e elements in a register: register i of A holds row
//! g + 8 (i mod 2), columns e t + 4 e (i div 2) ..; register i of B holds column g, rows
//! e t + 4 e i ..; register i of a 32-bit C or D holds row g + 8 (i div 2), column 2 t + i mod 2;
//! of a packed f16 one, row g + 8 i, columns 2 t and 2 t + 1.

use super::code::{Element, MmaOp};
use super::lanes::WARP;
use super::num;
use super::warp::Warp;
use crate::config::MmaRounding;
use crate::widened;

const M: usize = 16;
const N: usize = 8;
const K: usize = 32;

fn width(e: Element) -> usize {
    match e {
        Element::F16 | Element::Bf16 => 16,
        Element::Tf32 => 32,
        _ => 8,
    }
}

/// The elements of a register, lane by lane.
#[inline(always)]
fn decode(e: Element, register: &[u32; WARP]) -> [f64; 4 * WARP] {
    match e {
        Element::F16 => elements::<2>(register, |x| num::f16_to_f32(x as u16) as f64),
        Element::Bf16 => elements::<2>(register, |x| num::bf16_to_f32(x as u16) as f64),
        // The low 13 bits are not read.
        Element::Tf32 => elements::<1>(register, |x| f32::from_bits(x & !0x1fff) as f64),
        Element::E4m3 => elements::<4>(register, |x| num::E4M3.decode(x & 0xff)),
        Element::E5m2 => elements::<4>(register, |x| num::E5M2.decode(x & 0xff)),
        Element::S8 => elements::<4>(register, |x| x as u8 as i8 as f64),
        Element::U8 => elements::<4>(register, |x| x as u8 as f64),
    }
}

#[inline(always)]
fn elements<const PER: usize>(
    register: &[u32; WARP],
    decode: impl Fn(u32) -> f64,
) -> [f64; 4 * WARP] {
    let mut out = [0.0; 4 * WARP];
    for (lane, word) in register.iter().enumerate() {
        for j in 0..PER {
            out[PER * lane + j] = decode(word >> (32 / PER * j));
        }
    }
    out
}

/// A bit for each four lanes of which one is poisoned: those of a row of A or a column of B.
fn by_four(poison: u32) -> u32 {
    (0..8).fold(0, |m, g| m | ((poison >> (4 * g) & 15 != 0) as u32) << g)
}

widened! {
/// D = A B + C.
pub(super) fn multiply(warp: &mut Warp, op: &MmaOp, base: usize, rounding: MmaRounding) {
    let k = op.k as usize;
    let bits = width(op.a_type);
    // Four lanes hold as many columns of A, or rows of B, side by side.
    let run = 4 * 32 / bits;
    let mut a = [[0f64; K]; M];
    // Row-major in k so that the inner loop runs over the columns of D.
    let mut b = [[0f64; N]; K];
    let (mut a_poison, mut b_poison) = (0u32, 0u32);
    for (i, slot) in op.a.iter().enumerate() {
        let at = base + *slot as usize;
        let (first, column) = (8 * (i % 2), run * (i / 2));
        a_poison |= by_four(warp.poison[at]) << first;
        let values = decode(op.a_type, &warp.regs[at].0);
        for (g, values) in values.chunks_exact(run).take(8).enumerate() {
            a[first + g][column..column + run].copy_from_slice(values);
        }
    }
    for (i, slot) in op.b.iter().enumerate() {
        let at = base + *slot as usize;
        b_poison |= by_four(warp.poison[at]);
        let values = decode(op.b_type, &warp.regs[at].0);
        for (g, values) in values.chunks_exact(run).take(8).enumerate() {
            for (row, value) in b[run * i..].iter_mut().zip(values) {
                row[g] = *value;
            }
        }
    }
    let integer = matches!(op.a_type, Element::S8 | Element::U8);
    let mut c = [[0f64; N]; M];
    let mut c_poison = [0u32; M];
    each(op.c_half, |i, lane, half, row, column| {
        let at = base + op.c[i] as usize;
        let v = warp.regs[at].0[lane];
        c[row][column] = if op.c_half {
            num::f16_to_f32((v >> (16 * half)) as u16) as f64
        } else if integer {
            v as i32 as f64
        } else {
            f32::from_bits(v) as f64
        };
        c_poison[row] |= (warp.poison[at] >> lane & 1) << column;
    });
    let mut d = c;
    if integer {
        // At most 32 products below 2^16 and one i32: exact in f64.
        accumulate(&mut d, &a, &b, 0, k);
    } else {
        match rounding {
            MmaRounding::Exact => accumulate(&mut d, &a, &b, 0, k),
            MmaRounding::Ampere => {
                let step = (256 / bits / 2).min(k).min(if bits == 32 { 4 } else { 8 });
                for from in (0..k).step_by(step) {
                    truncated(&mut d, &a, &b, from, from + step, 24);
                }
            }
            MmaRounding::Hopper => truncated(&mut d, &a, &b, 0, k, 25),
        }
    }
    for slot in &op.d {
        warp.poison[base + *slot as usize] = 0;
    }
    each(op.d_half, |i, lane, half, row, column| {
        let at = base + op.d[i] as usize;
        let x = d[row][column];
        let word = &mut warp.regs[at].0[lane];
        if op.d_half {
            let v = num::F16.encode(x, num::Round::Nearest, false);
            *word = *word & !(0xffff << (16 * half)) | v << (16 * half);
        } else if integer {
            *word = if op.saturate {
                x as i32 as u32
            } else {
                x as i64 as u32
            };
        } else {
            let v = x as f32;
            *word = if v.is_nan() { 0x7fff_ffff } else { v.to_bits() };
        }
        let bad = a_poison >> row | b_poison >> column | c_poison[row] >> column;
        warp.poison[at] |= (bad & 1) << lane;
    });
}
}

/// Visits every element of C or D: register, lane, half, row, column.
#[inline(always)]
fn each(half: bool, mut f: impl FnMut(usize, usize, usize, usize, usize)) {
    for lane in 0..WARP {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..4 {
            let (row, column) = (g + 8 * (i / 2), 2 * t + i % 2);
            if half {
                f(i / 2, lane, i % 2, row, column);
            } else {
                f(i, lane, 0, row, column);
            }
        }
    }
}

#[inline(always)]
fn accumulate(d: &mut [[f64; N]; M], a: &[[f64; K]; M], b: &[[f64; N]; K], from: usize, to: usize) {
    for (row, sums) in d.iter_mut().enumerate() {
        let mut s = *sums;
        for k in from..to {
            let x = a[row][k];
            for (s, y) in s.iter_mut().zip(&b[k]) {
                *s += x * y;
            }
        }
        *sums = s;
    }
}

/// Sums as tensor cores are understood to: exact products and the addend are aligned to the
/// largest exponent, cut to `fraction` bits, added exactly, and cut to f32.
fn truncated(
    d: &mut [[f64; N]; M],
    a: &[[f64; K]; M],
    b: &[[f64; N]; K],
    from: usize,
    to: usize,
    fraction: i32,
) {
    for (row, sums) in d.iter_mut().enumerate() {
        for (column, sum) in sums.iter_mut().enumerate() {
            let mut terms = [0f64; K + 1];
            let mut n = 0;
            for k in from..to {
                terms[n] = a[row][k] * b[k][column];
                n += 1;
            }
            terms[n] = *sum;
            let terms = &terms[..=n];
            let plain: f64 = terms.iter().sum();
            if !plain.is_finite() {
                *sum = plain;
                continue;
            }
            let largest = terms
                .iter()
                .filter(|x| **x != 0.0)
                .map(|x| exponent(*x))
                .max();
            let Some(largest) = largest else {
                *sum = 0.0;
                continue;
            };
            // Powers far out of f64's range cannot come up: operands are f32 at most.
            let unit = num::power_of_two((largest - fraction).max(-1022));
            let total: i64 = terms.iter().map(|x| (x / unit) as i64).sum();
            *sum = num::f32_from_f64(total as f64 * unit, num::Round::Zero) as f64;
        }
    }
}

fn exponent(x: f64) -> i32 {
    (x.to_bits() >> 52 & 0x7ff) as i32 - 1023
}
