//! Atomic operations.

use super::{Result, cell};
use crate::machine::block::Context;
use crate::machine::code::*;
use crate::machine::execute::lanes;
use crate::machine::lanes::WARP;
use crate::machine::num;
use crate::machine::race::Touch;
use crate::machine::warp::{Bases, Warp};
use crate::ptx::Type;
use crate::ptx::ast::Space;
use crate::report::Kind;

/// The value after an atomic operation.
fn combine(op: AtomOp, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    let s32 = |v: u64| v as u32 as i32;
    match (op, ty) {
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Add, Type::F32) => {
            let sum = f32::from_bits(old as u32) + f32::from_bits(b as u32);
            (if sum.is_nan() {
                0x7fff_ffff
            } else {
                sum.to_bits()
            }) as u64
        }
        (AtomOp::Add, Type::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomOp::Add, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2) => {
            let f16 = matches!(ty, Type::F16 | Type::F16x2);
            let add = |x: u16, y: u16| {
                if f16 {
                    num::f16_from_f32(num::f16_to_f32(x) + num::f16_to_f32(y))
                } else {
                    num::bf16_from_f32(num::bf16_to_f32(x) + num::bf16_to_f32(y))
                }
            };
            let low = add(old as u16, b as u16) as u64;
            if ty.size() == 2 {
                low
            } else {
                low | (add((old >> 16) as u16, (b >> 16) as u16) as u64) << 16
            }
        }
        (AtomOp::Add, _) => old.wrapping_add(b),
        (AtomOp::Inc, _) => {
            if old as u32 >= b as u32 {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old as u32 == 0 || old as u32 > b as u32 {
                b
            } else {
                old - 1
            }
        }
        (AtomOp::Min, Type::S32) => s32(old).min(s32(b)) as u32 as u64,
        (AtomOp::Max, Type::S32) => s32(old).max(s32(b)) as u32 as u64,
        (AtomOp::Min, Type::S64) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Type::S64) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
    }
}

impl Warp {
    pub(super) fn atom(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        op: &Op,
        space: Space,
        at: &[u64; WARP],
        mask: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<()> {
        let Op::Atom {
            op,
            ty,
            d,
            b,
            c,
            release,
            ..
        } = op
        else {
            return Ok(());
        };
        let size = ty.size() as u8;
        let wide = size == 8;
        let (b, c) = (bases.regs + *b as usize, bases.regs + *c as usize);
        let poison = (self.poison[b] | self.poison[c]) & mask;
        ctx.check_poison(self, instr, poison, "an operand of an atomic")?;
        ctx.counters.atomics += mask.count_ones() as u64;
        let mut last = None;
        for lane in lanes(mask) {
            let (x, y) = (self.get(b, lane, wide), self.get(c, lane, wide));
            let (x, y) = if size == 2 {
                (x & 0xffff, y & 0xffff)
            } else {
                (x, y)
            };
            let (p, valid) = match space {
                Space::Global => {
                    let (a, o) =
                        self.find(ctx, instr, &mut last, lane, at[lane], size as u64, "atomic")?;
                    let valid =
                        !ctx.launch.config.checks.uninitialised || a.is_valid(o, size as usize);
                    a.set_valid(o, size as usize);
                    // SAFETY: `find` checked the range.
                    (unsafe { a.pointer().add(o) }, valid)
                }
                Space::Shared => {
                    let o = self.shared_range(ctx, instr, lane, at[lane], size as u64)?;
                    let valid = !ctx.launch.config.checks.uninitialised
                        || ctx.shared.is_valid(o, size as usize);
                    ctx.shared.set_valid(o, size as usize, true);
                    ctx.shared_access(self, instr, o, size as usize, lane, pc, Touch::Atomic);
                    // SAFETY: `shared_range` checked the range.
                    (unsafe { ctx.shared.pointer().add(o) }, valid)
                }
                _ => {
                    let message = "atomic on local memory or parameters".to_string();
                    return Err(ctx.fault(self, instr, Kind::OutOfBounds, lane as u32, message));
                }
            };
            if !valid && *op != AtomOp::Exch {
                let message = "uninitialised memory is an operand of an atomic".to_string();
                return Err(ctx.fault(self, instr, Kind::Uninitialised, lane as u32, message));
            }
            if space == Space::Global && ctx.launch.config.checks.global_races {
                ctx.atomic_order(at[lane], *release);
            }
            // SAFETY: in range and aligned.
            let old = unsafe { cell::update(p, size, |old| combine(*op, *ty, old, x, y)) };
            if let Some(d) = d {
                self.set(bases.regs + *d as usize, lane, wide, old);
            }
        }
        if let Some(d) = d {
            self.set_poison(bases.regs + *d as usize, mask, 0);
        }
        Ok(())
    }
}
