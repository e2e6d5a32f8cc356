//! Floating-point arithmetic.

use super::*;
use crate::alu;
use crate::machine::lanes::{AluFn, Bf, Hf};
use crate::machine::num::{self, Round};

/// NVIDIA's f32 arithmetic gives this NaN whatever the operands' payloads.
const NAN32: f32 = f32::from_bits(0x7fff_ffff);

#[inline(always)]
fn flush<const FTZ: bool>(x: f32) -> f32 {
    if FTZ && x.abs() < f32::MIN_POSITIVE {
        f32::from_bits(x.to_bits() & 0x8000_0000)
    } else {
        x
    }
}

#[inline(always)]
fn finish<const FTZ: bool, const SAT: bool>(x: f32) -> f32 {
    let x = flush::<FTZ>(x);
    if SAT {
        // NaN becomes +0.
        if x > 0.0 {
            if x > 1.0 { 1.0 } else { x }
        } else {
            0.0
        }
    } else {
        // As integers: to LLVM all NaNs are alike, it would drop a selection between two.
        f32::from_bits(if x.is_nan() {
            NAN32.to_bits()
        } else {
            x.to_bits()
        })
    }
}

/// An f32 function in its four versions: flushing or not, saturating or not.
macro_rules! single {
    ($ftz:expr, $sat:expr; $($v:ident),+; $e:expr) => {
        match ($ftz, $sat) {
            (false, false) => single!(@ false, false; $($v),+; $e),
            (false, true) => single!(@ false, true; $($v),+; $e),
            (true, false) => single!(@ true, false; $($v),+; $e),
            (true, true) => single!(@ true, true; $($v),+; $e),
        }
    };
    ($ftz:expr; $($v:ident),+; $e:expr) => {
        if $ftz { single!(@ true, false; $($v),+; $e) } else { single!(@ false, false; $($v),+; $e) }
    };
    (@ $f:literal, $s:literal; $a:ident; $e:expr) => {
        alu!(f32; $a: f32; { let $a = flush::<$f>($a); finish::<$f, $s>($e) })
    };
    (@ $f:literal, $s:literal; $a:ident, $b:ident; $e:expr) => {
        alu!(f32; $a: f32, $b: f32; {
            let ($a, $b) = (flush::<$f>($a), flush::<$f>($b));
            finish::<$f, $s>($e)
        })
    };
    (@ $f:literal, $s:literal; $a:ident, $b:ident, $c:ident; $e:expr) => {
        alu!(f32; $a: f32, $b: f32, $c: f32; {
            let ($a, $b, $c) = (flush::<$f>($a), flush::<$f>($b), flush::<$f>($c));
            finish::<$f, $s>($e)
        })
    };
}

/// A function whose result is rounded in a direction that must be known when it is compiled.
macro_rules! directed {
    ($make:ident!($($head:tt)*), $round:expr, |$r:ident| $e:expr) => {
        match $round {
            Round::Zero => { const $r: Round = Round::Zero; $make!($($head)* $e) }
            Round::Down => { const $r: Round = Round::Down; $make!($($head)* $e) }
            _ => { const $r: Round = Round::Up; $make!($($head)* $e) }
        }
    };
}

/// A format of 16 bits with arithmetic rounded once.
trait Short: Copy {
    fn value(self) -> f32;
    fn rounded(x: f32) -> Self;
    fn from_bits(bits: u16) -> Self;
    fn bits(self) -> u16;
}

impl Short for Hf {
    #[inline(always)]
    fn value(self) -> f32 {
        num::f16_to_f32(self.0)
    }
    #[inline(always)]
    fn rounded(x: f32) -> Self {
        Hf(num::f16_from_f32(x))
    }
    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Hf(bits)
    }
    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }
}

impl Short for Bf {
    #[inline(always)]
    fn value(self) -> f32 {
        num::bf16_to_f32(self.0)
    }
    #[inline(always)]
    fn rounded(x: f32) -> Self {
        Bf(num::bf16_from_f32(x))
    }
    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Bf(bits)
    }
    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }
}

/// Exact for sums and products of 16-bit formats up to a rounding that is harmless: f32 has more
/// than twice their significand.
macro_rules! short {
    ($ty:expr, $sat:expr; $($v:ident),+; $e:expr) => {
        match ($ty, $sat) {
            (Type::F16, false) => Some(short!(@ Hf, |x: f32| x; $($v),+; $e)),
            (Type::F16, true) => Some(short!(@ Hf, unit; $($v),+; $e)),
            (Type::Bf16, false) => Some(short!(@ Bf, |x: f32| x; $($v),+; $e)),
            (Type::Bf16, true) => Some(short!(@ Bf, unit; $($v),+; $e)),
            (Type::F16x2, false) => Some(short!(@@ Hf, |x: f32| x; $($v),+; $e)),
            (Type::F16x2, true) => Some(short!(@@ Hf, unit; $($v),+; $e)),
            (Type::Bf16x2, false) => Some(short!(@@ Bf, |x: f32| x; $($v),+; $e)),
            (Type::Bf16x2, true) => Some(short!(@@ Bf, unit; $($v),+; $e)),
            _ => None,
        }
    };
    (@ $t:ident, $fix:expr; $a:ident; $e:expr) => {
        alu!($t; $a: $t; { let $a = $a.value(); $t::rounded(($fix)($e)) })
    };
    (@ $t:ident, $fix:expr; $a:ident, $b:ident; $e:expr) => {
        alu!($t; $a: $t, $b: $t; {
            let ($a, $b) = ($a.value(), $b.value());
            $t::rounded(($fix)($e))
        })
    };
    (@ $t:ident, $fix:expr; $a:ident, $b:ident, $c:ident; $e:expr) => {
        alu!($t; $a: $t, $b: $t, $c: $t; {
            let ($a, $b, $c) = ($a.value(), $b.value(), $c.value());
            $t::rounded(($fix)($e))
        })
    };
    (@@ $t:ident, $fix:expr; $a:ident; $e:expr) => {
        alu!(u32; x: u32; {
            let lo = { let $a = part::<$t>(x, 0); $t::rounded(($fix)($e)).bits() };
            let hi = { let $a = part::<$t>(x, 16); $t::rounded(($fix)($e)).bits() };
            lo as u32 | (hi as u32) << 16
        })
    };
    (@@ $t:ident, $fix:expr; $a:ident, $b:ident; $e:expr) => {
        alu!(u32; x: u32, y: u32; {
            let lo = {
                let ($a, $b) = (part::<$t>(x, 0), part::<$t>(y, 0));
                $t::rounded(($fix)($e)).bits()
            };
            let hi = {
                let ($a, $b) = (part::<$t>(x, 16), part::<$t>(y, 16));
                $t::rounded(($fix)($e)).bits()
            };
            lo as u32 | (hi as u32) << 16
        })
    };
    (@@ $t:ident, $fix:expr; $a:ident, $b:ident, $c:ident; $e:expr) => {
        alu!(u32; x: u32, y: u32, z: u32; {
            let lo = {
                let ($a, $b, $c) = (part::<$t>(x, 0), part::<$t>(y, 0), part::<$t>(z, 0));
                $t::rounded(($fix)($e)).bits()
            };
            let hi = {
                let ($a, $b, $c) = (part::<$t>(x, 16), part::<$t>(y, 16), part::<$t>(z, 16));
                $t::rounded(($fix)($e)).bits()
            };
            lo as u32 | (hi as u32) << 16
        })
    };
}

#[inline(always)]
fn part<T: Short>(x: u32, shift: u32) -> f32 {
    T::from_bits((x >> shift) as u16).value()
}

#[inline(always)]
fn unit(x: f32) -> f32 {
    if x > 0.0 {
        if x > 1.0 { 1.0 } else { x }
    } else {
        0.0
    }
}

/// Negative values become zero; NaN stays.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn fma_short(a: f32, b: f32, c: f32) -> f32 {
    num::f32_odd(num::fma_odd(a as f64, b as f64, c as f64))
}

/// The smaller operand; a NaN loses to a number, -0 is below +0.
#[inline(always)]
fn min32(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else if a == b {
        f32::from_bits(a.to_bits() | b.to_bits())
    } else if a < b {
        a
    } else {
        b
    }
}

#[inline(always)]
fn max32(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else if a == b {
        f32::from_bits(a.to_bits() & b.to_bits())
    } else if a > b {
        a
    } else {
        b
    }
}

/// As [`min32`], but a NaN wins.
#[inline(always)]
fn min_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        NAN32
    } else {
        min32(a, b)
    }
}

#[inline(always)]
fn max_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        NAN32
    } else {
        max32(a, b)
    }
}

/// Minimum or maximum of magnitudes with the product's sign.
#[inline(always)]
fn xorsign(a: f32, b: f32, pick: fn(f32, f32) -> f32) -> f32 {
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    f32::from_bits(pick(a.abs(), b.abs()).to_bits() | sign)
}

fn two_product_error(a: f64, b: f64, product: f64) -> f64 {
    a.mul_add(b, -product)
}

fn two_sum_error(a: f64, b: f64, s: f64) -> f64 {
    let bb = s - a;
    (a - (s - bb)) + (b - bb)
}

impl<'a> Body<'_, '_, 'a> {
    fn float_alu(
        &mut self,
        ins: &Ins<'_, 'a>,
        class: Class,
        flops: u8,
        f: AluFn,
        d: Slot,
        s: [Slot; 3],
    ) {
        let [a, b, c] = s;
        self.emit_flops(ins, class, flops, Op::Alu { f, d, a, b, c });
    }

    pub(super) fn float_arithmetic(&mut self, ins: &mut Ins<'_, 'a>, ty: Type) -> Result<()> {
        match ty {
            Type::F32 => self.single(ins),
            Type::F64 => self.double(ins),
            Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 => self.half(ins, ty),
            _ => ins.bad_type(ty),
        }
    }

    fn single(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let (ftz, sat) = (ins.take("ftz"), ins.take("sat"));
        let opcode = ins.i.opcode;
        if opcode == "div" && ins.one(&["approx", "full"]).is_some() {
            ins.done()?;
            let (d, s) = self.uniform(ins, Type::F32)?;
            let op = Op::Approx {
                f: Approx::Div,
                d,
                a: s[0],
                b: s[1],
                half: None,
                ftz,
                sat,
            };
            self.emit_flops(ins, Class::Special, 1, op);
            return Ok(());
        }
        let round = ins.round();
        let (nan, xor) = (ins.take("NaN"), ins.take("xorsign"));
        let absolute = xor && ins.take("abs");
        ins.done()?;
        if xor != absolute || (nan || xor) && !matches!(opcode, "min" | "max") {
            return ins.error("this combination of modifiers is not implemented");
        }
        if round.is_some() && matches!(opcode, "min" | "max" | "abs" | "neg")
            || round.is_none() && matches!(opcode, "fma" | "div" | "mad")
            || sat && matches!(opcode, "min" | "max" | "abs" | "neg" | "div")
            || sat && round.is_some_and(|r| r != Round::Nearest)
        {
            return ins.error("this combination of modifiers is not implemented");
        }
        use Round::Nearest;
        let f = match (opcode, round.unwrap_or(Nearest)) {
            ("add", Nearest) => single!(ftz, sat; a, b; a + b),
            ("add", r) => directed!(single!(ftz; a, b;), r, |R| sum(a, b, R)),
            ("sub", Nearest) => single!(ftz, sat; a, b; a - b),
            ("sub", r) => directed!(single!(ftz; a, b;), r, |R| sum(a, -b, R)),
            ("mul", Nearest) => single!(ftz, sat; a, b; a * b),
            ("mul", r) => {
                directed!(single!(ftz; a, b;), r, |R| num::f32_from_f64(
                    a as f64 * b as f64,
                    R
                ))
            }
            ("fma" | "mad", Nearest) => single!(ftz, sat; a, b, c; a.mul_add(b, c)),
            ("fma" | "mad", r) => directed!(single!(ftz; a, b, c;), r, |R| fma(a, b, c, R)),
            ("div", Nearest) => single!(ftz; a, b; a / b),
            // The f64 quotient of two f32 is never on the wrong side of an f32.
            ("div", r) => {
                directed!(single!(ftz; a, b;), r, |R| num::f32_from_f64(
                    a as f64 / b as f64,
                    R
                ))
            }
            ("abs", _) => single!(ftz; a; a.abs()),
            ("neg", _) => single!(ftz; a; -a),
            ("min", _) if xor && nan => single!(ftz; a, b; xorsign(a, b, min_nan)),
            ("max", _) if xor && nan => single!(ftz; a, b; xorsign(a, b, max_nan)),
            ("min", _) if xor => single!(ftz; a, b; xorsign(a, b, min32)),
            ("max", _) if xor => single!(ftz; a, b; xorsign(a, b, max32)),
            ("min", _) if nan => single!(ftz; a, b; min_nan(a, b)),
            ("max", _) if nan => single!(ftz; a, b; max_nan(a, b)),
            ("min", _) => single!(ftz; a, b; min32(a, b)),
            ("max", _) => single!(ftz; a, b; max32(a, b)),
            _ => return ins.bad_type(Type::F32),
        };
        if matches!(opcode, "min" | "max") && ins.i.operands.len() != 3 {
            return ins.error("three inputs are not implemented");
        }
        let (d, s) = self.uniform(ins, Type::F32)?;
        let flops = if matches!(opcode, "fma" | "mad") {
            2
        } else {
            1
        };
        self.float_alu(ins, Class::Single, flops, f, d, s);
        Ok(())
    }

    fn double(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        use Round::Nearest;
        let opcode = ins.i.opcode;
        let round = ins.round();
        ins.done()?;
        if round.is_none() && matches!(opcode, "fma" | "div" | "mad") {
            return ins.error("a rounding is missing");
        }
        let f: AluFn = match (opcode, round.unwrap_or(Nearest)) {
            ("add", Nearest) => alu!(f64; a: f64, b: f64; a + b),
            ("add", r) => directed!(alu!(f64; a: f64, b: f64;), r, |R| {
                let s = a + b;
                num::direct(s, two_sum_error(a, b, s), a.is_finite() && b.is_finite(), R)
            }),
            ("sub", Nearest) => alu!(f64; a: f64, b: f64; a - b),
            ("mul", Nearest) => alu!(f64; a: f64, b: f64; a * b),
            ("mul", r) => directed!(alu!(f64; a: f64, b: f64;), r, |R| {
                let p = a * b;
                num::direct(
                    p,
                    two_product_error(a, b, p),
                    a.is_finite() && b.is_finite(),
                    R,
                )
            }),
            ("fma" | "mad", Nearest) => alu!(f64; a: f64, b: f64, c: f64; a.mul_add(b, c)),
            ("div", Nearest) => alu!(f64; a: f64, b: f64; a / b),
            ("abs", _) if round.is_none() => alu!(f64; a: f64; a.abs()),
            ("neg", _) if round.is_none() => alu!(f64; a: f64; -a),
            ("min", _) if round.is_none() => alu!(f64; a: f64, b: f64; {
                if a.is_nan() { b } else if b.is_nan() { a }
                else if a == b { f64::from_bits(a.to_bits() | b.to_bits()) }
                else if a < b { a } else { b }
            }),
            ("max", _) if round.is_none() => alu!(f64; a: f64, b: f64; {
                if a.is_nan() { b } else if b.is_nan() { a }
                else if a == b { f64::from_bits(a.to_bits() & b.to_bits()) }
                else if a > b { a } else { b }
            }),
            _ => return ins.error("this form is not implemented for .f64"),
        };
        let (d, s) = self.uniform(ins, Type::F64)?;
        let flops = if matches!(opcode, "fma" | "mad") {
            2
        } else {
            1
        };
        self.float_alu(ins, Class::Double, flops, f, d, s);
        Ok(())
    }

    fn half(&mut self, ins: &mut Ins<'_, 'a>, ty: Type) -> Result<()> {
        let opcode = ins.i.opcode;
        let rn = ins.take("rn");
        let (sat, rectify) = (ins.take("sat"), ins.take("relu"));
        let (nan, xor) = (ins.take("NaN"), ins.take("xorsign"));
        let absolute = xor && ins.take("abs");
        ins.done()?;
        let minmax = matches!(opcode, "min" | "max");
        let bf = matches!(ty, Type::Bf16 | Type::Bf16x2);
        if xor != absolute
            || (nan || xor) && !minmax
            || sat && (bf || !matches!(opcode, "add" | "sub" | "mul" | "fma"))
            || rectify && (opcode != "fma" || sat)
            || rn && !matches!(opcode, "add" | "sub" | "mul" | "fma")
            || !rn && opcode == "fma"
        {
            return ins.error("this combination of modifiers is not implemented");
        }
        let f = match opcode {
            "add" => short!(ty, sat; a, b; a + b),
            "sub" => short!(ty, sat; a, b; a - b),
            "mul" => short!(ty, sat; a, b; a * b),
            // relu after the rounding equals relu before it: zero is a value of the format.
            "fma" if rectify => short!(ty, false; a, b, c; relu(fma_short(a, b, c))),
            "fma" => short!(ty, sat; a, b, c; fma_short(a, b, c)),
            // Bit operations: NaNs keep their payload.
            "neg" | "abs" => {
                let (one, two) = if opcode == "neg" {
                    (
                        alu!(u16; a: u16; a ^ 0x8000),
                        alu!(u32; a: u32; a ^ 0x8000_8000),
                    )
                } else {
                    (
                        alu!(u16; a: u16; a & 0x7fff),
                        alu!(u32; a: u32; a & 0x7fff_7fff),
                    )
                };
                Some(if ty.size() == 2 { one } else { two })
            }
            "min" if xor && nan => short!(ty, false; a, b; xorsign(a, b, min_nan)),
            "max" if xor && nan => short!(ty, false; a, b; xorsign(a, b, max_nan)),
            "min" if xor => short!(ty, false; a, b; xorsign(a, b, min32)),
            "max" if xor => short!(ty, false; a, b; xorsign(a, b, max32)),
            "min" if nan => short!(ty, false; a, b; min_nan(a, b)),
            "max" if nan => short!(ty, false; a, b; max_nan(a, b)),
            "min" => short!(ty, false; a, b; min32(a, b)),
            "max" => short!(ty, false; a, b; max32(a, b)),
            _ => None,
        };
        let Some(f) = f else { return ins.bad_type(ty) };
        if minmax && ins.i.operands.len() != 3 {
            return ins.error("three inputs are not implemented");
        }
        let bits = if ty.size() == 2 { Type::B16 } else { Type::B32 };
        let (d, s) = self.uniform(ins, bits)?;
        let flops = if opcode == "fma" { 2 } else { 1 } * ty.size() as u8 / 2;
        self.float_alu(ins, Class::Half, flops, f, d, s);
        Ok(())
    }

    /// Functions of one operand: exact roundings of rcp and sqrt, approximations of all.
    pub(super) fn function1(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let opcode = ins.i.opcode;
        let ftz = ins.take("ftz");
        let approx = ins.take("approx");
        let round = ins.round();
        let ty = ins.ty()?;
        ins.done()?;
        let f = match opcode {
            "rcp" => Approx::Rcp,
            "sqrt" => Approx::Sqrt,
            "rsqrt" => Approx::Rsqrt,
            "sin" => Approx::Sin,
            "cos" => Approx::Cos,
            "lg2" => Approx::Lg2,
            "ex2" => Approx::Ex2,
            _ => Approx::Tanh,
        };
        let short = matches!(ty, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2);
        if short && matches!(f, Approx::Ex2 | Approx::Tanh) && approx {
            // `ex2.approx.ftz.bf16` flushes nothing that bf16 could hold apart: refuse the rest.
            if ftz && !matches!(ty, Type::Bf16 | Type::Bf16x2) {
                return ins.error("modifier .ftz is not implemented for .f16");
            }
            let bits = if ty.size() == 2 { Type::B16 } else { Type::B32 };
            let (d, s) = self.uniform(ins, bits)?;
            let op = Op::Approx {
                f,
                d,
                a: s[0],
                b: 0,
                half: Some(ty),
                ftz,
                sat: false,
            };
            self.emit_flops(ins, Class::Special, ty.size() as u8 / 2, op);
            return Ok(());
        }
        match (ty, approx, round) {
            (Type::F32, true, None) => {
                let (d, s) = self.uniform(ins, ty)?;
                let op = Op::Approx {
                    f,
                    d,
                    a: s[0],
                    b: 0,
                    half: None,
                    ftz,
                    sat: false,
                };
                self.emit_flops(ins, Class::Special, 1, op);
                Ok(())
            }
            (Type::F32, false, Some(round)) => {
                let f = match (f, round) {
                    (Approx::Rcp, Round::Nearest) => single!(ftz; a; 1.0 / a),
                    (Approx::Rcp, r) => {
                        directed!(single!(ftz; a;), r, |R| num::f32_from_f64(
                            1.0 / a as f64,
                            R
                        ))
                    }
                    (Approx::Sqrt, Round::Nearest) => single!(ftz; a; a.sqrt()),
                    (Approx::Sqrt, r) => {
                        directed!(single!(ftz; a;), r, |R| num::f32_from_f64(
                            (a as f64).sqrt(),
                            R
                        ))
                    }
                    _ => return ins.error("this function has no exact rounding"),
                };
                let (d, s) = self.uniform(ins, ty)?;
                self.float_alu(ins, Class::Special, 1, f, d, s);
                Ok(())
            }
            (Type::F64, false, Some(Round::Nearest)) if !ftz => {
                let f = match f {
                    Approx::Rcp => alu!(f64; a: f64; 1.0 / a),
                    Approx::Sqrt => alu!(f64; a: f64; a.sqrt()),
                    _ => return ins.bad_type(ty),
                };
                let (d, s) = self.uniform(ins, ty)?;
                self.float_alu(ins, Class::Double, 1, f, d, s);
                Ok(())
            }
            // Made for the first step of a division: 20 bits, from and to the upper word alone.
            (Type::F64, true, None) if ftz && matches!(f, Approx::Rcp | Approx::Rsqrt) => {
                let f = if f == Approx::Rcp {
                    alu!(f64; a: f64; upper(1.0 / upper_input(a)))
                } else {
                    alu!(f64; a: f64; upper(1.0 / upper_input(a).sqrt()))
                };
                let (d, s) = self.uniform(ins, ty)?;
                self.float_alu(ins, Class::Special, 1, f, d, s);
                Ok(())
            }
            (Type::F64, true, None) if f == Approx::Rsqrt => {
                let f = alu!(f64; a: f64; 1.0 / a.sqrt());
                let (d, s) = self.uniform(ins, ty)?;
                self.float_alu(ins, Class::Special, 1, f, d, s);
                Ok(())
            }
            _ => ins.error("this form is not implemented"),
        }
    }

    pub(super) fn float_misc(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if ins.i.opcode == "copysign" {
            let ty = ins.ty()?;
            ins.done()?;
            // The sign of a, the magnitude of b.
            let f = match ty {
                Type::F32 => alu!(u32; a: u32, b: u32; (b & 0x7fff_ffff) | (a & 0x8000_0000)),
                Type::F64 => alu!(u64; a: u64, b: u64; (b & !(1 << 63)) | (a & (1 << 63))),
                _ => return ins.bad_type(ty),
            };
            let (d, s) = self.uniform(ins, ty)?;
            let class = if ty == Type::F32 {
                Class::Single
            } else {
                Class::Double
            };
            self.alu(ins, class, f, d, s);
            return Ok(());
        }
        use crate::cmp;
        let kind = ins.one(&[
            "finite",
            "infinite",
            "number",
            "notanumber",
            "normal",
            "subnormal",
        ]);
        let ty = ins.ty()?;
        ins.done()?;
        let f = match (ty, kind) {
            (Type::F32, Some("finite")) => cmp!(a: f32, _b: u32; a.is_finite()),
            (Type::F32, Some("infinite")) => cmp!(a: f32, _b: u32; a.is_infinite()),
            (Type::F32, Some("number")) => cmp!(a: f32, _b: u32; !a.is_nan()),
            (Type::F32, Some("notanumber")) => cmp!(a: f32, _b: u32; a.is_nan()),
            (Type::F32, Some("normal")) => cmp!(a: f32, _b: u32; a.is_normal()),
            (Type::F32, Some("subnormal")) => cmp!(a: f32, _b: u32; a.is_subnormal()),
            (Type::F64, Some("finite")) => cmp!(a: f64, _b: u32; a.is_finite()),
            (Type::F64, Some("infinite")) => cmp!(a: f64, _b: u32; a.is_infinite()),
            (Type::F64, Some("number")) => cmp!(a: f64, _b: u32; !a.is_nan()),
            (Type::F64, Some("notanumber")) => cmp!(a: f64, _b: u32; a.is_nan()),
            (Type::F64, Some("normal")) => cmp!(a: f64, _b: u32; a.is_normal()),
            (Type::F64, Some("subnormal")) => cmp!(a: f64, _b: u32; a.is_subnormal()),
            _ => return ins.error("this form is not implemented"),
        };
        let [d, a] = ins.operands()?;
        let Operand::Name(d, None) = d else {
            return ins.error("the destination is not a predicate");
        };
        let a = self.src(ins, a, ty)?;
        let d = self.pred_dst(ins, d)?;
        self.emit(
            ins,
            Class::Compare,
            Op::Cmp {
                f,
                d,
                q: None,
                a,
                b: 0,
                with: None,
            },
        );
        Ok(())
    }
}

/// The operand without its lower word; subnormals become zero.
#[inline(always)]
fn upper_input(a: f64) -> f64 {
    let a = f64::from_bits(a.to_bits() & !0xffff_ffff);
    if a.abs() < f64::MIN_POSITIVE {
        0f64.copysign(a)
    } else {
        a
    }
}

/// The result rounded to its upper word; subnormals become zero.
#[inline(always)]
fn upper(x: f64) -> f64 {
    if !x.is_finite() {
        return x;
    }
    let x = f64::from_bits(x.to_bits().wrapping_add(0x8000_0000) & !0xffff_ffff);
    if x.abs() < f64::MIN_POSITIVE {
        0f64.copysign(x)
    } else {
        x
    }
}

fn sum(a: f32, b: f32, round: Round) -> f32 {
    let s = num::add_odd(a as f64, b as f64);
    // Rounding down, a zero is -0 unless both operands are +0.
    if s == 0.0 && round == Round::Down && (a.is_sign_negative() || b.is_sign_negative()) {
        return -0.0;
    }
    num::f32_from_f64(s, round)
}

fn fma(a: f32, b: f32, c: f32, round: Round) -> f32 {
    let s = num::fma_odd(a as f64, b as f64, c as f64);
    let product_negative = a.is_sign_negative() != b.is_sign_negative();
    if s == 0.0 && round == Round::Down && (product_negative || c.is_sign_negative()) {
        return -0.0;
    }
    num::f32_from_f64(s, round)
}
