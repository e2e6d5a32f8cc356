//! Asynchronous copies from device to shared memory.

use super::{Places, Result, cell};
use crate::config::CopyAsync;
use crate::machine::block::Context;
use crate::machine::code::*;
use crate::machine::execute::lanes;
use crate::machine::lanes::WARP;
use crate::machine::race::Touch;
use crate::machine::warp::{Bases, Copy, Warp};
use crate::report::Kind;

impl Warp {
    pub(super) fn copy_async(
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
        ctx.count_global(&Places::new(from, read, size as u64), false);
        ctx.count_shared(&Places::new(to, active, size as u64));
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
                        *byte = unsafe { cell::read(a.pointer().add(offset + i), 1) } as u8;
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
            unsafe { cell::write(ctx.shared.pointer().add(at), 4, v as u64) };
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

    pub(super) fn copy_wait(
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
    pub(in crate::machine) fn abandon_copies(&mut self, lanes: u32) {
        self.copies.retain(|copy| lanes >> copy.lane & 1 == 0);
    }
}
