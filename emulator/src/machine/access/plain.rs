//! Loads and stores.

use super::{Result, cell};
use crate::machine::block::Context;
use crate::machine::code::*;
use crate::machine::execute::lanes;
use crate::machine::lanes::{Lanes, WARP, get_lane, set_lane};
use crate::machine::race::Touch;
use crate::machine::warp::{Bases, Warp};
use crate::ptx::ast::Space;
use crate::report::Kind;

/// Where the elements of a load go.
struct Loading<'o> {
    dst: &'o [Slot],
    base: usize,
    size: u8,
    extend: Extend,
    wide: bool,
    /// By element, the lanes that got something that was never written.
    invalid: [u32; 4],
}

impl Loading<'_> {
    /// Loads the elements of a lane: `element` gives the bits at an offset, and whether they were
    /// written.
    #[inline(always)]
    fn take(&mut self, regs: &mut [Lanes], lane: usize, element: impl Fn(usize) -> (u64, bool)) {
        for (e, slot) in self.dst.iter().enumerate() {
            let (bits, valid) = element(e * self.size as usize);
            let bits = cell::extended(bits, self.size, self.extend);
            set_lane(regs, self.base + *slot as usize, lane, self.wide, bits);
            self.invalid[e] |= (!valid as u32) << lane;
        }
    }
}

/// Where the elements of a store come from.
struct Storing<'o> {
    src: &'o [Slot],
    base: usize,
    size: u8,
}

impl Storing<'_> {
    /// Stores the elements of a lane: `element` takes an offset, the bits, and whether they are
    /// defined.
    #[inline(always)]
    fn give(
        &self,
        regs: &[Lanes],
        poison: &[u32],
        lane: usize,
        mut element: impl FnMut(usize, u64, bool),
    ) {
        for (e, slot) in self.src.iter().enumerate() {
            let at = self.base + *slot as usize;
            let bits = get_lane(regs, at, lane, self.size == 8);
            element(e * self.size as usize, bits, poison[at] >> lane & 1 == 0);
        }
    }
}

impl Warp {
    pub(super) fn load(
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
        let (size, total) = (*size, *size as u64 * *count as u64);
        let checks = ctx.launch.config.checks;
        let mut into = Loading {
            dst: &dst[..*count as usize],
            base: bases.regs,
            size,
            extend: *extend,
            wide: *wide,
            invalid: [0; 4],
        };
        match space {
            Space::Global => {
                let mut last = None;
                for lane in lanes(mask) {
                    let (a, base) =
                        self.find(ctx, instr, &mut last, lane, at[lane], total, "load")?;
                    into.take(&mut self.regs, lane, |o| {
                        // SAFETY: `find` checked the range, `check_aligned` the alignment.
                        let bits = unsafe { cell::read(a.pointer().add(base + o), size) };
                        let valid = !checks.uninitialised || a.is_valid(base + o, size as usize);
                        (bits, valid)
                    });
                    if checks.global_races {
                        if *strong {
                            ctx.acquire(at[lane]);
                        } else {
                            ctx.global_access(self, instr, a, base, total as usize, lane, false);
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
                let memory = ctx.shared.pointer();
                for lane in lanes(mask) {
                    let base = self.shared_range(ctx, instr, lane, at[lane], total)?;
                    let shared = &ctx.shared;
                    into.take(&mut self.regs, lane, |o| {
                        // SAFETY: in range and aligned; shared memory starts aligned to 16.
                        let bits = unsafe { cell::read(memory.add(base + o), size) };
                        let valid =
                            !checks.uninitialised || shared.is_valid(base + o, size as usize);
                        (bits, valid)
                    });
                    ctx.shared_access(self, instr, base, total as usize, lane, pc, touch);
                }
            }
            Space::Local => {
                ctx.counters.local_bytes += total * mask.count_ones() as u64;
                for lane in lanes(mask) {
                    let have = self.local[lane].len();
                    let base =
                        self.range(ctx, instr, lane, at[lane], total, have, "local memory")?;
                    let (bytes, written) = (&self.local[lane], &self.local_valid[lane]);
                    into.take(&mut self.regs, lane, |o| {
                        let bits = cell::of_slice(bytes, base + o, size);
                        (bits, cell::bits_of(written, base + o, size as usize))
                    });
                }
            }
            _ => {
                let params = &ctx.launch.params;
                for lane in lanes(mask) {
                    let have = params.len();
                    let base = self.range(ctx, instr, lane, at[lane], total, have, "parameters")?;
                    into.take(&mut self.regs, lane, |o| {
                        (cell::of_slice(params, base + o, size), true)
                    });
                }
            }
        }
        for (slot, invalid) in into.dst.iter().zip(into.invalid) {
            self.set_poison(bases.regs + *slot as usize, mask, invalid);
        }
        Ok(())
    }

    pub(super) fn store(
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
        let (size, total) = (*size, *size as u64 * *count as u64);
        let checks = ctx.launch.config.checks;
        let from = Storing {
            src: &src[..*count as usize],
            base: bases.regs,
            size,
        };
        match space {
            Space::Global => {
                let mut last = None;
                for lane in lanes(mask) {
                    let (a, base) =
                        self.find(ctx, instr, &mut last, lane, at[lane], total, "store")?;
                    from.give(&self.regs, &self.poison, lane, |o, bits, _| {
                        // SAFETY: `find` checked the range, `check_aligned` the alignment.
                        unsafe { cell::write(a.pointer().add(base + o), size, bits) };
                        if checks.uninitialised {
                            a.set_valid(base + o, size as usize);
                        }
                    });
                    if checks.global_races {
                        if *strong {
                            ctx.release(at[lane]);
                        } else {
                            ctx.global_access(self, instr, a, base, total as usize, lane, true);
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
                let memory = ctx.shared.pointer();
                for lane in lanes(mask) {
                    let base = self.shared_range(ctx, instr, lane, at[lane], total)?;
                    let shared = &mut ctx.shared;
                    from.give(&self.regs, &self.poison, lane, |o, bits, valid| {
                        // SAFETY: in range and aligned, as for loads.
                        unsafe { cell::write(memory.add(base + o), size, bits) };
                        shared.set_valid(base + o, size as usize, valid);
                    });
                    ctx.shared_access(self, instr, base, total as usize, lane, pc, touch);
                }
            }
            Space::Local => {
                ctx.counters.local_bytes += total * mask.count_ones() as u64;
                for lane in lanes(mask) {
                    let have = self.local[lane].len();
                    let base =
                        self.range(ctx, instr, lane, at[lane], total, have, "local memory")?;
                    let (bytes, written) = (&mut self.local[lane], &mut self.local_valid[lane]);
                    from.give(&self.regs, &self.poison, lane, |o, bits, valid| {
                        let (at, size) = (base + o, size as usize);
                        bytes[at..at + size].copy_from_slice(&bits.to_le_bytes()[..size]);
                        cell::set_bits(written, at, size, valid);
                    });
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
}
