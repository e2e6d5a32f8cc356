//! Loads, stores, atomics, asynchronous copies, matrix loads.

use super::*;
use crate::alu;

/// Hints about caches, which change no result.
const HINTS: [&str; 21] = [
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::evict_last",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "L2::cache_hint",
    "unified",
];

impl<'a> Body<'_, '_, 'a> {
    pub(super) fn memory(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "ld" | "ldu" => self.load(ins),
            "st" => self.store(ins),
            "atom" | "red" => self.atomic(ins),
            "cp" => self.copy_async(ins),
            "ldmatrix" | "stmatrix" => self.matrix(ins),
            "movmatrix" => {
                let ok =
                    ins.take("sync") & ins.take("aligned") & ins.take("m8n8") & ins.take("trans");
                let ty = ins.ty()?;
                ins.done()?;
                if !ok || ty != Type::B16 {
                    return ins.error("this form is not implemented");
                }
                let [d, a] = ins.operands()?;
                let a = self.src(ins, a, Type::B32)?;
                let d = self.dst(ins, d, Type::B32)?;
                self.emit(ins, Class::Collective, Op::MoveMatrix { d, a });
                Ok(())
            }
            "createpolicy" => {
                // A policy is an opaque number that only cache hints read.
                let Some(d) = ins.i.operands.first() else {
                    return ins.error("a destination is missing");
                };
                let d = self.dst(ins, d, Type::B64)?;
                self.alu(ins, Class::Move, alu!(u64; a: u64; a), d, [0, 0, 0]);
                Ok(())
            }
            // Prefetches and the like change no result.
            _ => {
                self.emit(ins, Class::Global, Op::Nop);
                Ok(())
            }
        }
    }

    fn space(&self, ins: &mut Ins<'_, 'a>) -> Result<Space> {
        let name = ins.one(&[
            "global",
            "shared",
            "shared::cta",
            "local",
            "param",
            "param::entry",
            "param::func",
            "const",
        ]);
        Ok(match name {
            None => Space::Generic,
            Some("global") => Space::Global,
            Some("shared" | "shared::cta") => Space::Shared,
            Some("local") => Space::Local,
            Some("const") => Space::Const,
            Some(_) => Space::Param,
        })
    }

    /// Takes cache hints, and ordering: `(strong, release or acquire)`.
    fn ordering(&self, ins: &mut Ins<'_, 'a>) -> (bool, bool) {
        while ins.one(&HINTS).is_some() {}
        let strong = ins.one(&["volatile", "relaxed", "mmio"]).is_some();
        let ordered = ins.one(&["acquire", "release", "acq_rel"]).is_some();
        ins.take("weak");
        ins.one(&["cta", "cluster", "gpu", "sys"]);
        (strong || ordered, ordered)
    }

    fn address(&mut self, ins: &Ins<'_, 'a>, operand: &Operand<'a>, space: Space) -> Result<Addr> {
        let Operand::Address(base, offset) = operand else {
            return ins.error("an address in brackets is missing");
        };
        let mut space = if space == Space::Const {
            Space::Global
        } else {
            space
        };
        let Some(name) = base else {
            let slot = self.constant(0, true);
            return Ok(Addr {
                space,
                slot,
                wide: true,
                offset: *offset,
            });
        };
        match self.lookup(name, ins.i.line)? {
            Symbol::Reg(slot, ty) if ty.size() == 4 || ty.size() == 8 => {
                if space == Space::Param && !self.function.entry {
                    return ins
                        .error("parameters of device functions cannot be addressed by register");
                }
                Ok(Addr {
                    space,
                    slot,
                    wide: ty.size() == 8,
                    offset: *offset,
                })
            }
            Symbol::Address(at_space, at) => {
                let fits = match space {
                    Space::Generic => at_space == Space::Global,
                    Space::Param => matches!(at_space, Space::Param | Space::Local),
                    other => other == at_space,
                };
                if !fits {
                    return ins.error(format!("{name} is in another state space"));
                }
                if space == Space::Param {
                    space = at_space;
                }
                if space == Space::Local {
                    let slot = self.address_constant(Space::Local, at, true);
                    return Ok(Addr {
                        space,
                        slot,
                        wide: true,
                        offset: *offset,
                    });
                }
                let slot = self.constant(at, true);
                Ok(Addr {
                    space,
                    slot,
                    wide: true,
                    offset: *offset,
                })
            }
            _ => ins.error(format!("{name} is not an address")),
        }
    }

    fn class(space: Space) -> Class {
        match space {
            Space::Generic | Space::Global => Class::Global,
            Space::Shared => Class::Shared,
            Space::Local => Class::Local,
            Space::Param | Space::Const => Class::Parameter,
        }
    }

    /// Operands of a vector or scalar access.
    fn parts<'i>(
        &self,
        ins: &Ins<'i, 'a>,
        operand: &'i Operand<'a>,
        count: usize,
    ) -> Result<Vec<&'i Operand<'a>>> {
        let list: Vec<_> = match operand {
            Operand::Vector(v) if count > 1 => v.iter().collect(),
            other if count == 1 => vec![other],
            _ => return ins.error("a vector is missing"),
        };
        if list.len() != count {
            return ins.error(format!("expected {count} elements, found {}", list.len()));
        }
        Ok(list)
    }

    fn vector(&self, ins: &mut Ins<'_, 'a>) -> usize {
        match ins.one(&["v2", "v4"]) {
            Some("v2") => 2,
            Some(_) => 4,
            None => 1,
        }
    }

    fn load(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let space = self.space(ins)?;
        let (strong, _) = self.ordering(ins);
        let count = self.vector(ins);
        let ty = ins.ty()?;
        ins.done()?;
        let n = ins.i.operands.len();
        if !(2..=3).contains(&n) || (n == 3) != ins.i.modifiers.contains(&"L2::cache_hint") {
            return ins.error(format!("{n} operands are not implemented"));
        }
        if ty == Type::Pred || ty == Type::B128 || count as u32 * ty.size() > 16 {
            return ins.bad_type(ty);
        }
        let mut dst = [0; 4];
        let mut is_wide = None;
        for (slot, part) in dst
            .iter_mut()
            .zip(self.parts(ins, &ins.i.operands[0], count)?)
        {
            if let Operand::Name("_", None) = part {
                *slot = self.new_slot(true);
                continue;
            }
            let (at, have) = self.any_register(ins, part)?;
            if have.size() < ty.size() || is_wide.is_some_and(|w| w != wide(have)) {
                return ins.error(format!("destination of .{} does not fit", have.name()));
            }
            is_wide = Some(wide(have));
            *slot = at;
        }
        let is_wide = is_wide.unwrap_or(true);
        let addr = self.address(ins, &ins.i.operands[1], space)?;
        let extend = if ty.signed() {
            Extend::Sign
        } else {
            Extend::Zero
        };
        let size = ty.size() as u8;
        let class = if space == Space::Const {
            Class::Parameter
        } else {
            Self::class(space)
        };
        if addr.space == Space::Param
            && let Operand::Address(Some(name), offset) = &ins.i.operands[1]
            && let Symbol::Address(_, at) = self.lookup(name, ins.i.line)?
        {
            let offset = at.wrapping_add(*offset as u64);
            let end = offset.saturating_add(size as u64 * count as u64);
            let total = self.entry_params.last().map_or(0, |p| p.offset + p.size);
            if end > total as u64 {
                return ins.error("beyond the end of the parameters");
            }
            let op = Op::LoadParam {
                offset: offset as u32,
                size,
                count: count as u8,
                dst,
                extend,
                wide: is_wide,
            };
            self.emit(ins, class, op);
            return Ok(());
        }
        let op = Op::Load {
            addr,
            size,
            count: count as u8,
            dst,
            extend,
            wide: is_wide,
            strong,
        };
        self.emit(ins, class, op);
        Ok(())
    }

    fn store(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let space = self.space(ins)?;
        let (strong, _) = self.ordering(ins);
        let count = self.vector(ins);
        let ty = ins.ty()?;
        ins.done()?;
        let n = ins.i.operands.len();
        if !(2..=3).contains(&n) || (n == 3) != ins.i.modifiers.contains(&"L2::cache_hint") {
            return ins.error(format!("{n} operands are not implemented"));
        }
        if ty == Type::Pred || ty == Type::B128 || count as u32 * ty.size() > 16 {
            return ins.bad_type(ty);
        }
        let mut src = [0; 4];
        for (slot, part) in src
            .iter_mut()
            .zip(self.parts(ins, &ins.i.operands[1], count)?)
        {
            // A source may be wider than what is stored; the low lanes are then copied out.
            *slot = match part {
                Operand::Name(name, None) if special_register(name, None).is_none() => {
                    match self.lookup(name, ins.i.line)? {
                        Symbol::Reg(at, have) if wide(have) && !wide(ty) => {
                            let low = self.new_slot(false);
                            self.alu(
                                ins,
                                Class::Move,
                                alu!(u32; a: u64; a as u32),
                                low,
                                [at, 0, 0],
                            );
                            low
                        }
                        _ => self.src(ins, part, ty)?,
                    }
                }
                other => self.src(ins, other, ty)?,
            };
        }
        let addr = self.address(ins, &ins.i.operands[0], space)?;
        if addr.space == Space::Param {
            return ins.error("kernel parameters cannot be written");
        }
        let op = Op::Store {
            addr,
            size: ty.size() as u8,
            count: count as u8,
            src,
            strong,
        };
        self.emit(ins, Self::class(space), op);
        Ok(())
    }

    fn atomic(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let space = self.space(ins)?;
        let (_, release) = self.ordering(ins);
        ins.take("noftz");
        let op = match ins.one(&[
            "and", "or", "xor", "exch", "cas", "add", "inc", "dec", "min", "max",
        ]) {
            Some("and") => AtomOp::And,
            Some("or") => AtomOp::Or,
            Some("xor") => AtomOp::Xor,
            Some("exch") => AtomOp::Exch,
            Some("cas") => AtomOp::Cas,
            Some("add") => AtomOp::Add,
            Some("inc") => AtomOp::Inc,
            Some("dec") => AtomOp::Dec,
            Some("min") => AtomOp::Min,
            Some("max") => AtomOp::Max,
            _ => return ins.error("this operation is not implemented"),
        };
        let ty = ins.ty()?;
        ins.done()?;
        use Type::*;
        let ok = match op {
            AtomOp::And | AtomOp::Or | AtomOp::Xor => matches!(ty, B32 | B64),
            AtomOp::Exch => matches!(ty, B32 | B64),
            AtomOp::Cas => matches!(ty, B16 | B32 | B64),
            AtomOp::Add => matches!(
                ty,
                U32 | S32 | U64 | S64 | F32 | F64 | F16 | Bf16 | F16x2 | Bf16x2
            ),
            AtomOp::Inc | AtomOp::Dec => ty == U32,
            AtomOp::Min | AtomOp::Max => matches!(ty, U32 | S32 | U64 | S64),
        };
        if !ok {
            return ins.bad_type(ty);
        }
        let returns = ins.i.opcode == "atom";
        let sources = 1 + (op == AtomOp::Cas) as usize;
        let wanted = returns as usize + 1 + sources;
        if ins.i.operands.len() != wanted {
            return ins.error(format!(
                "expected {wanted} operands, found {}",
                ins.i.operands.len()
            ));
        }
        let bits = match ty.size() {
            2 => B16,
            4 => B32,
            _ => B64,
        };
        // Constants are checked against the operation's own type.
        let as_type = if ty.integer() || matches!(ty, F32 | F64) {
            ty
        } else {
            bits
        };
        let rest = &ins.i.operands[returns as usize..];
        let addr = self.address(ins, &rest[0], space)?;
        if !matches!(addr.space, Space::Generic | Space::Global | Space::Shared) {
            return ins.error("atomics on this state space are not implemented");
        }
        let b = self.src(ins, &rest[1], as_type)?;
        let c = if op == AtomOp::Cas {
            self.src(ins, &rest[2], as_type)?
        } else {
            0
        };
        let d = if returns {
            Some(self.dst(ins, &ins.i.operands[0], bits)?)
        } else {
            None
        };
        self.emit(
            ins,
            Class::Atomic,
            Op::Atom {
                addr,
                op,
                ty,
                d,
                b,
                c,
                release,
            },
        );
        Ok(())
    }

    fn copy_async(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if !ins.take("async") {
            return ins.error("this instruction is not implemented");
        }
        if ins.take("commit_group") {
            ins.done()?;
            ins.operands::<0>()?;
            self.emit(ins, Class::Async, Op::CopyCommit);
            return Ok(());
        }
        if ins.take("wait_all") {
            ins.done()?;
            ins.operands::<0>()?;
            // Also waits for copies of no group: they are committed first.
            self.emit(ins, Class::Async, Op::CopyCommit);
            self.emit(ins, Class::Async, Op::CopyWait { pending: 0 });
            return Ok(());
        }
        if ins.take("wait_group") {
            ins.done()?;
            let [n] = ins.operands()?;
            let Operand::Int(n @ 0..=0xffff_ffff) = n else {
                return ins.error("the number of groups must be a constant");
            };
            self.emit(ins, Class::Async, Op::CopyWait { pending: *n as u32 });
            return Ok(());
        }
        let cg = ins.take("cg");
        if !cg && !ins.take("ca") {
            return ins.error("this form is not implemented");
        }
        let spaces = (ins.take("shared") || ins.take("shared::cta")) && ins.take("global");
        let hint = ins.i.modifiers.contains(&"L2::cache_hint");
        while ins
            .one(&["L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"])
            .is_some()
        {}
        ins.done()?;
        let n = ins.i.operands.len() - hint as usize;
        if !spaces || !(3..=4).contains(&n) {
            return ins.error("this form is not implemented");
        }
        let to = self.address(ins, &ins.i.operands[0], Space::Shared)?;
        let from = self.address(ins, &ins.i.operands[1], Space::Global)?;
        let size = match &ins.i.operands[2] {
            Operand::Int(4 | 8) if cg => return ins.error(".cg copies 16 bytes"),
            Operand::Int(n @ (4 | 8 | 16)) => *n as u8,
            _ => return ins.error("the size must be 4, 8 or 16"),
        };
        let (mut bytes, mut ignore) = (None, None);
        if n == 4 {
            let fourth = &ins.i.operands[3];
            let is_pred = match fourth {
                Operand::Not(_) => true,
                Operand::Name(name, None) => {
                    matches!(self.lookup(name, ins.i.line), Ok(Symbol::Pred(_)))
                }
                _ => false,
            };
            if is_pred {
                ignore = Some(self.pred_src(ins, fourth)?);
            } else {
                bytes = Some(self.src(ins, fourth, Type::U32)?);
            }
        }
        self.emit(
            ins,
            Class::Async,
            Op::CopyAsync {
                to,
                from,
                size,
                bytes,
                ignore,
            },
        );
        Ok(())
    }

    fn matrix(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let loads = ins.i.opcode == "ldmatrix";
        let form = ins.take("sync") & ins.take("aligned") & ins.take("m8n8");
        let count = match ins.one(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some("x4") => 4,
            _ => return ins.error("a count is missing"),
        };
        let transpose = ins.take("trans");
        let shared = ins.take("shared") || ins.take("shared::cta");
        let ty = ins.ty()?;
        ins.done()?;
        if !form || ty != Type::B16 {
            return ins.error("this form is not implemented");
        }
        let space = if shared {
            Space::Shared
        } else {
            Space::Generic
        };
        let [x, y] = ins.operands()?;
        let (registers, address) = if loads { (x, y) } else { (y, x) };
        let list: Vec<_> = match registers {
            Operand::Vector(v) => v.iter().collect(),
            other => vec![other],
        };
        if list.len() != count {
            return ins.error(format!("expected {count} registers, found {}", list.len()));
        }
        let mut slots = [0; 4];
        for (slot, r) in slots.iter_mut().zip(list) {
            *slot = if loads {
                self.dst(ins, r, Type::B32)?
            } else {
                self.src(ins, r, Type::B32)?
            };
        }
        let addr = self.address(ins, address, space)?;
        let count = count as u8;
        let op = if loads {
            Op::LoadMatrix {
                addr,
                count,
                transpose,
                dst: slots,
            }
        } else {
            Op::StoreMatrix {
                addr,
                count,
                transpose,
                src: slots,
            }
        };
        self.emit(ins, Class::Shared, op);
        Ok(())
    }
}
