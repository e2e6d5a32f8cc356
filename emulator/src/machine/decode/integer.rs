//! Integer arithmetic, logic and bit manipulation.

use super::*;
use crate::alu;
use crate::machine::lanes::AluFn;

/// The function for an integer type of 16, 32 or 64 bits; `$t` names the Rust type in the body.
macro_rules! signless {
    ($ty:expr; $($v:ident),+; $e:expr) => {
        match $ty.size() {
            2 => Some(signless!(@ u16; $($v),+; $e)),
            4 => Some(signless!(@ u32; $($v),+; $e)),
            8 => Some(signless!(@ u64; $($v),+; $e)),
            _ => None,
        }
    };
    (@ $t:ident; $a:ident; $e:expr) => {{ type T = $t; alu!(T; $a: T; $e) }};
    (@ $t:ident; $a:ident, $b:ident; $e:expr) => {{ type T = $t; alu!(T; $a: T, $b: T; $e) }};
    (@ $t:ident; $a:ident, $b:ident, $c:ident; $e:expr) => {{
        type T = $t;
        alu!(T; $a: T, $b: T, $c: T; $e)
    }};
}

macro_rules! signed {
    ($ty:expr; $($v:ident),+; $e:expr) => {
        match $ty {
            Type::U16 => Some(signless!(@ u16; $($v),+; $e)),
            Type::U32 => Some(signless!(@ u32; $($v),+; $e)),
            Type::U64 => Some(signless!(@ u64; $($v),+; $e)),
            Type::S16 => Some(signless!(@ i16; $($v),+; $e)),
            Type::S32 => Some(signless!(@ i32; $($v),+; $e)),
            Type::S64 => Some(signless!(@ i64; $($v),+; $e)),
            _ => None,
        }
    };
}

/// Applies a function to both 16-bit halves.
macro_rules! halves {
    ($t:ty; $a:ident, $b:ident; $e:expr) => {
        alu!(u32; x: u32, y: u32; {
            let lo = { let ($a, $b) = (x as u16 as $t, y as u16 as $t); $e };
            let hi = { let ($a, $b) = ((x >> 16) as u16 as $t, (y >> 16) as u16 as $t); $e };
            lo as u16 as u32 | ((hi as u16 as u32) << 16)
        })
    };
}

impl<'a> Body<'_, '_, 'a> {
    pub(super) fn arithmetic(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if ins.i.opcode.ends_with('c') && ins.i.opcode != "sad" {
            return self.carry(ins, true);
        }
        if ins.take("cc") {
            return self.carry(ins, false);
        }
        let packed = matches!(ins.i.opcode, "add" | "min" | "max")
            .then(|| ins.one(&["u16x2", "s16x2"]))
            .flatten();
        if let Some(name) = packed {
            return self.packed_integer(ins, name == "s16x2");
        }
        let ty = ins.ty()?;
        if !ty.integer() {
            return self.float_arithmetic(ins, ty);
        }
        self.integer(ins, ty)
    }

    fn packed_integer(&mut self, ins: &mut Ins<'_, 'a>, signed: bool) -> Result<()> {
        ins.done()?;
        let [d, a, b] = ins.operands()?;
        let f = match (ins.i.opcode, signed) {
            ("add", _) => halves!(u16; a, b; a.wrapping_add(b)),
            ("min", false) => halves!(u16; a, b; a.min(b)),
            ("max", false) => halves!(u16; a, b; a.max(b)),
            ("min", true) => halves!(i16; a, b; a.min(b)),
            _ => halves!(i16; a, b; a.max(b)),
        };
        let [a, b] = self.srcs(ins, [a, b], Type::B32)?;
        let d = self.dst(ins, d, Type::B32)?;
        self.alu(ins, Class::Integer, f, d, [a, b, 0]);
        Ok(())
    }

    fn integer(&mut self, ins: &mut Ins<'_, 'a>, ty: Type) -> Result<()> {
        let saturate = ins.take("sat");
        let part = ins.one(&["lo", "hi", "wide"]);
        ins.done()?;
        if saturate && (ty != Type::S32 || !matches!(ins.i.opcode, "add" | "sub")) {
            return ins.error("modifier .sat is not implemented here");
        }
        let f: Option<AluFn> = match (ins.i.opcode, part) {
            ("add", None) if saturate => Some(alu!(i32; a: i32, b: i32; a.saturating_add(b))),
            ("sub", None) if saturate => Some(alu!(i32; a: i32, b: i32; a.saturating_sub(b))),
            ("add", None) => signless!(ty; a, b; a.wrapping_add(b)),
            ("sub", None) => signless!(ty; a, b; a.wrapping_sub(b)),
            ("mul", Some("lo")) => signless!(ty; a, b; a.wrapping_mul(b)),
            ("mad", Some("lo")) => signless!(ty; a, b, c; a.wrapping_mul(b).wrapping_add(c)),
            ("mul", Some("hi")) => high(ty, false),
            ("mad", Some("hi")) => high(ty, true),
            ("mul" | "mad", Some("wide")) => return self.wide_product(ins, ty),
            ("mul24", Some("lo")) => match ty {
                Type::U32 => {
                    Some(alu!(u32; a: u32, b: u32; (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)))
                }
                Type::S32 => {
                    Some(alu!(i32; a: i32, b: i32; (a << 8 >> 8).wrapping_mul(b << 8 >> 8)))
                }
                _ => None,
            },
            ("mad24", Some("lo")) => match ty {
                Type::U32 => Some(alu!(u32; a: u32, b: u32, c: u32;
                    (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(c))),
                Type::S32 => Some(alu!(i32; a: i32, b: i32, c: i32;
                    (a << 8 >> 8).wrapping_mul(b << 8 >> 8).wrapping_add(c))),
                _ => None,
            },
            // PTX leaves division by zero open; hardware gives all ones.
            ("div", None) => signed!(ty; a, b; if b == 0 { !0 } else { a.wrapping_div(b) }),
            ("rem", None) => signed!(ty; a, b; if b == 0 { a } else { a.wrapping_rem(b) }),
            ("abs", None) if ty.signed() => match ty {
                Type::S16 => Some(alu!(i16; a: i16; a.wrapping_abs())),
                Type::S32 => Some(alu!(i32; a: i32; a.wrapping_abs())),
                _ => Some(alu!(i64; a: i64; a.wrapping_abs())),
            },
            ("neg", None) if ty.signed() => signless!(ty; a; a.wrapping_neg()),
            ("min", None) => signed!(ty; a, b; a.min(b)),
            ("max", None) => signed!(ty; a, b; a.max(b)),
            ("sad", None) => signed!(ty; a, b, c;
                c.wrapping_add(if a < b { b.wrapping_sub(a) } else { a.wrapping_sub(b) })),
            _ => None,
        };
        let Some(f) = f else { return ins.bad_type(ty) };
        let (d, s) = self.uniform(ins, ty)?;
        self.alu(ins, Class::Integer, f, d, s);
        Ok(())
    }

    /// Destination and up to three sources, all of one type; their number is checked against
    /// the opcode.
    pub(super) fn uniform(&mut self, ins: &Ins<'_, 'a>, ty: Type) -> Result<(Slot, [Slot; 3])> {
        let wanted = match ins.i.opcode {
            "mad" | "fma" | "sad" | "mad24" | "lop3" | "dp4a" | "dp2a" => 3,
            "abs" | "neg" | "not" | "cnot" | "popc" | "clz" | "brev" | "rcp" | "sqrt" | "rsqrt"
            | "sin" | "cos" | "lg2" | "ex2" | "tanh" => 1,
            "min" | "max" => ins.i.operands.len().saturating_sub(1).clamp(2, 3),
            _ => 2,
        };
        if ins.i.operands.len() != wanted + 1 {
            let n = ins.i.operands.len();
            return ins.error(format!("expected {} operands, found {n}", wanted + 1));
        }
        let mut s = [0; 3];
        for (slot, operand) in s.iter_mut().zip(&ins.i.operands[1..]) {
            *slot = self.src(ins, operand, ty)?;
        }
        let d = self.dst(ins, &ins.i.operands[0], ty)?;
        Ok((d, s))
    }

    fn wide_product(&mut self, ins: &mut Ins<'_, 'a>, ty: Type) -> Result<()> {
        let (f, product): (AluFn, Type) = match (ty, ins.i.opcode) {
            (Type::U16, "mul") => (alu!(u32; a: u16, b: u16; a as u32 * b as u32), Type::U32),
            (Type::S16, "mul") => (alu!(i32; a: i16, b: i16; a as i32 * b as i32), Type::S32),
            (Type::U32, "mul") => (alu!(u64; a: u32, b: u32; a as u64 * b as u64), Type::U64),
            (Type::S32, "mul") => (alu!(i64; a: i32, b: i32; a as i64 * b as i64), Type::S64),
            (Type::U16, _) => (
                alu!(u32; a: u16, b: u16, c: u32; (a as u32 * b as u32).wrapping_add(c)),
                Type::U32,
            ),
            (Type::S16, _) => (
                alu!(i32; a: i16, b: i16, c: i32; (a as i32 * b as i32).wrapping_add(c)),
                Type::S32,
            ),
            (Type::U32, _) => (
                alu!(u64; a: u32, b: u32, c: u64; (a as u64 * b as u64).wrapping_add(c)),
                Type::U64,
            ),
            (Type::S32, _) => (
                alu!(i64; a: i32, b: i32, c: i64; (a as i64 * b as i64).wrapping_add(c)),
                Type::S64,
            ),
            _ => return ins.bad_type(ty),
        };
        let mut s = [0; 3];
        if ins.i.opcode == "mul" {
            let [d, a, b] = ins.operands()?;
            [s[0], s[1]] = self.srcs(ins, [a, b], ty)?;
            let d = self.dst(ins, d, product)?;
            self.alu(ins, Class::Integer, f, d, s);
        } else {
            let [d, a, b, c] = ins.operands()?;
            [s[0], s[1]] = self.srcs(ins, [a, b], ty)?;
            s[2] = self.src(ins, c, product)?;
            let d = self.dst(ins, d, product)?;
            self.alu(ins, Class::Integer, f, d, s);
        }
        Ok(())
    }

    /// Extended-precision arithmetic through the carry flag, which is a hidden register.
    fn carry(&mut self, ins: &mut Ins<'_, 'a>, with_in: bool) -> Result<()> {
        let out = !with_in || ins.take("cc");
        let ty = ins.ty()?;
        let part = ins.one(&["lo", "hi"]);
        ins.done()?;
        let long = match ty {
            Type::U32 | Type::S32 => false,
            Type::U64 | Type::S64 => true,
            _ => return ins.bad_type(ty),
        };
        let opcode = if with_in {
            &ins.i.opcode[..3]
        } else {
            ins.i.opcode
        };
        let (d, s) = if opcode == "mad" {
            let [d, a, b, c] = ins.operands()?;
            let s = self.srcs(ins, [a, b, c], ty)?;
            // The product first; then an addition with carry.
            let product = self.new_slot(long);
            let f = match part {
                Some("lo") => signless!(ty; a, b; a.wrapping_mul(b)),
                Some("hi") => high(ty, false),
                _ => None,
            };
            let Some(f) = f else { return ins.bad_type(ty) };
            self.alu(ins, Class::Integer, f, product, [s[0], s[1], 0]);
            (self.dst(ins, d, ty)?, [product, s[2]])
        } else {
            let [d, a, b] = ins.operands()?;
            let s = self.srcs(ins, [a, b], ty)?;
            (self.dst(ins, d, ty)?, s)
        };
        let (sum, carry): (AluFn, AluFn) = match (opcode, long) {
            ("add" | "mad", false) => (
                alu!(u32; a: u32, b: u32, c: u32; a.wrapping_add(b).wrapping_add(c)),
                alu!(u32; a: u32, b: u32, c: u32; ((a as u64 + b as u64 + c as u64) >> 32) as u32),
            ),
            ("add" | "mad", true) => (
                alu!(u64; a: u64, b: u64, c: u32; a.wrapping_add(b).wrapping_add(c as u64)),
                alu!(u32; a: u64, b: u64, c: u32; ((a as u128 + b as u128 + c as u128) >> 64) as u32),
            ),
            ("sub", false) => (
                alu!(u32; a: u32, b: u32, c: u32; a.wrapping_sub(b).wrapping_sub(c)),
                alu!(u32; a: u32, b: u32, c: u32; ((a as u64) < b as u64 + c as u64) as u32),
            ),
            ("sub", true) => (
                alu!(u64; a: u64, b: u64, c: u32; a.wrapping_sub(b).wrapping_sub(c as u64)),
                alu!(u32; a: u64, b: u64, c: u32; ((a as u128) < b as u128 + c as u128) as u32),
            ),
            _ => return ins.error("this instruction is not implemented"),
        };
        let flag = match self.carry {
            Some(flag) => flag,
            None => {
                let flag = self.new_slot(false);
                self.carry = Some(flag);
                flag
            }
        };
        let m = if with_in { flag } else { 0 };
        if out {
            // Both read the old carry and the sources, so the sum goes through a spare register.
            let spare = self.new_slot(long);
            self.alu(ins, Class::Integer, sum, spare, [s[0], s[1], m]);
            self.alu(ins, Class::Integer, carry, flag, [s[0], s[1], m]);
            let copy = if long {
                alu!(u64; a: u64; a)
            } else {
                alu!(u32; a: u32; a)
            };
            self.alu(ins, Class::Integer, copy, d, [spare, 0, 0]);
        } else {
            self.alu(ins, Class::Integer, sum, d, [s[0], s[1], m]);
        }
        Ok(())
    }

    pub(super) fn bits(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "and" | "or" | "xor" | "not" | "cnot" => self.logic(ins),
            "shl" | "shr" => self.shift(ins),
            "shf" => {
                let left = ins.take("l");
                if !left && !ins.take("r") {
                    return ins.error("a direction is missing");
                }
                let clamp = ins.take("clamp");
                if !clamp && !ins.take("wrap") {
                    return ins.error(".clamp or .wrap is missing");
                }
                let f = match (left, clamp) {
                    (true, true) => alu!(u32; a: u32, b: u32, c: u32;
                        ((((b as u64) << 32 | a as u64) << c.min(32)) >> 32) as u32),
                    (true, false) => alu!(u32; a: u32, b: u32, c: u32;
                        ((((b as u64) << 32 | a as u64) << (c & 31)) >> 32) as u32),
                    (false, true) => alu!(u32; a: u32, b: u32, c: u32;
                        (((b as u64) << 32 | a as u64) >> c.min(32)) as u32),
                    (false, false) => alu!(u32; a: u32, b: u32, c: u32;
                        (((b as u64) << 32 | a as u64) >> (c & 31)) as u32),
                };
                self.plain(ins, f, Type::B32, [Type::B32, Type::B32, Type::U32])
            }
            "lop3" => {
                let ty = ins.ty()?;
                ins.done()?;
                let [d, a, b, c, lut] = ins.operands()?;
                let Operand::Int(lut @ 0..=255) = lut else {
                    return ins.error("the table must be a constant up to 255");
                };
                if ty != Type::B32 {
                    return ins.bad_type(ty);
                }
                let [a, b, c] = self.srcs(ins, [a, b, c], ty)?;
                let d = self.dst(ins, d, ty)?;
                self.emit(
                    ins,
                    Class::Integer,
                    Op::Lop3 {
                        lut: *lut as u8,
                        d,
                        a,
                        b,
                        c,
                    },
                );
                Ok(())
            }
            "popc" | "clz" | "brev" => {
                let ty = ins.ty()?;
                let f = match (ins.i.opcode, ty) {
                    ("popc", Type::B32) => alu!(u32; a: u32; a.count_ones()),
                    ("popc", Type::B64) => alu!(u32; a: u64; a.count_ones()),
                    ("clz", Type::B32) => alu!(u32; a: u32; a.leading_zeros()),
                    ("clz", Type::B64) => alu!(u32; a: u64; a.leading_zeros()),
                    ("brev", Type::B32) => alu!(u32; a: u32; a.reverse_bits()),
                    ("brev", Type::B64) => alu!(u64; a: u64; a.reverse_bits()),
                    _ => return ins.bad_type(ty),
                };
                let out = if ins.i.opcode == "brev" {
                    ty
                } else {
                    Type::U32
                };
                self.plain(ins, f, out, [ty])
            }
            "bfind" => {
                let shift = ins.take("shiftamt");
                let ty = ins.ty()?;
                let f = match (ty, shift) {
                    (Type::U32, false) => alu!(u32; a: u32; 31u32.wrapping_sub(a.leading_zeros())),
                    (Type::S32, false) => alu!(u32; a: i32;
                        31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros())),
                    (Type::U64, false) => alu!(u32; a: u64; 63u32.wrapping_sub(a.leading_zeros())),
                    (Type::S64, false) => alu!(u32; a: i64;
                        63u32.wrapping_sub((a ^ (a >> 63)).leading_zeros())),
                    (Type::U32, true) => {
                        alu!(u32; a: u32; if a == 0 { !0 } else { a.leading_zeros() })
                    }
                    (Type::S32, true) => alu!(u32; a: i32; {
                        let m = a ^ (a >> 31);
                        if m == 0 { !0 } else { m.leading_zeros() }
                    }),
                    (Type::U64, true) => {
                        alu!(u32; a: u64; if a == 0 { !0 } else { a.leading_zeros() })
                    }
                    (Type::S64, true) => alu!(u32; a: i64; {
                        let m = a ^ (a >> 63);
                        if m == 0 { !0 } else { m.leading_zeros() }
                    }),
                    _ => return ins.bad_type(ty),
                };
                self.plain(ins, f, Type::U32, [ty])
            }
            "bfe" => {
                let ty = ins.ty()?;
                let f = match ty {
                    Type::U32 => {
                        alu!(u32; a: u32, b: u32, c: u32; bfe(a as u64, b, c, 32, false) as u32)
                    }
                    Type::S32 => {
                        alu!(u32; a: i32, b: u32, c: u32; bfe(a as i64 as u64, b, c, 32, true) as u32)
                    }
                    Type::U64 => alu!(u64; a: u64, b: u32, c: u32; bfe(a, b, c, 64, false)),
                    Type::S64 => alu!(u64; a: u64, b: u32, c: u32; bfe(a, b, c, 64, true)),
                    _ => return ins.bad_type(ty),
                };
                self.plain(ins, f, ty, [ty, Type::U32, Type::U32])
            }
            "bfi" => {
                let ty = ins.ty()?;
                ins.done()?;
                let [d, a, b, c, n] = ins.operands()?;
                let [a, b] = self.srcs(ins, [a, b], ty)?;
                let [c, n] = self.srcs(ins, [c, n], Type::U32)?;
                let d = self.dst(ins, d, ty)?;
                // Position and length in one register: an instruction has three sources.
                let both = self.new_slot(false);
                let pack = alu!(u32; c: u32, n: u32; (c & 255) << 8 | (n & 255));
                self.alu(ins, Class::Integer, pack, both, [c, n, 0]);
                let f = match ty {
                    Type::B32 => alu!(u32; a: u32, b: u32, m: u32; {
                        let (at, n) = (m >> 8, m & 255);
                        let ones = if n >= 32 { !0 } else { (1u32 << n) - 1 };
                        let field = if at >= 32 { 0 } else { ones << at };
                        let moved = if at >= 32 { 0 } else { a << at };
                        b & !field | moved & field
                    }),
                    Type::B64 => alu!(u64; a: u64, b: u64, m: u32; {
                        let (at, n) = (m >> 8, m & 255);
                        let ones = if n >= 64 { !0 } else { (1u64 << n) - 1 };
                        let field = if at >= 64 { 0 } else { ones << at };
                        let moved = if at >= 64 { 0 } else { a << at };
                        b & !field | moved & field
                    }),
                    _ => return ins.bad_type(ty),
                };
                self.alu(ins, Class::Integer, f, d, [a, b, both]);
                Ok(())
            }
            "fns" => {
                let ty = ins.ty()?;
                if ty != Type::B32 {
                    return ins.bad_type(ty);
                }
                let f = alu!(u32; m: u32, base: u32, n: i32; find_nth(m, base, n));
                self.plain(ins, f, ty, [ty, ty, ty])
            }
            "bmsk" => {
                let f = if ins.take("clamp") {
                    alu!(u32; a: u32, b: u32; {
                        let ones = if b >= 32 { !0 } else { (1u32 << b) - 1 };
                        if a >= 32 { 0 } else { ones << a }
                    })
                } else if ins.take("wrap") {
                    alu!(u32; a: u32, b: u32; (((1u64 << (b & 31)) - 1) as u32) << (a & 31))
                } else {
                    return ins.error(".clamp or .wrap is missing");
                };
                self.plain(ins, f, Type::B32, [Type::U32, Type::U32])
            }
            "szext" => {
                let wrap = ins.take("wrap");
                if !wrap && !ins.take("clamp") {
                    return ins.error(".clamp or .wrap is missing");
                }
                let ty = ins.ty()?;
                let f = match (ty, wrap) {
                    (Type::U32, true) => {
                        alu!(u32; a: u32, b: u32; bfe(a as u64, 0, b & 31, 32, false) as u32)
                    }
                    (Type::U32, false) => alu!(u32; a: u32, b: u32;
                        bfe(a as u64, 0, b.min(32), 32, false) as u32),
                    (Type::S32, true) => alu!(u32; a: i32, b: u32;
                        bfe(a as i64 as u64, 0, b & 31, 32, true) as u32),
                    (Type::S32, false) => alu!(u32; a: i32, b: u32;
                        bfe(a as i64 as u64, 0, b.min(32), 32, true) as u32),
                    _ => return ins.bad_type(ty),
                };
                self.plain(ins, f, ty, [ty, Type::U32])
            }
            "prmt" => {
                let mode = ins.one(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]);
                let f = match mode {
                    None => alu!(u32; a: u32, b: u32, c: u32; permute(a, b, c)),
                    Some("f4e") => alu!(u32; a: u32, b: u32, c: u32;
                        (((b as u64) << 32 | a as u64) >> (8 * (c & 3))) as u32),
                    Some("b4e") => alu!(u32; a: u32, b: u32, c: u32; {
                        let i = c & 3;
                        let s = i | ((i.wrapping_sub(1) & 7) << 4) | ((i.wrapping_sub(2) & 7) << 8)
                            | ((i.wrapping_sub(3) & 7) << 12);
                        permute(a, b, s)
                    }),
                    Some("rc8") => {
                        alu!(u32; a: u32, b: u32, c: u32; permute(a, b, (c & 3) * 0x1111))
                    }
                    Some("rc16") => alu!(u32; a: u32, b: u32, c: u32;
                        permute(a, b, if c & 1 == 0 { 0x1010 } else { 0x3232 })),
                    Some("ecl") => alu!(u32; a: u32, b: u32, c: u32;
                        permute(a, b, [0x3210, 0x3211, 0x3222, 0x3333][(c & 3) as usize])),
                    Some(_) => alu!(u32; a: u32, b: u32, c: u32;
                        permute(a, b, [0x0000, 0x1110, 0x2210, 0x3210][(c & 3) as usize])),
                };
                let ty = ins.ty()?;
                if ty != Type::B32 {
                    return ins.bad_type(ty);
                }
                self.plain(ins, f, ty, [ty, ty, ty])
            }
            _ => self.dot(ins),
        }
    }

    /// An instruction whose sources have the given types.
    fn plain<const N: usize>(
        &mut self,
        ins: &mut Ins<'_, 'a>,
        f: AluFn,
        out: Type,
        types: [Type; N],
    ) -> Result<()> {
        // `shf.b32` and the like: the type has not been taken by those with one type only.
        if ins.i.opcode == "shf" || ins.i.opcode == "bmsk" {
            ins.take("b32");
        }
        ins.done()?;
        if ins.i.operands.len() != N + 1 {
            let n = ins.i.operands.len();
            return ins.error(format!("expected {} operands, found {n}", N + 1));
        }
        let mut s = [0; 3];
        for ((slot, operand), ty) in s.iter_mut().zip(&ins.i.operands[1..]).zip(types) {
            *slot = self.src(ins, operand, ty)?;
        }
        let d = self.dst(ins, &ins.i.operands[0], out)?;
        self.alu(ins, Class::Integer, f, d, s);
        Ok(())
    }

    fn logic(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let ty = ins.ty()?;
        ins.done()?;
        if ty == Type::Pred {
            let Some(Operand::Name(name, None)) = ins.i.operands.first() else {
                return ins.error("the destination is not a predicate");
            };
            let d = self.pred_dst(ins, name)?;
            let op = match ins.i.opcode {
                "and" => Bool::And,
                "or" => Bool::Or,
                "xor" => Bool::Xor,
                "not" => {
                    let [_, a] = ins.operands()?;
                    let (a, a_not) = self.pred_src(ins, a)?;
                    let op = Op::PredLogic {
                        op: Bool::And,
                        d,
                        a,
                        a_not: !a_not,
                        b: 0,
                        b_not: false,
                    };
                    self.emit(ins, Class::Compare, op);
                    return Ok(());
                }
                _ => return ins.bad_type(ty),
            };
            let [_, a, b] = ins.operands()?;
            let (a, a_not) = self.pred_src(ins, a)?;
            let (b, b_not) = self.pred_src(ins, b)?;
            self.emit(
                ins,
                Class::Compare,
                Op::PredLogic {
                    op,
                    d,
                    a,
                    a_not,
                    b,
                    b_not,
                },
            );
            return Ok(());
        }
        if !matches!(ty, Type::B16 | Type::B32 | Type::B64) {
            return ins.bad_type(ty);
        }
        let f = match ins.i.opcode {
            "and" => signless!(ty; a, b; a & b),
            "or" => signless!(ty; a, b; a | b),
            "xor" => signless!(ty; a, b; a ^ b),
            "not" => signless!(ty; a; !a),
            _ => signless!(ty; a; (a == 0) as T),
        };
        let Some(f) = f else { return ins.bad_type(ty) };
        let (d, s) = self.uniform(ins, ty)?;
        self.alu(ins, Class::Integer, f, d, s);
        Ok(())
    }

    fn shift(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let ty = ins.ty()?;
        let f = match (ins.i.opcode, ty) {
            ("shl", Type::B16) => alu!(u16; a: u16, n: u32; a.checked_shl(n).unwrap_or(0)),
            ("shl", Type::B32) => alu!(u32; a: u32, n: u32; a.checked_shl(n).unwrap_or(0)),
            ("shl", Type::B64) => alu!(u64; a: u64, n: u32; a.checked_shl(n).unwrap_or(0)),
            ("shr", Type::B16 | Type::U16) => {
                alu!(u16; a: u16, n: u32; a.checked_shr(n).unwrap_or(0))
            }
            ("shr", Type::B32 | Type::U32) => {
                alu!(u32; a: u32, n: u32; a.checked_shr(n).unwrap_or(0))
            }
            ("shr", Type::B64 | Type::U64) => {
                alu!(u64; a: u64, n: u32; a.checked_shr(n).unwrap_or(0))
            }
            ("shr", Type::S16) => alu!(i16; a: i16, n: u32; a >> n.min(15)),
            ("shr", Type::S32) => alu!(i32; a: i32, n: u32; a >> n.min(31)),
            ("shr", Type::S64) => alu!(i64; a: i64, n: u32; a >> n.min(63)),
            _ => return ins.bad_type(ty),
        };
        self.plain(ins, f, ty, [ty, Type::U32])
    }

    fn dot(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let two = ins.i.opcode == "dp2a";
        let high = two && ins.take("hi");
        if two && !high && !ins.take("lo") {
            return ins.error(".lo or .hi is missing");
        }
        let (at, bt) = (ins.ty()?, ins.ty()?);
        if !matches!((at, bt), (Type::U32 | Type::S32, Type::U32 | Type::S32)) {
            return ins.bad_type(at);
        }
        let f = match (two, high, at.signed(), bt.signed()) {
            (false, _, false, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp4a(a, b, c, false, false))
            }
            (false, _, false, true) => {
                alu!(u32; a: u32, b: u32, c: u32; dp4a(a, b, c, false, true))
            }
            (false, _, true, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp4a(a, b, c, true, false))
            }
            (false, _, true, true) => alu!(u32; a: u32, b: u32, c: u32; dp4a(a, b, c, true, true)),
            (true, false, false, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b, c, false, false))
            }
            (true, false, false, true) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b, c, false, true))
            }
            (true, false, true, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b, c, true, false))
            }
            (true, false, true, true) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b, c, true, true))
            }
            (true, true, false, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b >> 16, c, false, false))
            }
            (true, true, false, true) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b >> 16, c, false, true))
            }
            (true, true, true, false) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b >> 16, c, true, false))
            }
            (true, true, true, true) => {
                alu!(u32; a: u32, b: u32, c: u32; dp2a(a, b >> 16, c, true, true))
            }
        };
        self.plain(ins, f, Type::B32, [Type::B32, Type::B32, Type::B32])
    }
}

fn high(ty: Type, add: bool) -> Option<AluFn> {
    Some(match (ty, add) {
        (Type::U16, false) => alu!(u16; a: u16, b: u16; ((a as u32 * b as u32) >> 16) as u16),
        (Type::S16, false) => alu!(i16; a: i16, b: i16; ((a as i32 * b as i32) >> 16) as i16),
        (Type::U32, false) => alu!(u32; a: u32, b: u32; ((a as u64 * b as u64) >> 32) as u32),
        (Type::S32, false) => alu!(i32; a: i32, b: i32; ((a as i64 * b as i64) >> 32) as i32),
        (Type::U64, false) => alu!(u64; a: u64, b: u64; ((a as u128 * b as u128) >> 64) as u64),
        (Type::S64, false) => alu!(i64; a: i64, b: i64; ((a as i128 * b as i128) >> 64) as i64),
        (Type::U32, true) => {
            alu!(u32; a: u32, b: u32, c: u32; (((a as u64 * b as u64) >> 32) as u32).wrapping_add(c))
        }
        (Type::S32, true) => {
            alu!(i32; a: i32, b: i32, c: i32; (((a as i64 * b as i64) >> 32) as i32).wrapping_add(c))
        }
        (Type::U64, true) => {
            alu!(u64; a: u64, b: u64, c: u64; (((a as u128 * b as u128) >> 64) as u64).wrapping_add(c))
        }
        (Type::S64, true) => {
            alu!(i64; a: i64, b: i64, c: i64; (((a as i128 * b as i128) >> 64) as i64).wrapping_add(c))
        }
        _ => return None,
    })
}

/// Bit field extract; past the top, copies of the sign (or zeros).
#[inline(always)]
fn bfe(a: u64, at: u32, n: u32, bits: u32, signed: bool) -> u64 {
    let (at, n) = (at & 255, n & 255);
    let a = if signed || bits == 64 {
        a
    } else {
        a & 0xffff_ffff
    };
    if n == 0 {
        return 0;
    }
    let shifted = if signed {
        ((a as i64) >> at.min(63)) as u64
    } else {
        a.checked_shr(at).unwrap_or(0)
    };
    if n >= bits {
        return shifted;
    }
    let low = shifted & ((1 << n) - 1);
    // The sign is the field's top bit, or bit `bits - 1` if the field reaches beyond it.
    let sign = (a >> (at + n - 1).min(bits - 1)) & 1;
    if signed && sign == 1 {
        low | !0 << n
    } else {
        low
    }
}

/// Position of the n-th set bit from `base` up (n > 0) or down (n < 0), or of `base` itself.
fn find_nth(m: u32, base: u32, n: i32) -> u32 {
    let set = |at: i64| m >> at & 1 == 1;
    let mut left = n.unsigned_abs().max(1);
    let mut at = base as i64;
    while (0..32).contains(&at) {
        if set(at) {
            left -= 1;
            if left == 0 {
                return at as u32;
            }
        }
        if n == 0 {
            break;
        }
        at += n.signum() as i64;
    }
    !0
}

/// Byte permutation; bit 3 of a selector replicates the byte's sign.
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let both = (b as u64) << 32 | a as u64;
    let mut out = 0;
    for i in 0..4 {
        let s = selector >> (4 * i) & 15;
        let byte = (both >> (8 * (s & 7))) as u8;
        let byte = if s & 8 != 0 {
            ((byte as i8) >> 7) as u8
        } else {
            byte
        };
        out |= (byte as u32) << (8 * i);
    }
    out
}

#[inline(always)]
fn byte(x: u32, i: u32, signed: bool) -> i32 {
    let b = (x >> (8 * i)) as u8;
    if signed { b as i8 as i32 } else { b as i32 }
}

#[inline(always)]
fn dp4a(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool) -> u32 {
    let mut sum = c;
    for i in 0..4 {
        sum = sum.wrapping_add((byte(a, i, a_signed) * byte(b, i, b_signed)) as u32);
    }
    sum
}

#[inline(always)]
fn dp2a(a: u32, b: u32, c: u32, a_signed: bool, b_signed: bool) -> u32 {
    let mut sum = c;
    for i in 0..2 {
        let half = (a >> (16 * i)) as u16;
        let half = if a_signed {
            half as i16 as i32
        } else {
            half as i32
        };
        sum = sum.wrapping_add(half.wrapping_mul(byte(b, i, b_signed)) as u32);
    }
    sum
}
