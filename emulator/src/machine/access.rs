//! Memory instructions.

use super::block::Context;
use super::code::*;
use super::execute::{lanes, space_of};
use super::lanes::WARP;
use super::memory::{AccessError, Allocation};
use super::num;
use super::race::Touch;
use super::warp::{Bases, Copy, Warp};
use crate::config::CopyAsync;
use crate::ptx::Type;
use crate::ptx::ast::Space;
use crate::report::{Finding, Kind};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

type Result<T, E = Box<Finding>> = std::result::Result<T, E>;

/// Reads 1, 2, 4 or 8 bytes.
///
/// # Safety
/// `p` is valid for `size` bytes and aligned to them.
#[inline(always)]
unsafe fn read(p: *const u8, size: u8) -> u64 {
    // SAFETY: the caller's; atomics because other blocks may touch the same bytes.
    unsafe {
        match size {
            1 => (*(p as *const AtomicU8)).load(Relaxed) as u64,
            2 => (*(p as *const AtomicU16)).load(Relaxed) as u64,
            4 => (*(p as *const AtomicU32)).load(Relaxed) as u64,
            _ => (*(p as *const AtomicU64)).load(Relaxed),
        }
    }
}

/// Writes 1, 2, 4 or 8 bytes.
///
/// # Safety
/// As for [`read`].
#[inline(always)]
unsafe fn write(p: *const u8, size: u8, v: u64) {
    // SAFETY: as for `read`.
    unsafe {
        match size {
            1 => (*(p as *const AtomicU8)).store(v as u8, Relaxed),
            2 => (*(p as *const AtomicU16)).store(v as u16, Relaxed),
            4 => (*(p as *const AtomicU32)).store(v as u32, Relaxed),
            _ => (*(p as *const AtomicU64)).store(v, Relaxed),
        }
    }
}

#[inline(always)]
fn bits_of(bytes: &[u8], at: usize, size: usize) -> bool {
    (at..at + size).all(|i| bytes[i / 8] >> (i % 8) & 1 == 1)
}

#[inline(always)]
fn set_bits(bytes: &mut [u8], at: usize, size: usize, value: bool) {
    for i in at..at + size {
        let bit = 1 << (i % 8);
        if value {
            bytes[i / 8] |= bit;
        } else {
            bytes[i / 8] &= !bit;
        }
    }
}

#[inline(always)]
fn extended(v: u64, size: u8, extend: Extend) -> u64 {
    if extend == Extend::Zero || size == 8 {
        return v;
    }
    let shift = 64 - 8 * size as u32;
    ((v << shift) as i64 >> shift) as u64
}

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

/// Allocation found last, to skip the search for the next lane.
struct Found<'m> {
    allocation: &'m Allocation,
    start: u64,
}

impl Warp {
    pub(super) fn access(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        op: &Op,
        active: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<()> {
        match op {
            Op::LoadParam {
                offset,
                size,
                count,
                dst,
                extend,
                wide,
            } => {
                for e in 0..*count {
                    let at = *offset as usize + e as usize * *size as usize;
                    let mut bytes = [0; 8];
                    bytes[..*size as usize]
                        .copy_from_slice(&ctx.launch.params[at..at + *size as usize]);
                    let v = extended(u64::from_le_bytes(bytes), *size, *extend);
                    let d = bases.regs + dst[e as usize] as usize;
                    lanes(active).for_each(|lane| self.set(d, lane, *wide, v));
                    self.set_poison(d, active, 0);
                }
                Ok(())
            }
            Op::Load {
                addr, size, count, ..
            } => {
                let mut at = self.addresses(ctx, instr, addr, active, bases)?;
                let total = *size as u64 * *count as u64;
                self.check_aligned(ctx, instr, &at, active, total)?;
                for (space, mask) in split(addr.space, &mut at, active) {
                    self.load(ctx, instr, op, space, &at, mask, bases, pc)?;
                }
                Ok(())
            }
            Op::Store {
                addr,
                size,
                count,
                src,
                ..
            } => {
                let mut at = self.addresses(ctx, instr, addr, active, bases)?;
                let total = *size as u64 * *count as u64;
                self.check_aligned(ctx, instr, &at, active, total)?;
                for (space, mask) in split(addr.space, &mut at, active) {
                    // Local memory may hold poison (spilled registers); device memory may not.
                    if space == Space::Global {
                        for s in &src[..*count as usize] {
                            let poison = self.poison[bases.regs + *s as usize] & mask;
                            ctx.check_poison(
                                self,
                                instr,
                                poison,
                                "a value stored to device memory",
                            )?;
                        }
                    }
                    self.store(ctx, instr, op, space, &at, mask, bases, pc)?;
                }
                Ok(())
            }
            Op::Atom { addr, ty, .. } => {
                let mut at = self.addresses(ctx, instr, addr, active, bases)?;
                self.check_aligned(ctx, instr, &at, active, ty.size() as u64)?;
                for (space, mask) in split(addr.space, &mut at, active) {
                    self.atom(ctx, instr, op, space, &at, mask, bases, pc)?;
                }
                Ok(())
            }
            Op::CopyAsync {
                to,
                from,
                size,
                bytes,
                ignore,
            } => {
                let to = self.addresses(ctx, instr, to, active, bases)?;
                let from = self.addresses(ctx, instr, from, active, bases)?;
                self.copy_async(
                    ctx, instr, &to, &from, *size, *bytes, *ignore, active, bases, pc,
                )
            }
            Op::CopyCommit => {
                lanes(active).for_each(|lane| self.commits[lane] += 1);
                Ok(())
            }
            Op::CopyWait { pending } => self.copy_wait(ctx, instr, *pending, active),
            _ => unreachable!("only memory instructions come here"),
        }
    }

    /// Addresses of the active lanes.
    pub(super) fn addresses(
        &self,
        ctx: &mut Context,
        instr: &Instr,
        addr: &Addr,
        active: u32,
        bases: Bases,
    ) -> Result<[u64; WARP]> {
        let slot = bases.regs + addr.slot as usize;
        if self.poison[slot] & active != 0 {
            ctx.check_poison(self, instr, self.poison[slot] & active, "an address")?;
        }
        let mut out = [0u64; WARP];
        if addr.wide {
            for (lane, o) in out.iter_mut().enumerate() {
                *o = self.get(slot, lane, true).wrapping_add(addr.offset as u64);
            }
        } else {
            for (lane, o) in out.iter_mut().enumerate() {
                *o = self.regs[slot].0[lane].wrapping_add(addr.offset as u32) as u64;
            }
        }
        Ok(out)
    }

    fn check_aligned(
        &self,
        ctx: &Context,
        instr: &Instr,
        at: &[u64; WARP],
        active: u32,
        size: u64,
    ) -> Result<()> {
        let mut low = 0;
        for (lane, a) in at.iter().enumerate() {
            low |= a & (size - 1) & 0u64.wrapping_sub((active >> lane & 1) as u64);
        }
        if low == 0 {
            return Ok(());
        }
        match lanes(active).find(|&lane| at[lane] & (size - 1) != 0) {
            None => Ok(()),
            Some(lane) => {
                let message = format!("misaligned access of {size} bytes at {:#x}", at[lane]);
                Err(ctx.fault(self, instr, Kind::Misaligned, lane as u32, message))
            }
        }
    }

    fn bad_global(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
        verb: &str,
        error: AccessError,
    ) -> Box<Finding> {
        let (kind, place) = match error {
            AccessError::Nowhere if address < 4096 => {
                (Kind::OutOfBounds, "a null pointer".to_string())
            }
            AccessError::Nowhere => (Kind::OutOfBounds, "no allocation is there".to_string()),
            AccessError::Beyond { size, offset } => (
                Kind::OutOfBounds,
                format!("offset {offset} of an allocation of {size} bytes"),
            ),
            AccessError::Freed { size } => (
                Kind::UseAfterFree,
                format!("an allocation of {size} bytes that was freed"),
            ),
        };
        let fault = if kind == Kind::UseAfterFree {
            "use after free"
        } else {
            "out-of-bounds access"
        };
        let message = format!("{fault}: {verb} of {size} bytes at {address:#x}: {place}");
        ctx.fault(self, instr, kind, lane as u32, message)
    }

    #[inline(always)]
    fn find<'m>(
        &self,
        ctx: &Context<'m>,
        instr: &Instr,
        last: &mut Option<Found<'m>>,
        lane: usize,
        address: u64,
        size: u64,
        verb: &str,
    ) -> Result<(&'m Allocation, usize)> {
        if let Some(f) = last
            && address >= f.start
            && address - f.start + size <= f.allocation.len() as u64
        {
            return Ok((f.allocation, (address - f.start) as usize));
        }
        match ctx.launch.memory.resolve(address, size) {
            Ok((allocation, offset)) => {
                if ctx.launch.config.checks.global_races {
                    allocation.shadow().start(ctx.launch.id);
                }
                *last = Some(Found {
                    allocation,
                    start: address - offset as u64,
                });
                Ok((allocation, offset))
            }
            Err(error) => Err(self.bad_global(ctx, instr, lane, address, size, verb, error)),
        }
    }

    pub(super) fn shared_range(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
    ) -> Result<usize> {
        if address.saturating_add(size) <= ctx.shared.len() as u64 {
            return Ok(address as usize);
        }
        let message = format!(
            "out-of-bounds access: {size} bytes at offset {} of {} bytes of shared memory",
            address as i64,
            ctx.shared.len()
        );
        Err(ctx.fault(self, instr, Kind::OutOfBounds, lane as u32, message))
    }

    fn local_range(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
    ) -> Result<usize> {
        let have = self.local[lane].len() as u64;
        if address.saturating_add(size) <= have {
            return Ok(address as usize);
        }
        let message = format!(
            "out-of-bounds access: {size} bytes at offset {} of {have} bytes of local memory",
            address as i64
        );
        Err(ctx.fault(self, instr, Kind::OutOfBounds, lane as u32, message))
    }

    fn load(
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
        let Op::Load {
            size,
            count,
            dst,
            extend,
            wide,
            strong,
            ..
        } = op
        else {
            return Ok(());
        };
        let (size, n, total) = (*size, *count as usize, *size as u64 * *count as u64);
        let checks = ctx.launch.config.checks;
        let mut invalid = [0u32; 4];
        match space {
            Space::Global => {
                let mut last = None;
                for lane in lanes(mask) {
                    let (a, offset) =
                        self.find(ctx, instr, &mut last, lane, at[lane], total, "load")?;
                    for (e, d_slot) in dst[..n].iter().enumerate() {
                        let o = offset + e * size as usize;
                        // SAFETY: `find` checked the range, `check_aligned` the alignment.
                        let v = unsafe { read(a.pointer().add(o), size) };
                        let d = bases.regs + *d_slot as usize;
                        self.set(d, lane, *wide, extended(v, size, *extend));
                        if checks.uninitialised && !a.is_valid(o, size as usize) {
                            invalid[e] |= 1 << lane;
                        }
                    }
                    if checks.global_races {
                        if *strong {
                            ctx.acquire(at[lane]);
                        } else {
                            ctx.global_access(self, instr, a, offset, total as usize, lane, false);
                        }
                    }
                }
                if ctx.launch.config.counters {
                    ctx.count_global(at, mask, total, false);
                }
            }
            Space::Shared => {
                if ctx.launch.config.counters {
                    ctx.count_shared(at, mask, total);
                }
                let touch = if *strong {
                    Touch::StrongRead
                } else {
                    Touch::Read
                };
                for lane in lanes(mask) {
                    let base = self.shared_range(ctx, instr, lane, at[lane], total)?;
                    for (e, d_slot) in dst[..n].iter().enumerate() {
                        let o = base + e * size as usize;
                        // SAFETY: in range and aligned; shared memory starts aligned to 16.
                        let v = unsafe { read(ctx.shared.pointer().add(o), size) };
                        let d = bases.regs + *d_slot as usize;
                        self.set(d, lane, *wide, extended(v, size, *extend));
                        if checks.uninitialised && !ctx.shared.is_valid(o, size as usize) {
                            invalid[e] |= 1 << lane;
                        }
                    }
                    ctx.shared_access(self, instr, base, total as usize, lane, pc, touch);
                }
            }
            Space::Local => {
                ctx.counters.local_bytes += total * mask.count_ones() as u64;
                for lane in lanes(mask) {
                    let base = self.local_range(ctx, instr, lane, at[lane], total)?;
                    for (e, d_slot) in dst[..n].iter().enumerate() {
                        let o = base + e * size as usize;
                        let mut bytes = [0; 8];
                        bytes[..size as usize]
                            .copy_from_slice(&self.local[lane][o..o + size as usize]);
                        let d = bases.regs + *d_slot as usize;
                        self.set(
                            d,
                            lane,
                            *wide,
                            extended(u64::from_le_bytes(bytes), size, *extend),
                        );
                        if !bits_of(&self.local_valid[lane], o, size as usize) {
                            invalid[e] |= 1 << lane;
                        }
                    }
                }
            }
            _ => {
                for lane in lanes(mask) {
                    let base = at[lane];
                    if base.saturating_add(total) > ctx.launch.params.len() as u64 {
                        let message =
                            format!("out-of-bounds access: offset {base} of the parameters");
                        return Err(ctx.fault(
                            self,
                            instr,
                            Kind::OutOfBounds,
                            lane as u32,
                            message,
                        ));
                    }
                    for (e, d_slot) in dst[..n].iter().enumerate() {
                        let o = base as usize + e * size as usize;
                        let mut bytes = [0; 8];
                        bytes[..size as usize]
                            .copy_from_slice(&ctx.launch.params[o..o + size as usize]);
                        let d = bases.regs + *d_slot as usize;
                        self.set(
                            d,
                            lane,
                            *wide,
                            extended(u64::from_le_bytes(bytes), size, *extend),
                        );
                    }
                }
            }
        }
        for (e, d_slot) in dst[..n].iter().enumerate() {
            self.set_poison(bases.regs + *d_slot as usize, mask, invalid[e]);
        }
        Ok(())
    }

    fn store(
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
        let Op::Store {
            size,
            count,
            src,
            strong,
            ..
        } = op
        else {
            return Ok(());
        };
        let (size, n, total) = (*size, *count as usize, *size as u64 * *count as u64);
        let wide = size == 8;
        let checks = ctx.launch.config.checks;
        match space {
            Space::Global => {
                let mut last = None;
                for lane in lanes(mask) {
                    let (a, offset) =
                        self.find(ctx, instr, &mut last, lane, at[lane], total, "store")?;
                    for (e, s_slot) in src[..n].iter().enumerate() {
                        let o = offset + e * size as usize;
                        let v = self.get(bases.regs + *s_slot as usize, lane, wide);
                        // SAFETY: `find` checked the range, `check_aligned` the alignment.
                        unsafe { write(a.pointer().add(o), size, v) };
                        if checks.uninitialised {
                            a.set_valid(o, size as usize);
                        }
                    }
                    if checks.global_races {
                        if *strong {
                            ctx.release(at[lane]);
                        } else {
                            ctx.global_access(self, instr, a, offset, total as usize, lane, true);
                        }
                    }
                }
                if ctx.launch.config.counters {
                    ctx.count_global(at, mask, total, true);
                }
            }
            Space::Shared => {
                if ctx.launch.config.counters {
                    ctx.count_shared(at, mask, total);
                }
                let touch = if *strong {
                    Touch::StrongWrite
                } else {
                    Touch::Write
                };
                for lane in lanes(mask) {
                    let base = self.shared_range(ctx, instr, lane, at[lane], total)?;
                    for (e, s_slot) in src[..n].iter().enumerate() {
                        let o = base + e * size as usize;
                        let s = bases.regs + *s_slot as usize;
                        let v = self.get(s, lane, wide);
                        // SAFETY: in range and aligned, as for loads.
                        unsafe { write(ctx.shared.pointer().add(o), size, v) };
                        let valid = self.poison[s] >> lane & 1 == 0;
                        ctx.shared.set_valid(o, size as usize, valid);
                    }
                    ctx.shared_access(self, instr, base, total as usize, lane, pc, touch);
                }
            }
            Space::Local => {
                ctx.counters.local_bytes += total * mask.count_ones() as u64;
                for lane in lanes(mask) {
                    let base = self.local_range(ctx, instr, lane, at[lane], total)?;
                    for (e, s_slot) in src[..n].iter().enumerate() {
                        let o = base + e * size as usize;
                        let s = bases.regs + *s_slot as usize;
                        let v = self.get(s, lane, wide);
                        self.local[lane][o..o + size as usize]
                            .copy_from_slice(&v.to_le_bytes()[..size as usize]);
                        let valid = self.poison[s] >> lane & 1 == 0;
                        set_bits(&mut self.local_valid[lane], o, size as usize, valid);
                    }
                }
            }
            _ => {
                let lane = mask.trailing_zeros();
                let message = "store to kernel parameters".to_string();
                return Err(ctx.fault(self, instr, Kind::OutOfBounds, lane, message));
            }
        }
        Ok(())
    }

    fn atom(
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
            let old = unsafe { update(p, size, |old| combine(*op, *ty, old, x, y)) };
            if let Some(d) = d {
                self.set(bases.regs + *d as usize, lane, wide, old);
            }
        }
        if let Some(d) = d {
            self.set_poison(bases.regs + *d as usize, mask, 0);
        }
        Ok(())
    }

    fn copy_async(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        to: &[u64; WARP],
        from: &[u64; WARP],
        size: u8,
        bytes: Option<Slot>,
        ignore: Option<(Pred, bool)>,
        active: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<()> {
        self.check_aligned(ctx, instr, to, active, size as u64)?;
        self.check_aligned(ctx, instr, from, active, size as u64)?;
        if let Some(slot) = bytes {
            let poison = self.poison[bases.regs + slot as usize] & active;
            ctx.check_poison(self, instr, poison, "a copy size")?;
        }
        let mut last = None;
        let mut read = 0;
        for lane in lanes(active) {
            let mut n = match bytes {
                Some(slot) => self.regs[bases.regs + slot as usize].0[lane],
                None => size as u32,
            };
            if n > size as u32 {
                let message = format!("cp.async of {n} bytes into {size}");
                return Err(ctx.fault(self, instr, Kind::Invalid, lane as u32, message));
            }
            if let Some((p, negate)) = ignore {
                let p = bases.preds + p as usize;
                ctx.check_poison(self, instr, self.pred_poison[p] & active, "a predicate")?;
                if (self.preds[p] >> lane & 1 == 1) != negate {
                    n = 0;
                }
            }
            let base = self.shared_range(ctx, instr, lane, to[lane], size as u64)?;
            if n > 0 {
                // Checked at the issue, whenever the data arrives.
                let (a, offset) =
                    self.find(ctx, instr, &mut last, lane, from[lane], n as u64, "copy")?;
                if ctx.launch.config.checks.global_races {
                    ctx.global_access(self, instr, a, offset, n as usize, lane, false);
                }
                read |= 1 << lane;
            }
            ctx.shared_access(self, instr, base, size as usize, lane, pc, Touch::Write);
            if let Some(races) = &mut ctx.races {
                races.copy(base, size as usize, self.id as usize, lane as u32, true);
            }
            let copy = Copy {
                to: base as u32,
                size,
                bytes: n as u8,
                from: from[lane],
                lane: lane as u8,
                group: self.commits[lane],
                pc,
            };
            if ctx.launch.config.copy_async == CopyAsync::Early {
                self.land(ctx, instr, &copy)?;
            }
            self.copies.push(copy);
        }
        if ctx.launch.config.counters {
            ctx.count_global(from, read, size as u64, false);
            ctx.count_shared(to, active, size as u64);
        }
        Ok(())
    }

    /// The data of a copy arrives.
    fn land(&self, ctx: &mut Context, instr: &Instr, copy: &Copy) -> Result<()> {
        let (base, bytes) = (copy.to as usize, copy.bytes as usize);
        let mut data = [0u8; 16];
        let mut valid = u32::MAX;
        if bytes > 0 {
            match ctx.launch.memory.resolve(copy.from, bytes as u64) {
                Ok((a, offset)) => {
                    for (i, byte) in data[..bytes].iter_mut().enumerate() {
                        // SAFETY: `resolve` checked the range.
                        *byte = unsafe { read(a.pointer().add(offset + i), 1) } as u8;
                        valid &= !((!a.is_valid(offset + i, 1) as u32) << i);
                    }
                }
                Err(error) => {
                    let lane = copy.lane as usize;
                    return Err(self.bad_global(
                        ctx,
                        instr,
                        lane,
                        copy.from,
                        bytes as u64,
                        "copy",
                        error,
                    ));
                }
            }
        }
        for (i, word) in data[..copy.size as usize].chunks_exact(4).enumerate() {
            let v = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let at = base + 4 * i;
            // SAFETY: range and alignment were checked when the copy was issued.
            unsafe { write(ctx.shared.pointer().add(at), 4, v as u64) };
            if valid == u32::MAX {
                ctx.shared.set_valid(at, 4, true);
            } else {
                (0..4).for_each(|b| {
                    ctx.shared
                        .set_valid(at + b, 1, valid >> (4 * i + b) & 1 == 1)
                });
            }
        }
        Ok(())
    }

    fn copy_wait(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        pending: u32,
        active: u32,
    ) -> Result<()> {
        let mut copies = std::mem::take(&mut self.copies);
        let mut result = Ok(());
        copies.retain(|copy| {
            let lane = copy.lane as usize;
            let wait =
                active >> lane & 1 == 1 && copy.group < self.commits[lane].saturating_sub(pending);
            if !wait || result.is_err() {
                return true;
            }
            if ctx.launch.config.copy_async == CopyAsync::Late {
                result = self.land(ctx, instr, copy);
            }
            if let Some(races) = &mut ctx.races {
                races.copy(
                    copy.to as usize,
                    copy.size as usize,
                    self.id as usize,
                    lane as u32,
                    false,
                );
            }
            false
        });
        self.copies = copies;
        result
    }

    /// Copies of threads that exit need not be waited for; nobody may read them.
    pub(super) fn abandon_copies(&mut self, lanes: u32) {
        self.copies.retain(|copy| lanes >> copy.lane & 1 == 0);
    }
}

/// Applies a function to memory as one step; gives the old value.
///
/// # Safety
/// `p` is valid for `size` bytes and aligned to them.
unsafe fn update(p: *const u8, size: u8, f: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: the caller's.
    unsafe {
        match size {
            2 => {
                let cell = &*(p as *const AtomicU16);
                match cell.fetch_update(Relaxed, Relaxed, |v| Some(f(v as u64) as u16)) {
                    Ok(v) | Err(v) => v as u64,
                }
            }
            4 => {
                let cell = &*(p as *const AtomicU32);
                match cell.fetch_update(Relaxed, Relaxed, |v| Some(f(v as u64) as u32)) {
                    Ok(v) | Err(v) => v as u64,
                }
            }
            _ => {
                let cell = &*(p as *const AtomicU64);
                match cell.fetch_update(Relaxed, Relaxed, |v| Some(f(v))) {
                    Ok(v) | Err(v) => v,
                }
            }
        }
    }
}

/// The lanes of each space; generic addresses are told apart by their window, and become
/// offsets within it.
fn split(
    space: Space,
    at: &mut [u64; WARP],
    active: u32,
) -> impl Iterator<Item = (Space, u32)> + use<> {
    let mut out = [
        (Space::Global, 0),
        (Space::Shared, 0),
        (Space::Local, 0),
        (Space::Param, 0),
    ];
    if space == Space::Generic {
        for lane in lanes(active) {
            let space = space_of(at[lane]);
            if space != Space::Global {
                at[lane] &= WINDOW - 1;
            }
            for (s, mask) in &mut out {
                *mask |= ((*s == space) as u32) << lane;
            }
        }
    } else {
        out[0] = (space, active);
    }
    out.into_iter().filter(|(_, mask)| *mask != 0)
}
