//! Moves, conversions, comparisons, selections.

use super::*;
use crate::machine::lanes::{AluFn, CmpFn};
use crate::machine::num::{self, Round};
use crate::{alu, cmp};

#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        f32::from_bits(x.to_bits() & 0x8000_0000)
    } else {
        x
    }
}

/// The comparisons of one Rust type; those of floats are false on NaN.
macro_rules! ordered {
    ($name:expr, $t:ty, |$x:ident| $value:expr) => {
        match $name {
            "eq" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p == q })),
            "ne" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p != q })),
            "lt" | "lo" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p < q })),
            "le" | "ls" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p <= q })),
            "gt" | "hi" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p > q })),
            "ge" | "hs" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p >= q })),
            _ => None,
        }
    };
}

/// Adds the comparisons that only floats have.
macro_rules! floating {
    ($name:expr, $t:ty, |$x:ident| $value:expr) => {
        match $name {
            "ne" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p < q || p > q })),
            "equ" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); !(p < q || p > q) })),
            "neu" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p != q })),
            "ltu" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p < q || p.is_nan() || q.is_nan() })),
            "leu" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p <= q || p.is_nan() || q.is_nan() })),
            "gtu" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p > q || p.is_nan() || q.is_nan() })),
            "geu" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p >= q || p.is_nan() || q.is_nan() })),
            "num" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); !p.is_nan() && !q.is_nan() })),
            "nan" => Some(cmp!(a: $t, b: $t; { let (p, q) = ({ let $x = a; $value }, { let $x = b; $value }); p.is_nan() || q.is_nan() })),
            other => ordered!(other, $t, |$x| $value),
        }
    };
}

/// A conversion between integer types: the value, cut to `$to`, spread over `$r`.
macro_rules! integers {
    ($from:expr, $to:ty, $r:ty) => {
        match $from {
            Type::U8 => Some(alu!($r; a: u8; (a as $to) as $r)),
            Type::S8 => Some(alu!($r; a: i8; (a as $to) as $r)),
            Type::U16 => Some(alu!($r; a: u16; (a as $to) as $r)),
            Type::S16 => Some(alu!($r; a: i16; (a as $to) as $r)),
            Type::U32 => Some(alu!($r; a: u32; (a as $to) as $r)),
            Type::S32 => Some(alu!($r; a: i32; (a as $to) as $r)),
            Type::U64 => Some(alu!($r; a: u64; (a as $to) as $r)),
            Type::S64 => Some(alu!($r; a: i64; (a as $to) as $r)),
            _ => None,
        }
    };
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

// `p < q || p > q` is false on NaN, `p != q` is true.
#[allow(clippy::double_comparisons)]
fn comparison(name: &str, ty: Type, ftz: bool) -> Option<CmpFn> {
    use Type::*;
    let unsigned_only = matches!(name, "lo" | "ls" | "hi" | "hs");
    match ty {
        B16 | B32 | B64 if !matches!(name, "eq" | "ne") => None,
        _ if unsigned_only && !matches!(ty, U16 | U32 | U64) => None,
        U16 | B16 => ordered!(name, u16, |x| x),
        U32 | B32 => ordered!(name, u32, |x| x),
        U64 | B64 => ordered!(name, u64, |x| x),
        S16 => ordered!(name, i16, |x| x),
        S32 => ordered!(name, i32, |x| x),
        S64 => ordered!(name, i64, |x| x),
        F32 if ftz => floating!(name, f32, |x| flush(x)),
        F32 => floating!(name, f32, |x| x),
        F64 => floating!(name, f64, |x| x),
        F16 => floating!(name, u16, |x| num::f16_to_f32(x)),
        Bf16 => floating!(name, u16, |x| num::bf16_to_f32(x)),
        _ => None,
    }
}

/// Comparison of the upper halves.
#[allow(clippy::double_comparisons)]
fn comparison_high(name: &str, ty: Type) -> Option<CmpFn> {
    match ty {
        Type::F16x2 => floating!(name, u32, |x| num::f16_to_f32((x >> 16) as u16)),
        Type::Bf16x2 => floating!(name, u32, |x| num::bf16_to_f32((x >> 16) as u16)),
        _ => None,
    }
}

impl<'a> Body<'_, '_, 'a> {
    pub(super) fn compare(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "setp" => self.setp(ins),
            "set" => self.set(ins),
            "selp" => {
                let ty = ins.ty()?;
                ins.done()?;
                let [d, a, b, p] = ins.operands()?;
                let [a, b] = self.srcs(ins, [a, b], ty)?;
                let d = self.dst(ins, d, ty)?;
                let (p, negate) = self.pred_src(ins, p)?;
                let op = Op::Select {
                    d,
                    a,
                    b,
                    p,
                    negate,
                    wide: wide(ty),
                };
                self.emit(ins, Class::Move, op);
                Ok(())
            }
            _ => {
                let ftz = ins.take("ftz");
                let ty = ins.ty()?;
                let by = ins.ty()?;
                ins.done()?;
                let f = match by {
                    Type::S32 => cmp!(a: i32, _b: u32; a >= 0),
                    Type::F32 if ftz => cmp!(a: f32, _b: u32; flush(a) >= 0.0),
                    Type::F32 => cmp!(a: f32, _b: u32; a >= 0.0),
                    _ => return ins.bad_type(by),
                };
                let [d, a, b, c] = ins.operands()?;
                let [a, b] = self.srcs(ins, [a, b], ty)?;
                let c = self.src(ins, c, by)?;
                let d = self.dst(ins, d, ty)?;
                let p = self.pred_dst(ins, "_")?;
                self.emit(
                    ins,
                    Class::Compare,
                    Op::Cmp {
                        f,
                        d: p,
                        q: None,
                        a: c,
                        b: 0,
                        with: None,
                    },
                );
                let op = Op::Select {
                    d,
                    a,
                    b,
                    p,
                    negate: false,
                    wide: wide(ty),
                };
                self.emit(ins, Class::Move, op);
                Ok(())
            }
        }
    }

    fn setp(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let Some(name) = ins.one(&COMPARISONS) else {
            return ins.error("this comparison is not implemented");
        };
        let logic = ins.one(&["and", "or", "xor"]);
        let ftz = ins.take("ftz");
        let ty = ins.ty()?;
        ins.done()?;
        let packed = matches!(ty, Type::F16x2 | Type::Bf16x2);
        let (first, second) = match ins.i.operands.first() {
            Some(Operand::Name(p, None)) => (*p, None),
            Some(Operand::Pair(p, q)) => (*p, Some(*q)),
            _ => return ins.error("the destination is not a predicate"),
        };
        let wanted = if logic.is_some() { 4 } else { 3 };
        if ins.i.operands.len() != wanted {
            return ins.error(format!("expected {wanted} operands"));
        }
        let bits = match ty {
            Type::F16 | Type::Bf16 => Type::B16,
            Type::F16x2 | Type::Bf16x2 => Type::B32,
            other => other,
        };
        let [a, b] = self.srcs(ins, [&ins.i.operands[1], &ins.i.operands[2]], bits)?;
        let with = match logic {
            Some(op) => {
                let (p, negated) = self.pred_src(ins, &ins.i.operands[3])?;
                let op = match op {
                    "and" => Bool::And,
                    "or" => Bool::Or,
                    _ => Bool::Xor,
                };
                Some((op, p, negated))
            }
            None => None,
        };
        let d = self.pred_dst(ins, first)?;
        let q = second.map(|q| self.pred_dst(ins, q)).transpose()?;
        if packed {
            let low = if ty == Type::F16x2 {
                Type::F16
            } else {
                Type::Bf16
            };
            let lo = comparison(name, low, false);
            let hi = comparison_high(name, ty);
            let (Some(lo), Some(hi), Some(q), false) = (lo, hi, q, ftz) else {
                return ins.error("this form is not implemented");
            };
            self.emit(
                ins,
                Class::Compare,
                Op::Cmp2 {
                    lo,
                    hi,
                    d,
                    q,
                    a,
                    b,
                    with,
                },
            );
            return Ok(());
        }
        if ftz && ty != Type::F32 {
            return ins.error("modifier .ftz is not implemented here");
        }
        let Some(f) = comparison(name, ty, ftz) else {
            return ins.bad_type(ty);
        };
        self.emit(
            ins,
            Class::Compare,
            Op::Cmp {
                f,
                d,
                q,
                a,
                b,
                with,
            },
        );
        Ok(())
    }

    fn set(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let Some(name) = ins.one(&COMPARISONS) else {
            return ins.error("this comparison is not implemented");
        };
        let ftz = ins.take("ftz");
        let to = ins.ty()?;
        let from = ins.ty()?;
        ins.done()?;
        if ftz && from != Type::F32 {
            return ins.error("modifier .ftz is not implemented here");
        }
        let [d, a, b] = ins.operands()?;
        let packed = matches!(from, Type::F16x2 | Type::Bf16x2);
        let bits = match from {
            Type::F16 | Type::Bf16 => Type::B16,
            Type::F16x2 | Type::Bf16x2 => Type::B32,
            other => other,
        };
        let [a, b] = self.srcs(ins, [a, b], bits)?;
        let p = self.pred_dst(ins, "_")?;
        if packed {
            // A half of the result is 1.0 or all ones where the halves compare true.
            let (one, bits) = match to {
                t if t == from => (
                    if from == Type::F16x2 {
                        0x3c00u64
                    } else {
                        0x3f80
                    },
                    Type::B32,
                ),
                Type::U32 | Type::S32 | Type::B32 => (0xffff, Type::B32),
                _ => return ins.bad_type(to),
            };
            let low = if from == Type::F16x2 {
                Type::F16
            } else {
                Type::Bf16
            };
            let (Some(lo), Some(hi)) = (comparison(name, low, false), comparison_high(name, from))
            else {
                return ins.bad_type(from);
            };
            let q = self.pred_dst(ins, "_")?;
            self.emit(
                ins,
                Class::Compare,
                Op::Cmp2 {
                    lo,
                    hi,
                    d: p,
                    q,
                    a,
                    b,
                    with: None,
                },
            );
            let d = self.dst(ins, d, bits)?;
            let (l, h) = (self.new_slot(false), self.new_slot(false));
            let (one_lo, one_hi) = (self.constant(one, false), self.constant(one << 16, false));
            for (d, a, p) in [(l, one_lo, p), (h, one_hi, q)] {
                self.emit(
                    ins,
                    Class::Move,
                    Op::Select {
                        d,
                        a,
                        b: 0,
                        p,
                        negate: false,
                        wide: false,
                    },
                );
            }
            self.alu(
                ins,
                Class::Move,
                alu!(u32; a: u32, b: u32; a | b),
                d,
                [l, h, 0],
            );
            return Ok(());
        }
        let one = match to {
            Type::U32 | Type::S32 | Type::B32 => 0xffff_ffff,
            Type::F32 => 1f32.to_bits() as u64,
            Type::F16 => 0x3c00,
            Type::Bf16 => 0x3f80,
            Type::U16 | Type::S16 => 0xffff,
            _ => return ins.bad_type(to),
        };
        let Some(f) = comparison(name, from, ftz) else {
            return ins.bad_type(from);
        };
        let d = self.dst(ins, d, if to.size() == 2 { Type::B16 } else { Type::B32 })?;
        self.emit(
            ins,
            Class::Compare,
            Op::Cmp {
                f,
                d: p,
                q: None,
                a,
                b,
                with: None,
            },
        );
        let a = self.constant(one, false);
        self.emit(
            ins,
            Class::Move,
            Op::Select {
                d,
                a,
                b: 0,
                p,
                negate: false,
                wide: false,
            },
        );
        Ok(())
    }

    pub(super) fn convert(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "mov" => self.mov(ins),
            "cvt" => self.cvt(ins),
            "isspacep" => {
                let name = ins.one(&["global", "shared", "local", "const", "param"]);
                ins.done()?;
                let space = match name {
                    Some("global" | "const") => Space::Global,
                    Some("shared") => Space::Shared,
                    Some("local") => Space::Local,
                    Some("param") => Space::Param,
                    _ => return ins.error("a space is missing"),
                };
                if name == Some("const") {
                    return ins.error("constant memory is not told from global memory");
                }
                let [d, a] = ins.operands()?;
                let Operand::Name(d, None) = d else {
                    return ins.error("the destination is not a predicate");
                };
                let a = self.src(ins, a, Type::B64)?;
                let d = self.pred_dst(ins, d)?;
                self.emit(ins, Class::Compare, Op::IsSpace { d, a, space });
                Ok(())
            }
            _ => self.cvta(ins),
        }
    }

    fn cvta(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let to = ins.take("to");
        let window = match ins.one(&["global", "shared::cta", "shared", "local", "const", "param"])
        {
            Some("global" | "const") => 0,
            Some("shared" | "shared::cta") => SHARED_WINDOW,
            Some("local") => LOCAL_WINDOW,
            Some("param") => PARAM_WINDOW,
            _ => return ins.error("a space is missing"),
        };
        ins.take("entry");
        let ty = ins.ty()?;
        ins.done()?;
        if ty != Type::U64 {
            return ins.bad_type(ty);
        }
        let [d, a] = ins.operands()?;
        let a = match a {
            Operand::Name(name, None) | Operand::NameOffset(name, _) => {
                let offset = if let Operand::NameOffset(_, o) = a {
                    *o
                } else {
                    0
                };
                match self.lookup(name, ins.i.line)? {
                    Symbol::Address(space, at) => {
                        self.address_constant(space, at.wrapping_add(offset as u64), true)
                    }
                    _ => self.src(ins, a, ty)?,
                }
            }
            other => self.src(ins, other, ty)?,
        };
        let d = self.dst(ins, d, ty)?;
        let w = self.constant(window, true);
        // A null pointer is null in every space.
        let f = if to {
            alu!(u64; a: u64, w: u64; if a == 0 { 0 } else { a.wrapping_sub(w) })
        } else {
            alu!(u64; a: u64, w: u64; a.wrapping_add(w))
        };
        self.alu(ins, Class::Integer, f, d, [a, w, 0]);
        Ok(())
    }

    fn mov(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let ty = ins.ty()?;
        ins.done()?;
        let [d, a] = ins.operands()?;
        if ty == Type::Pred {
            let Operand::Name(d, None) = d else {
                return ins.error("the destination is not a predicate");
            };
            let (a, a_not) = self.pred_src(ins, a)?;
            let d = self.pred_dst(ins, d)?;
            let op = Op::PredLogic {
                op: Bool::And,
                d,
                a,
                a_not,
                b: 0,
                b_not: false,
            };
            self.emit(ins, Class::Move, op);
            return Ok(());
        }
        if let Operand::Vector(parts) = a {
            let (size, element) = self.part_type(ins, ty, parts.len())?;
            let mut src = [0; 4];
            for (slot, part) in src.iter_mut().zip(parts) {
                *slot = self.src(ins, part, element)?;
            }
            let d = self.dst(ins, d, ty)?;
            let op = Op::Pack {
                size,
                count: parts.len() as u8,
                wide: wide(ty),
                d,
                src,
            };
            self.emit(ins, Class::Move, op);
            return Ok(());
        }
        if let Operand::Vector(parts) = d {
            let (size, element) = self.part_type(ins, ty, parts.len())?;
            let a = self.src(ins, a, ty)?;
            let mut dst = [0; 4];
            for (slot, part) in dst.iter_mut().zip(parts) {
                *slot = self.dst(ins, part, element)?;
            }
            let op = Op::Unpack {
                size,
                count: parts.len() as u8,
                wide: wide(ty),
                a,
                dst,
            };
            self.emit(ins, Class::Move, op);
            return Ok(());
        }
        if let Operand::Name(name, None) = a {
            let which = match *name {
                "%clock" => Some((Timer::Clock, 4)),
                "%clock_hi" => Some((Timer::ClockHi, 4)),
                "%clock64" => Some((Timer::Clock64, 8)),
                "%globaltimer" => Some((Timer::GlobalTimer, 8)),
                _ => None,
            };
            if let Some((which, size)) = which {
                if ty.size() != size {
                    return ins.bad_type(ty);
                }
                let d = self.dst(ins, d, ty)?;
                self.emit(ins, Class::Move, Op::Timer { d, which });
                return Ok(());
            }
        }
        let source = match a {
            Operand::Name(name, None) | Operand::NameOffset(name, _)
                if special_register(name, None).is_none() && *name != "WARP_SZ" =>
            {
                let offset = if let Operand::NameOffset(_, o) = a {
                    *o
                } else {
                    0
                };
                match self.lookup(name, ins.i.line)? {
                    Symbol::Address(space, at) if ty.size() >= 4 => {
                        self.address_constant(space, at.wrapping_add(offset as u64), wide(ty))
                    }
                    Symbol::Function(index) if ty.size() == 8 && offset == 0 => {
                        self.constant(CODE_WINDOW + index as u64, true)
                    }
                    _ => self.src(ins, a, ty)?,
                }
            }
            other => self.src(ins, other, ty)?,
        };
        let d = self.dst(ins, d, ty)?;
        let f = match ty.size() {
            8 => alu!(u64; a: u64; a),
            4 => alu!(u32; a: u32; a),
            2 => alu!(u16; a: u16; a),
            _ => return ins.bad_type(ty),
        };
        self.alu(ins, Class::Move, f, d, [source, 0, 0]);
        Ok(())
    }

    fn part_type(&self, ins: &Ins<'_, 'a>, ty: Type, count: usize) -> Result<(u8, Type)> {
        let size = ty.size() / (count.max(1) as u32);
        let element = match (size, count) {
            (1, 2 | 4) => Type::B8,
            (2, 2 | 4) => Type::B16,
            (4, 2) => Type::B32,
            _ => return ins.error("this vector is not implemented"),
        };
        Ok((size as u8, element))
    }

    fn cvt(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if ins.i.modifiers.contains(&"pack") {
            return self.cvt_pack(ins);
        }
        let integer_round = ins.one(&["rni", "rzi", "rmi", "rpi"]);
        let away = ins.take("rna");
        let float_round = ins.round();
        let (ftz, sat, relu) = (ins.take("ftz"), ins.take("sat"), ins.take("relu"));
        let finite = ins.take("satfinite");
        let (to, from) = (ins.ty()?, ins.ty()?);
        ins.done()?;
        let packed = matches!(to, Type::F16x2 | Type::Bf16x2 | Type::E4m3x2 | Type::E5m2x2);
        let eight = |t| matches!(t, Type::E4m3x2 | Type::E5m2x2);
        let float_to = to.float() || packed || to == Type::Tf32;
        let float_from = from.float() || eight(from) || from == Type::F16x2;
        let known = match (to, from) {
            (Type::Tf32, Type::F32) => (float_round.is_some() || away) && !sat,
            (Type::F16x2 | Type::Bf16x2, Type::F32) => float_round.is_some(),
            (Type::E4m3x2 | Type::E5m2x2, Type::F32 | Type::F16x2) => {
                float_round == Some(Round::Nearest) && finite
            }
            (Type::F16x2, Type::E4m3x2 | Type::E5m2x2) => float_round == Some(Round::Nearest),
            _ if packed || to == Type::Tf32 || eight(from) || from == Type::F16x2 => false,
            _ if float_to && float_from => {
                let narrower = to.size() < from.size()
                    || matches!(
                        (to, from),
                        (Type::F16, Type::Bf16) | (Type::Bf16, Type::F16)
                    );
                if narrower {
                    float_round.is_some()
                } else {
                    float_round.is_none() || to == from
                }
            }
            _ if float_to => from.integer() && float_round.is_some(),
            _ if float_from => to.integer() && integer_round.is_some(),
            _ => to.integer() && from.integer() && integer_round.is_none() && float_round.is_none(),
        };
        let known = known
            && (!away || to == Type::Tf32)
            && (!relu || float_to && float_from)
            && (!finite || eight(to) || to == Type::Tf32)
            && (!ftz || from == Type::F32 || to == Type::F32)
            && !(integer_round.is_some() && float_to && to != from);
        if !known {
            return ins.error("this conversion is not implemented");
        }
        if away {
            return self.cvt_tf32_away(ins, relu, finite);
        }
        let round = match integer_round {
            Some("rni") => Round::Nearest,
            Some("rzi") => Round::Zero,
            Some("rmi") => Round::Down,
            Some(_) => Round::Up,
            None => float_round.unwrap_or(Round::Nearest),
        };
        // Registers as bits: a destination may be wider than its type.
        let two = packed && from == Type::F32;
        let count = if two { 3 } else { 2 };
        if ins.i.operands.len() != count {
            return ins.error(format!("expected {count} operands"));
        }
        let a = self.convert_source(ins, &ins.i.operands[1], from)?;
        let b = if two {
            self.convert_source(ins, &ins.i.operands[2], from)?
        } else {
            0
        };
        let (d, have) = match &ins.i.operands[0] {
            Operand::Name("_", None) => (self.new_slot(wide(to)), to),
            other => self.any_register(ins, other)?,
        };
        if have.size() < to.size() {
            return ins.error(format!("the destination is only .{}", have.name()));
        }
        if wide(have) != wide(to) && !to.integer() {
            return ins.error("the destination is wider than the result");
        }
        let simple = !sat && !relu && !finite;
        let fast: Option<AluFn> = match (to, from) {
            (t, f) if t.integer() && f.integer() && !sat => integer_conversion(t, f, have),
            (Type::F32, Type::F16) if simple && !ftz => Some(alu!(u32; a: u16; {
                let x = num::f16_to_f32(a);
                if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
            })),
            (Type::F32, Type::Bf16) if simple && !ftz => {
                Some(alu!(f32; a: u16; num::bf16_to_f32(a)))
            }
            (Type::F16, Type::F32) if simple && !ftz && round == Round::Nearest => {
                Some(alu!(u16; a: f32; num::f16_from_f32(a)))
            }
            (Type::Bf16, Type::F32) if simple && !ftz && round == Round::Nearest => {
                Some(alu!(u16; a: f32; num::bf16_from_f32(a)))
            }
            (Type::Bf16x2, Type::F32) if simple && round == Round::Nearest => {
                Some(alu!(u32; a: f32, b: f32;
                    num::bf16_from_f32(b) as u32 | (num::bf16_from_f32(a) as u32) << 16))
            }
            (Type::F16x2, Type::F32) if simple && round == Round::Nearest => {
                Some(alu!(u32; a: f32, b: f32;
                    num::f16_from_f32(b) as u32 | (num::f16_from_f32(a) as u32) << 16))
            }
            (Type::F32, Type::S32) if simple && round == Round::Nearest => {
                Some(alu!(f32; a: i32; a as f32))
            }
            (Type::F32, Type::U32) if simple && round == Round::Nearest => {
                Some(alu!(f32; a: u32; a as f32))
            }
            (Type::S32, Type::F32) if simple && round == Round::Zero && !wide(have) => {
                Some(alu!(i32; a: f32; a as i32))
            }
            (Type::F64, Type::F32) if simple && !ftz => Some(alu!(f64; a: f32; a as f64)),
            (Type::F32, Type::F64) if simple && !ftz && round == Round::Nearest => {
                Some(alu!(u32; a: f64; if a.is_nan() { 0x7fff_ffff } else { (a as f32).to_bits() }))
            }
            (Type::F64, Type::S32) if simple => Some(alu!(f64; a: i32; a as f64)),
            (Type::F64, Type::U32) if simple => Some(alu!(f64; a: u32; a as f64)),
            _ => None,
        };
        if let Some(f) = fast {
            self.alu(ins, Class::Convert, f, d, [a, b, 0]);
            return Ok(());
        }
        // The slow path writes the natural width and is then spread over a wider register.
        let spread = wide(have) && !wide(to);
        let target = if spread { self.new_slot(false) } else { d };
        let op = ConvertOp {
            to,
            from,
            round,
            integral: integer_round.is_some(),
            ftz,
            saturate: sat || finite,
            relu,
        };
        self.emit(
            ins,
            Class::Convert,
            Op::Convert {
                op: Box::new(op),
                d: target,
                a,
                b,
            },
        );
        if spread {
            match integer_conversion(to, to, have) {
                Some(f) => self.alu(ins, Class::Convert, f, d, [target, 0, 0]),
                None => return ins.bad_type(to),
            }
        }
        Ok(())
    }

    /// A source that may be wider than its type.
    fn convert_source(
        &mut self,
        ins: &Ins<'_, 'a>,
        operand: &Operand<'a>,
        ty: Type,
    ) -> Result<Slot> {
        let bits = match ty {
            Type::F16 | Type::Bf16 | Type::E4m3x2 | Type::E5m2x2 => Type::B16,
            Type::F16x2 | Type::Bf16x2 => Type::B32,
            other => other,
        };
        if let Operand::Name(name, None) = operand
            && special_register(name, None).is_none()
            && let Symbol::Reg(slot, have) = self.lookup(name, ins.i.line)?
            && wide(have)
            && !wide(bits)
        {
            let low = self.new_slot(false);
            self.alu(
                ins,
                Class::Convert,
                alu!(u32; a: u64; a as u32),
                low,
                [slot, 0, 0],
            );
            return Ok(low);
        }
        self.src(ins, operand, bits)
    }

    fn cvt_tf32_away(&mut self, ins: &mut Ins<'_, 'a>, relu: bool, finite: bool) -> Result<()> {
        if relu || finite {
            return ins.error("modifiers .relu and .satfinite are not implemented here");
        }
        let [d, a] = ins.operands()?;
        let a = self.src(ins, a, Type::F32)?;
        let d = self.dst(ins, d, Type::B32)?;
        // To nearest, ties away from zero: half an ulp added to the magnitude, then a cut.
        let f = alu!(u32; a: u32; {
            if a & 0x7fff_ffff > 0x7f80_0000 { 0x7fff_ffff }
            else if a & 0x7f80_0000 == 0x7f80_0000 { a }
            else { a.wrapping_add(0x1000) & !0x1fff }
        });
        self.alu(ins, Class::Convert, f, d, [a, 0, 0]);
        Ok(())
    }

    fn cvt_pack(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        ins.take("pack");
        if !ins.take("sat") {
            return ins.error(".sat is missing");
        }
        let (to, from) = (ins.ty()?, ins.ty()?);
        let third = if to.size() == 1 {
            Some(ins.ty()?)
        } else {
            None
        };
        ins.done()?;
        let f = match (to, from) {
            (Type::S16, Type::S32) => alu!(u32; a: i32, b: i32;
                (a.clamp(-32768, 32767) as u16 as u32) << 16 | b.clamp(-32768, 32767) as u16 as u32),
            (Type::U16, Type::S32) => alu!(u32; a: i32, b: i32;
                (a.clamp(0, 65535) as u32) << 16 | b.clamp(0, 65535) as u32),
            (Type::S8, Type::S32) => alu!(u32; a: i32, b: i32, c: u32;
                c << 16 | (a.clamp(-128, 127) as u8 as u32) << 8 | b.clamp(-128, 127) as u8 as u32),
            (Type::U8, Type::S32) => alu!(u32; a: i32, b: i32, c: u32;
                c << 16 | (a.clamp(0, 255) as u32) << 8 | b.clamp(0, 255) as u32),
            _ => return ins.bad_type(to),
        };
        let count = 3 + third.is_some() as usize;
        if ins.i.operands.len() != count || third.is_some_and(|t| t != Type::B32) {
            return ins.error("these operands are not implemented");
        }
        let [a, b] = self.srcs(ins, [&ins.i.operands[1], &ins.i.operands[2]], Type::S32)?;
        let c = if count == 4 {
            self.src(ins, &ins.i.operands[3], Type::B32)?
        } else {
            0
        };
        let d = self.dst(ins, &ins.i.operands[0], Type::B32)?;
        self.alu(ins, Class::Convert, f, d, [a, b, c]);
        Ok(())
    }
}

fn integer_conversion(to: Type, from: Type, have: Type) -> Option<AluFn> {
    match (to, wide(have)) {
        (Type::U8, false) => integers!(from, u8, u32),
        (Type::S8, false) if have.size() == 2 => integers!(from, i8, i16),
        (Type::S8, false) => integers!(from, i8, i32),
        (Type::U16, false) => integers!(from, u16, u32),
        (Type::S16, false) if have.size() == 2 => integers!(from, i16, i16),
        (Type::S16, false) => integers!(from, i16, i32),
        (Type::U32 | Type::S32, false) => integers!(from, u32, u32),
        (Type::U8, true) => integers!(from, u8, u64),
        (Type::S8, true) => integers!(from, i8, i64),
        (Type::U16, true) => integers!(from, u16, u64),
        (Type::S16, true) => integers!(from, i16, i64),
        (Type::U32, true) => integers!(from, u32, u64),
        (Type::S32, true) => integers!(from, i32, i64),
        (Type::U64 | Type::S64, true) => integers!(from, u64, u64),
        _ => None,
    }
}

/// One value of a [`ConvertOp`].
pub fn convert(op: &ConvertOp, a: u64, b: u64) -> u64 {
    use Type::*;
    let small = |t: Type| match t {
        F16 | F16x2 => num::F16,
        Bf16 | Bf16x2 => num::BF16,
        E4m3 | E4m3x2 => num::E4M3,
        E5m2 | E5m2x2 => num::E5M2,
        _ => num::TF32,
    };
    let rectify = |x: f64| if op.relu && x <= 0.0 { 0.0 } else { x };
    match (op.to, op.from) {
        (F16x2 | Bf16x2, F32) => {
            let one = |v: u64| {
                let x = rectify(f32::from_bits(v as u32) as f64);
                small(op.to).encode(x, op.round, op.saturate) as u64
            };
            return one(b) | one(a) << 16;
        }
        (E4m3x2 | E5m2x2, F32) => {
            let one = |v: u64| {
                let x = rectify(f32::from_bits(v as u32) as f64);
                small(op.to).encode(x, op.round, true) as u64
            };
            return one(b) | one(a) << 8;
        }
        (E4m3x2 | E5m2x2, F16x2) => {
            let one = |v: u64| {
                let x = rectify(num::F16.decode((v & 0xffff) as u32));
                small(op.to).encode(x, op.round, true) as u64
            };
            return one(a) | one(a >> 16) << 8;
        }
        (F16x2, E4m3x2 | E5m2x2) => {
            let one = |v: u64| {
                let x = rectify(small(op.from).decode((v & 0xff) as u32));
                num::F16.encode(x, Round::Nearest, false) as u64
            };
            return one(a) | one(a >> 8) << 16;
        }
        (Tf32, _) => {
            let x = rectify(f32::from_bits(a as u32) as f64);
            if x.is_nan() {
                return 0x7fff_ffff;
            }
            return (num::TF32.encode(x, op.round, op.saturate) as u64) << 13;
        }
        _ => {}
    }
    if op.from.integer() {
        let value = integer_value(op.from, a);
        if op.to.integer() {
            // Only saturating ones come here, and spreads.
            let (low, high) = range(op.to);
            return value.clamp(low, high) as u64 & mask(op.to);
        }
        return match op.to {
            F64 => integer_to_f64(value, op.round).to_bits(),
            F32 => {
                let x = integer_to_f32(value, op.round);
                (if op.saturate { x.clamp(0.0, 1.0) } else { x }).to_bits() as u64
            }
            // Every 64-bit integer rounded to odd in f64 rounds correctly to 16 bits.
            other => small(other).encode(integer_odd(value), op.round, false) as u64,
        };
    }
    let x = match op.from {
        F32 => {
            let x = f32::from_bits(a as u32);
            if op.ftz && x.is_subnormal() {
                0f32.copysign(x) as f64
            } else {
                x as f64
            }
        }
        F64 => f64::from_bits(a),
        other => small(other).decode(a as u32 & 0xffff),
    };
    let whole = |x: f64| match op.round {
        Round::Nearest => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    };
    if op.to.integer() {
        if x.is_nan() {
            return 0;
        }
        let (low, high) = range(op.to);
        return (whole(x) as i128).clamp(low, high) as u64 & mask(op.to);
    }
    let mut x = rectify(if op.integral { whole(x) } else { x });
    if op.saturate {
        x = if x > 0.0 { x.min(1.0) } else { 0.0 };
    }
    match op.to {
        F64 => x.to_bits(),
        F32 => {
            if x.is_nan() {
                return 0x7fff_ffff;
            }
            let y = num::f32_from_f64(x, op.round);
            let y = if op.ftz && y.is_subnormal() {
                0f32.copysign(y)
            } else {
                y
            };
            y.to_bits() as u64
        }
        other => small(other).encode(x, op.round, false) as u64,
    }
}

fn mask(ty: Type) -> u64 {
    if ty.size() == 8 {
        !0
    } else {
        (1 << (8 * ty.size())) - 1
    }
}

fn range(ty: Type) -> (i128, i128) {
    let bits = 8 * ty.size();
    if ty.signed() {
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        (0, (1 << bits) - 1)
    }
}

fn integer_value(ty: Type, bits: u64) -> i128 {
    let v = bits & mask(ty);
    if ty.signed() {
        let shift = 64 - 8 * ty.size();
        ((v << shift) as i64 >> shift) as i128
    } else {
        v as i128
    }
}

fn integer_to_f64(v: i128, round: Round) -> f64 {
    let x = v as f64;
    num::direct(x, (v - x as i128) as f64, true, round)
}

fn integer_odd(v: i128) -> f64 {
    let x = integer_to_f64(v, Round::Zero);
    if x as i128 == v {
        x
    } else {
        f64::from_bits(x.to_bits() | 1)
    }
}

fn integer_to_f32(v: i128, round: Round) -> f32 {
    num::f32_from_f64(integer_odd(v), round)
}
