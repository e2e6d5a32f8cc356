//! Memory instructions: addresses, the spaces they lie in, and what may be accessed there.

mod atomic;
mod cell;
mod copy;
mod places;
mod plain;

use super::block::Context;
use super::code::*;
use super::execute::{lanes, space_of};
use super::lanes::{WARP, wide_lanes};
use super::memory::{AccessError, Allocation};
use super::warp::{Bases, Warp};
use crate::ptx::ast::Space;
use crate::report::{Finding, Kind};
use crate::widened;
pub(super) use places::Places;
use plain::Transfer;

type Result<T, E = Box<Finding>> = std::result::Result<T, E>;

/// Allocation found last, to skip the search for the next lane.
struct Found<'m> {
    allocation: &'m Allocation,
    start: u64,
}

impl Warp {
    pub(in crate::machine) fn access(
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
                for (e, slot) in dst[..*count as usize].iter().enumerate() {
                    let at = *offset as usize + e * *size as usize;
                    let bits = cell::of_slice(ctx.launch.params, at, *size);
                    let bits = cell::extended(bits, *size, *extend);
                    let d = bases.regs + *slot as usize;
                    self.fill(d, active, *wide, bits);
                    self.set_poison(d, active, 0);
                }
                Ok(())
            }
            Op::Load {
                addr,
                size,
                count,
                dst,
                extend,
                wide,
                strong,
            } => {
                let transfer = Transfer {
                    store: false,
                    slots: &dst[..*count as usize],
                    size: *size,
                    extend: *extend,
                    wide: *wide,
                    strong: *strong,
                };
                self.transfer(ctx, instr, addr, &transfer, active, bases, pc)
            }
            Op::Store {
                addr,
                size,
                count,
                src,
                strong,
            } => {
                let transfer = Transfer {
                    store: true,
                    slots: &src[..*count as usize],
                    size: *size,
                    extend: Extend::Zero,
                    wide: *size == 8,
                    strong: *strong,
                };
                self.transfer(ctx, instr, addr, &transfer, active, bases, pc)
            }
            Op::Atom { addr, ty, .. } => {
                let mut at = [0; WARP];
                self.addresses(ctx, instr, addr, active, bases, &mut at)?;
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
                let mut at = [[0; WARP]; 2];
                self.addresses(ctx, instr, to, active, bases, &mut at[0])?;
                self.addresses(ctx, instr, from, active, bases, &mut at[1])?;
                let [to, from] = &at;
                self.copy_async(
                    ctx, instr, to, from, *size, *bytes, *ignore, active, bases, pc,
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

    /// Addresses of all lanes; those of the active ones must be defined.
    #[inline(always)]
    pub(in crate::machine) fn addresses(
        &self,
        ctx: &Context,
        instr: &Instr,
        addr: &Addr,
        active: u32,
        bases: Bases,
        out: &mut [u64; WARP],
    ) -> Result<()> {
        let slot = bases.regs + addr.slot as usize;
        if addr.wide {
            add_wide(wide_lanes(&self.regs, slot), addr.offset as u64, out);
        } else {
            add(&self.regs[slot].0, addr.offset as u32, out);
        }
        ctx.check_poison(self, instr, self.poison[slot] & active, "an address")
    }

    #[inline(always)]
    fn check_aligned(
        &self,
        ctx: &Context,
        instr: &Instr,
        at: &[u64; WARP],
        active: u32,
        size: u64,
    ) -> Result<()> {
        // Lanes that are off may hold anything: then it is looked at more closely.
        if union(at) & (size - 1) == 0 {
            return Ok(());
        }
        match lanes(active).find(|&lane| at[lane] & (size - 1) != 0) {
            None => Ok(()),
            Some(lane) => Err(self.misaligned(ctx, instr, lane, at[lane], size)),
        }
    }

    #[cold]
    fn misaligned(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
    ) -> Box<Finding> {
        let message = format!("misaligned access of {size} bytes at {address:#x}");
        ctx.fault(self, instr, Kind::Misaligned, lane as u32, message)
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

    /// Checks a range of shared or local memory or of the parameters.
    fn range(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
        have: usize,
        what: &str,
    ) -> Result<usize> {
        if address.saturating_add(size) <= have as u64 {
            return Ok(address as usize);
        }
        let message = format!(
            "out-of-bounds access: {size} bytes at offset {} of {have} bytes of {what}",
            address as i64
        );
        Err(ctx.fault(self, instr, Kind::OutOfBounds, lane as u32, message))
    }

    pub(in crate::machine) fn shared_range(
        &self,
        ctx: &Context,
        instr: &Instr,
        lane: usize,
        address: u64,
        size: u64,
    ) -> Result<usize> {
        let have = ctx.shared.len();
        self.range(ctx, instr, lane, address, size, have, "shared memory")
    }
}

widened! {
    fn add_wide(base: &[u64; WARP], offset: u64, out: &mut [u64; WARP]) {
        for (o, b) in out.iter_mut().zip(base) {
            *o = b.wrapping_add(offset);
        }
    }

    fn add(base: &[u32; WARP], offset: u32, out: &mut [u64; WARP]) {
        for (o, b) in out.iter_mut().zip(base) {
            *o = b.wrapping_add(offset) as u64;
        }
    }

    /// The bits that any lane has.
    fn union(at: &[u64; WARP]) -> u64 {
        at.iter().fold(0, |all, a| all | a)
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
    // All windows lie below this, allocations never.
    let end = PARAM_WINDOW + WINDOW;
    if space == Space::Generic && active == !0 && at.iter().all(|a| *a >= end) {
        out[0] = (Space::Global, active);
    } else if space == Space::Generic {
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
