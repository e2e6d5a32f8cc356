//! Scalar instructions, bit for bit, against C compiled by gcc.
//!
//! Each case is an instruction and a C expression of the operands `a`, `b`, `c`. All cases run
//! on the same operands: random ones and the corners of every type.

mod common;

use common::*;
use cuda_emulator::Arg;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Instruction, types of result and operands (h 16-bit, r 32-bit, d 64-bit, p predicate), C.
type Case = (&'static str, &'static str, &'static str);

const CASES: &[Case] = &[
    ("add.u16", "hhh", "(uint16_t)(a + b)"),
    ("add.s32", "rrr", "U(a) + U(b)"),
    ("add.sat.s32", "rrr", "sat32((int64_t)S(a) + S(b))"),
    ("sub.sat.s32", "rrr", "sat32((int64_t)S(a) - S(b))"),
    ("add.u64", "ddd", "a + b"),
    ("sub.s64", "ddd", "a - b"),
    ("mul.lo.s32", "rrr", "U(a) * U(b)"),
    ("mul.lo.u64", "ddd", "a * b"),
    (
        "mul.hi.u32",
        "rrr",
        "(uint32_t)((uint64_t)U(a) * U(b) >> 32)",
    ),
    (
        "mul.hi.s32",
        "rrr",
        "(uint32_t)((int64_t)S(a) * S(b) >> 32)",
    ),
    (
        "mul.hi.u64",
        "ddd",
        "(uint64_t)((unsigned __int128)a * b >> 64)",
    ),
    (
        "mul.hi.s64",
        "ddd",
        "(uint64_t)((__int128)(int64_t)a * (int64_t)b >> 64)",
    ),
    ("mul.wide.u32", "drr", "(uint64_t)U(a) * U(b)"),
    ("mul.wide.s32", "drr", "(int64_t)S(a) * S(b)"),
    ("mul.wide.s16", "rhh", "(uint32_t)((int16_t)a * (int16_t)b)"),
    ("mad.lo.s32", "rrrr", "U(a) * U(b) + U(c)"),
    ("mad.wide.u32", "drrd", "(uint64_t)U(a) * U(b) + c"),
    (
        "mad.hi.u32",
        "rrrr",
        "(uint32_t)((uint64_t)U(a) * U(b) >> 32) + U(c)",
    ),
    (
        "mul24.lo.u32",
        "rrr",
        "(U(a) & 0xffffff) * (U(b) & 0xffffff)",
    ),
    ("div.u32", "rrr", "U(b) ? U(a) / U(b) : ~0u"),
    (
        "div.s32",
        "rrr",
        "!S(b) ? ~0u : S(b) == -1 ? 0u - U(a) : (uint32_t)(S(a) / S(b))",
    ),
    (
        "rem.s32",
        "rrr",
        "!S(b) ? U(a) : S(b) == -1 ? 0 : (uint32_t)(S(a) % S(b))",
    ),
    ("rem.u64", "ddd", "b ? a % b : a"),
    (
        "div.s64",
        "ddd",
        "!b ? ~0ull : b == ~0ull ? -a : (uint64_t)((int64_t)a / (int64_t)b)",
    ),
    ("abs.s32", "rr", "S(a) < 0 ? 0u - U(a) : U(a)"),
    ("neg.s64", "dd", "-a"),
    ("min.s32", "rrr", "S(a) < S(b) ? U(a) : U(b)"),
    (
        "max.u16",
        "hhh",
        "(uint16_t)a > (uint16_t)b ? (uint16_t)a : (uint16_t)b",
    ),
    ("max.s64", "ddd", "(int64_t)a > (int64_t)b ? a : b"),
    (
        "sad.s32",
        "rrrr",
        "U(c) + (S(a) < S(b) ? U(b) - U(a) : U(a) - U(b))",
    ),
    ("and.b32", "rrr", "U(a) & U(b)"),
    ("xor.b64", "ddd", "a ^ b"),
    ("not.b16", "hh", "(uint16_t)~a"),
    ("cnot.b32", "rr", "!U(a)"),
    ("shl.b32", "rrr", "U(b) > 31 ? 0 : U(a) << U(b)"),
    ("shr.u64", "ddr", "U(b) > 63 ? 0 : a >> U(b)"),
    (
        "shr.s32",
        "rrr",
        "(uint32_t)(S(a) >> (U(b) > 31 ? 31 : U(b)))",
    ),
    (
        "shr.s16",
        "hhr",
        "(uint16_t)((int16_t)a >> (U(b) > 15 ? 15 : U(b)))",
    ),
    (
        "shf.l.wrap.b32",
        "rrrr",
        "(uint32_t)(((uint64_t)U(b) << 32 | U(a)) << (c & 31) >> 32)",
    ),
    (
        "shf.r.clamp.b32",
        "rrrr",
        "(uint32_t)(((uint64_t)U(b) << 32 | U(a)) >> (U(c) > 32 ? 32 : U(c)))",
    ),
    ("popc.b64", "rd", "__builtin_popcountll(a)"),
    ("clz.b32", "rr", "U(a) ? __builtin_clz(U(a)) : 32"),
    ("bfind.u32", "rr", "U(a) ? 31 - __builtin_clz(U(a)) : ~0u"),
    ("bfind.s32", "rr", "find_s(S(a))"),
    ("brev.b32", "rr", "reverse(U(a))"),
    ("bfe.u32", "rrrr", "extract(U(a), b, c, 32, 0)"),
    ("bfe.s32", "rrrr", "extract(U(a), b, c, 32, 1)"),
    ("bfe.u64", "ddrr", "extract(a, b, c, 64, 0)"),
    ("bfe.s64", "ddrr", "extract(a, b, c, 64, 1)"),
    ("prmt.b32", "rrrr", "permute(U(a), U(b), U(c))"),
    ("dp4a.s32.u32", "rrrr", "dot(U(a), U(b), U(c))"),
    ("lop3.b32", "rrrr5", "lut(U(a), U(b), U(c), 0xe5)"),
    ("add.rn.f32", "rrr", "F(f(a) + f(b))"),
    ("sub.f32", "rrr", "F(f(a) - f(b))"),
    ("mul.rn.f32", "rrr", "F(f(a) * f(b))"),
    ("fma.rn.f32", "rrrr", "F(fmaf(f(a), f(b), f(c)))"),
    ("div.rn.f32", "rrr", "F(f(a) / f(b))"),
    ("sqrt.rn.f32", "rr", "F(sqrtf(f(a)))"),
    ("rcp.rn.f32", "rr", "F(1.0f / f(a))"),
    ("add.rz.f32", "rrr", "MODE(FE_TOWARDZERO, F(v1(a) + v2(b)))"),
    ("add.rm.f32", "rrr", "MODE(FE_DOWNWARD, F(v1(a) + v2(b)))"),
    ("mul.rp.f32", "rrr", "MODE(FE_UPWARD, F(v1(a) * v2(b)))"),
    ("mul.rz.f32", "rrr", "MODE(FE_TOWARDZERO, F(v1(a) * v2(b)))"),
    (
        "fma.rm.f32",
        "rrrr",
        "MODE(FE_DOWNWARD, F(fmaf(v1(a), v2(b), f(c))))",
    ),
    (
        "fma.rz.f32",
        "rrrr",
        "MODE(FE_TOWARDZERO, F(fmaf(v1(a), v2(b), f(c))))",
    ),
    ("div.rp.f32", "rrr", "MODE(FE_UPWARD, F(v1(a) / v2(b)))"),
    ("sqrt.rm.f32", "rr", "MODE(FE_DOWNWARD, F(sqrtf(v1(a))))"),
    ("add.ftz.f32", "rrr", "F(z(z(f(a)) + z(f(b))))"),
    ("mul.ftz.f32", "rrr", "F(z(z(f(a)) * z(f(b))))"),
    ("add.sat.f32", "rrr", "F(unit(f(a) + f(b)))"),
    ("abs.f32", "rr", "F(fabsf(f(a)))"),
    ("min.f32", "rrr", "F(least(f(a), f(b)))"),
    ("max.f32", "rrr", "F(-least(-f(a), -f(b)))"),
    (
        "max.NaN.f32",
        "rrr",
        "isnan(f(a)) || isnan(f(b)) ? 0x7fffffff : F(-least(-f(a), -f(b)))",
    ),
    (
        "copysign.f32",
        "rrr",
        "(U(b) & 0x7fffffff) | (U(a) & 0x80000000)",
    ),
    ("add.rn.f64", "ddd", "D(d(a) + d(b))"),
    ("mul.rn.f64", "ddd", "D(d(a) * d(b))"),
    ("fma.rn.f64", "dddd", "D(fma(d(a), d(b), d(c)))"),
    ("div.rn.f64", "ddd", "D(d(a) / d(b))"),
    ("add.rz.f64", "ddd", "MODE(FE_TOWARDZERO, D(w1(a) + w2(b)))"),
    ("add.rp.f64", "ddd", "MODE(FE_UPWARD, D(w1(a) + w2(b)))"),
    ("cvt.rn.f32.s32", "rr", "F((float)S(a))"),
    (
        "cvt.rz.f32.u32",
        "rr",
        "MODE(FE_TOWARDZERO, F((float)*(volatile uint32_t *)&a))",
    ),
    ("cvt.rn.f32.s64", "rd", "F((float)(int64_t)a)"),
    (
        "cvt.rp.f32.u64",
        "rd",
        "MODE(FE_UPWARD, F((float)*(volatile uint64_t *)&a))",
    ),
    ("cvt.rn.f64.u64", "dd", "D((double)a)"),
    ("cvt.rn.f32.f64", "rd", "F((float)d(a))"),
    (
        "cvt.rz.f32.f64",
        "rd",
        "MODE(FE_TOWARDZERO, F((float)w1(a)))",
    ),
    ("cvt.rm.f32.f64", "rd", "MODE(FE_DOWNWARD, F((float)w1(a)))"),
    ("cvt.f64.f32", "dr", "D((double)f(a))"),
    ("cvt.rzi.s32.f32", "rr", "to_s(trunc(f(a)), 32)"),
    ("cvt.rni.s32.f32", "rr", "to_s(rint(f(a)), 32)"),
    ("cvt.rmi.u32.f32", "rr", "to_u(floor(f(a)), 32)"),
    ("cvt.rpi.s64.f64", "dd", "to_s(ceil(d(a)), 64)"),
    ("cvt.rzi.u64.f32", "dr", "to_u(trunc(f(a)), 64)"),
    ("cvt.rni.f32.f32", "rr", "F(rintf(f(a)))"),
    ("cvt.s32.s8", "rr", "(int8_t)a"),
    ("cvt.u64.u16", "dh", "(uint16_t)a"),
    ("cvt.s64.s32", "dr", "(int64_t)S(a)"),
    ("cvt.u32.u64", "rd", "(uint32_t)a"),
    (
        "cvt.sat.u8.s32",
        "rr",
        "S(a) < 0 ? 0 : S(a) > 255 ? 255 : S(a)",
    ),
    (
        "cvt.sat.s16.s64",
        "rd",
        "(uint32_t)((int64_t)a < -32768 ? -32768 : (int64_t)a > 32767 ? 32767 : (int64_t)a) & 0xffff",
    ),
    ("add.f16", "hhh", "H((_Float16)(h(a) + h(b)))"),
    ("mul.f16", "hhh", "H((_Float16)(h(a) * h(b)))"),
    (
        "fma.rn.f16",
        "hhhh",
        "H((_Float16)((__float128)h(a) * h(b) + h(c)))",
    ),
    ("cvt.rn.f16.f32", "hr", "H((_Float16)f(a))"),
    ("cvt.f32.f16", "rh", "F((float)h(a))"),
    ("cvt.rn.bf16.f32", "hr", "bf(f(a))"),
    ("cvt.rn.bf16x2.f32", "rrr", "bf(f(b)) | bf(f(a)) << 16"),
    ("mul.bf16", "hhh", "bf(fb(a) * fb(b))"),
    ("add.bf16", "hhh", "bf(fb(a) + fb(b))"),
    ("setp.lt.s32", "prr", "S(a) < S(b)"),
    ("setp.hi.u32", "prr", "U(a) > U(b)"),
    ("setp.ge.s64", "pdd", "(int64_t)a >= (int64_t)b"),
    ("setp.ne.f32", "prr", "f(a) < f(b) || f(a) > f(b)"),
    ("setp.neu.f32", "prr", "f(a) != f(b)"),
    ("setp.ltu.f32", "prr", "!(f(a) >= f(b))"),
    ("setp.num.f64", "pdd", "!isnan(d(a)) && !isnan(d(b))"),
    ("setp.gt.f16", "phh", "h(a) > h(b)"),
];

const PRELUDE: &str = r#"
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#define U(x) ((uint32_t)(x))
#define S(x) ((int32_t)(uint32_t)(x))
static float f(uint64_t x) { uint32_t y = x; float v; memcpy(&v, &y, 4); return v; }
static double d(uint64_t x) { double v; memcpy(&v, &x, 8); return v; }
static _Float16 h(uint64_t x) { uint16_t y = x; _Float16 v; memcpy(&v, &y, 2); return v; }
static float fb(uint64_t x) { return f((x & 0xffff) << 16); }
static uint32_t F(float v) { uint32_t y; if (isnan(v)) return 0x7fffffff; memcpy(&y, &v, 4); return y; }
static uint64_t D(double v) { uint64_t y; if (isnan(v)) return 0x7fffffffffffffff; memcpy(&y, &v, 8); return y; }
static uint64_t H(_Float16 v) { uint16_t y; if (v != v) return 0x7fff; memcpy(&y, &v, 2); return y; }
static uint64_t bf(float v) {
    if (isnan(v)) return 0x7fff;
    uint32_t y = F(v), low = y & 0xffff, high = y >> 16;
    return high + (low > 0x8000 || (low == 0x8000 && (high & 1)));
}
/* Read through volatile so that the compiler does not compute before the mode is set. */
static float v1(uint64_t x) { volatile float v = f(x); return v; }
static float v2(uint64_t x) { volatile float v = f(x); return v; }
static double w1(uint64_t x) { volatile double v = d(x); return v; }
static double w2(uint64_t x) { volatile double v = d(x); return v; }
#define MODE(m, e) ({ fesetround(m); volatile uint64_t r_ = (e); fesetround(FE_TONEAREST); r_; })
static float z(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v; }
static float unit(float v) { return !(v > 0) ? 0 : v > 1 ? 1 : v; }
static float least(float a, float b) {
    if (isnan(a)) return b;
    if (isnan(b)) return a;
    if (a == 0 && b == 0) return signbit(a) ? a : b;
    return a < b ? a : b;
}
static uint32_t sat32(int64_t v) { return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v; }
static uint32_t find_s(int32_t a) {
    for (int i = 31; i >= 0; i--) if ((a >> i & 1) != (a < 0)) return i;
    return ~0u;
}
static uint32_t reverse(uint32_t a) { uint32_t r = 0; for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i); return r; }
static uint64_t extract(uint64_t a, uint64_t pos, uint64_t len, int bits, int sign) {
    pos &= 255; len &= 255;
    int msb = bits - 1;
    uint64_t sbit = !sign || len == 0 ? 0 : a >> (pos + len - 1 < (uint64_t)msb ? pos + len - 1 : (uint64_t)msb) & 1;
    uint64_t r = 0;
    for (int i = 0; i <= msb; i++) {
        uint64_t bit = (uint64_t)i < len && pos + i <= (uint64_t)msb ? a >> (pos + i) & 1 : sbit;
        r |= bit << i;
    }
    return r;
}
static uint32_t permute(uint32_t a, uint32_t b, uint32_t c) {
    uint8_t bytes[8]; memcpy(bytes, &a, 4); memcpy(bytes + 4, &b, 4);
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t s = c >> 4 * i & 15, v = bytes[s & 7];
        if (s & 8) v = v & 128 ? 255 : 0;
        r |= v << 8 * i;
    }
    return r;
}
static uint32_t dot(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> 8 * i) * (int)(uint8_t)(b >> 8 * i);
    return c;
}
static uint32_t lut(uint32_t a, uint32_t b, uint32_t c, int t) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= (uint32_t)(t >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
    return r;
}
static uint64_t to_s(double v, int bits) {
    if (isnan(v)) return 0;
    double top = ldexp(1, bits - 1);
    int64_t r = v >= top ? (bits == 32 ? INT32_MAX : INT64_MAX) : v < -top ? (bits == 32 ? INT32_MIN : INT64_MIN) : (int64_t)v;
    return bits == 32 ? (uint32_t)r : (uint64_t)r;
}
static uint64_t to_u(double v, int bits) {
    if (isnan(v) || v <= 0) return 0;
    if (v >= ldexp(1, bits)) return bits == 32 ? UINT32_MAX : UINT64_MAX;
    return (uint64_t)v;
}
"#;

fn operands() -> [Vec<u64>; 3] {
    let mut r = random(42);
    let mut bits = || (r() * 4294967296.0) as u64 | ((r() * 4294967296.0) as u64) << 32;
    let corners: Vec<u64> = [
        0u64,
        1,
        2,
        7,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        0x7fff,
        0x8000,
        0xffff,
        0x3c00,
        0x7c00,
        0x7e00,
        0xfc00,
        0x0400,
        0x03ff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x0080_0000,
        0x007f_ffff,
        0x8000_0001,
        0x4f00_0000,
        0xcf00_0000,
        0x4f7f_ffff,
        0x3f00_0000,
        0x7fff_ffff_ffff_ffff,
        1 << 63,
        !0,
        1f64.to_bits(),
        (-1f64).to_bits(),
        f64::INFINITY.to_bits(),
        f64::NAN.to_bits(),
        1e-310f64.to_bits(),
        9.3e18f64.to_bits(),
        (-2.5f64).to_bits(),
        f64::MAX.to_bits(),
    ]
    .to_vec();
    let mut out = [Vec::new(), Vec::new(), Vec::new()];
    for a in &corners {
        for b in &corners {
            out[0].push(*a);
            out[1].push(*b);
            out[2].push(bits());
        }
    }
    for i in 0..6000 {
        let (a, b, mut c) = (bits(), bits(), bits());
        // Shifts, fields and selectors want small numbers; fused sums want operands that cancel.
        if i % 3 == 0 {
            c &= 0x3f;
        }
        let near = |x: u64| x & !0x7800_0000 | 0x3800_0000;
        match i % 4 {
            0 => [near(a), near(b), near(c)],
            1 => [a, b & 0x3f, c],
            _ => [a, b, c],
        }
        .into_iter()
        .zip(&mut out)
        .for_each(|(v, list)| list.push(v));
    }
    while out[0].len() % 128 != 0 {
        out.iter_mut().for_each(|l| l.push(0));
    }
    out
}

fn ptx() -> String {
    let mut text = String::from(".version 8.6\n.target sm_90\n.address_size 64\n");
    for (i, (instruction, types, _)) in CASES.iter().enumerate() {
        let kinds: Vec<char> = types.chars().filter(|c| c.is_alphabetic()).collect();
        let name = |k: char, n: usize| match k {
            'h' => format!("%h{n}"),
            'r' => format!("%r{n}"),
            'd' => format!("%d{n}"),
            _ => "%p1".to_string(),
        };
        write!(
            text,
            ".visible .entry op{i}(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 o) {{
             .reg .pred %p<2>; .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<4>, %x<8>;
             mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x; mov.u32 %r6, %tid.x;
             mad.lo.u32 %r7, %r4, %r5, %r6; mul.wide.u32 %x5, %r7, 8;\n"
        )
        .unwrap();
        for (n, k) in kinds.iter().enumerate().skip(1) {
            let (param, ty) = (
                ["a", "b", "c"][n - 1],
                ["b16", "b32", "b64"]["hrd".find(*k).unwrap()],
            );
            writeln!(
                text,
                "ld.param.u64 %x1, [{param}]; add.u64 %x1, %x1, %x5; ld.global.{ty} {}, [%x1];",
                name(*k, n)
            )
            .unwrap();
        }
        let list: Vec<String> = kinds.iter().enumerate().map(|(n, k)| name(*k, n)).collect();
        let table = if types.ends_with('5') { ", 0xe5" } else { "" };
        writeln!(text, "{instruction} {}{table};", list.join(", ")).unwrap();
        let widen = match kinds[0] {
            'h' => "cvt.u64.u16 %x2, %h0;",
            'r' => "cvt.u64.u32 %x2, %r0;",
            'd' => "mov.b64 %x2, %d0;",
            _ => "selp.b64 %x2, 1, 0, %p1;",
        };
        writeln!(text, "{widen} ld.param.u64 %x1, [o]; add.u64 %x1, %x1, %x5; st.global.b64 [%x1], %x2; ret; }}")
            .unwrap();
    }
    text
}

#[test]
fn scalar_instructions_agree_with_gcc() {
    let mut c = PRELUDE.to_string();
    for (i, (_, types, expression)) in CASES.iter().enumerate() {
        let mask = match types.chars().next() {
            Some('h') => "0xffff",
            Some('r') => "0xffffffff",
            _ => "~0ull",
        };
        writeln!(
            c,
            "void op{i}(const uint64_t *x, const uint64_t *y, const uint64_t *w, uint64_t *o, int n) {{
             for (int i = 0; i < n; i++) {{ uint64_t a = x[i], b = y[i], c = w[i]; (void)b; (void)c;
             o[i] = (uint64_t)({expression}) & {mask}; }} }}"
        )
        .unwrap();
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (dir.join("oracle.c"), dir.join("oracle.so"));
    std::fs::write(&source, c).unwrap();
    let compiled = Command::new("cc")
        .args([
            "-O1",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-frounding-math",
            "-w",
            "-o",
        ])
        .arg(&library)
        .arg(&source)
        .arg("-lm")
        .output()
        .expect("a C compiler is needed: install gcc");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    // SAFETY: the library was just made from the text above and has no initialisers.
    let library = unsafe { libloading::Library::new(&library) }.unwrap();
    let [a, b, c] = operands();
    let n = a.len();
    let mut d = device();
    let module = d.load(&ptx()).unwrap();
    let (pa, pb, pc) = (upload(&mut d, &a), upload(&mut d, &b), upload(&mut d, &c));
    let po = d.alloc(8 * n as u64).unwrap();
    let mut wrong = Vec::new();
    for (i, (instruction, types, _)) in CASES.iter().enumerate() {
        let args = [Arg::U64(pa), Arg::U64(pb), Arg::U64(pc), Arg::U64(po)];
        let report = d
            .launch(
                &module,
                &format!("op{i}"),
                [n as u32 / 128, 1, 1],
                [128, 1, 1],
                0,
                &args,
            )
            .unwrap();
        assert!(
            report.findings.is_empty(),
            "{instruction}: {}",
            report.findings[0]
        );
        let got = download::<u64>(&d, po, n);
        let mut want = vec![0u64; n];
        type Function = unsafe extern "C" fn(*const u64, *const u64, *const u64, *mut u64, i32);
        // SAFETY: the function is defined above with this type; all slices have n elements.
        unsafe {
            let f = library
                .get::<Function>(format!("op{i}").as_bytes())
                .unwrap();
            f(
                a.as_ptr(),
                b.as_ptr(),
                c.as_ptr(),
                want.as_mut_ptr(),
                n as i32,
            );
        }
        // PTX leaves the payload of f64 NaNs open.
        let is_nan = |v: u64| {
            types.starts_with('d') && instruction.contains("f64") && f64::from_bits(v).is_nan()
        };
        let bad = (0..n).find(|&j| got[j] != want[j] && !(is_nan(got[j]) && is_nan(want[j])));
        if let Some(j) = bad {
            wrong.push(format!(
                "{instruction} a={:#x} b={:#x} c={:#x}: {:#x}, gcc {:#x}",
                a[j], b[j], c[j], got[j], want[j]
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
