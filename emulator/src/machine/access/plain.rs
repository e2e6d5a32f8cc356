//! Loads and stores.

use super::{Places, Result, cell, split};
use crate::machine::block::Context;
use crate::machine::code::*;
use crate::machine::execute::{each, lanes};
use crate::machine::lanes::{Lanes, WARP};
use crate::machine::race::Touch;
use crate::machine::warp::{Bases, Warp};
use crate::ptx::ast::Space;
use crate::report::Kind;

/// A load or a store: one to four elements a lane, to or from as many registers.
pub(super) struct Transfer<'o> {
    pub store: bool,
    pub slots: &'o [Slot],
    /// Bytes of an element.
    pub size: u8,
    /// How a loaded element fills its register.
    pub extend: Extend,
    /// The registers have 64 bits.
    pub wide: bool,
    pub strong: bool,
}

impl Transfer<'_> {
    fn total(&self) -> u64 {
        self.size as u64 * self.slots.len() as u64
    }

    fn touch(&self) -> Touch {
        match (self.store, self.strong) {
            (false, false) => Touch::Read,
            (false, true) => Touch::StrongRead,
            (true, false) => Touch::Write,
            (true, true) => Touch::StrongWrite,
        }
    }

    /// The elements: offset from the first, and register.
    fn elements(&self, bases: Bases) -> impl Iterator<Item = (usize, usize)> + use<'_> {
        let size = self.size as usize;
        let place = move |(e, slot): (usize, &Slot)| (e * size, bases.regs + *slot as usize);
        self.slots.iter().enumerate().map(place)
    }

    /// Moves one element of each lane.
    ///
    /// # Safety
    /// `pointer` gives a place in memory that is valid for `size` bytes and aligned to them.
    #[inline(always)]
    unsafe fn element(
        &self,
        regs: &mut [Lanes],
        register: usize,
        mask: u32,
        pointer: impl FnMut(usize) -> *mut u8,
    ) {
        let register = regs[register..register + 1 + self.wide as usize].as_mut_ptr();
        // SAFETY: the caller's; the register has the width that `wide` says.
        unsafe {
            match self.size {
                1 => self.lanes::<1>(register, mask, pointer),
                2 => self.lanes::<2>(register, mask, pointer),
                4 => self.lanes::<4>(register, mask, pointer),
                _ => self.lanes::<8>(register, mask, pointer),
            }
        }
    }

    /// As [`Transfer::element`], for elements of `SIZE` bytes.
    ///
    /// # Safety
    /// Likewise; `register` is valid for 32 words of 32 or, if `wide`, 64 bits.
    #[inline(always)]
    unsafe fn lanes<const SIZE: u8>(
        &self,
        register: *mut Lanes,
        mask: u32,
        mut pointer: impl FnMut(usize) -> *mut u8,
    ) {
        let (narrow, wide) = (register.cast::<u32>(), register.cast::<u64>());
        let extended = |bits| cell::extended(bits, SIZE, self.extend);
        // SAFETY: the caller's; lanes are below 32.
        unsafe {
            match (self.store, self.wide) {
                (false, false) => each(mask, |lane| {
                    *narrow.add(lane) = extended(cell::read(pointer(lane), SIZE)) as u32;
                }),
                (false, true) => each(mask, |lane| {
                    *wide.add(lane) = extended(cell::read(pointer(lane), SIZE));
                }),
                (true, false) => each(mask, |lane| {
                    cell::write(pointer(lane), SIZE, *narrow.add(lane) as u64);
                }),
                (true, true) => each(mask, |lane| {
                    cell::write(pointer(lane), SIZE, *wide.add(lane));
                }),
            }
        }
    }
}

impl Warp {
    pub(super) fn transfer(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        addr: &Addr,
        t: &Transfer,
        active: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<()> {
        let total = t.total();
        let mut at = [0; WARP];
        self.addresses(ctx, instr, addr, active, bases, &mut at)?;
        self.check_aligned(ctx, instr, &at, active, total)?;
        for (space, mask) in split(addr.space, &mut at, active) {
            let places = Places::new(&at, mask, total);
            match space {
                Space::Global => self.global(ctx, instr, t, &places, bases)?,
                Space::Shared => self.shared(ctx, instr, t, &places, bases, pc)?,
                Space::Local => self.local(ctx, instr, t, &places, bases)?,
                _ => self.parameter(ctx, instr, t, &places, bases)?,
            }
        }
        Ok(())
    }

    fn global(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        t: &Transfer,
        places: &Places,
        bases: Bases,
    ) -> Result<()> {
        let checks = ctx.launch.config.checks;
        let (at, total) = (places.at, t.total());
        if t.store && checks.uninitialised {
            // Local memory may hold poison (spilled registers); device memory may not.
            for (_, register) in t.elements(bases) {
                let poison = self.poison[register] & places.mask;
                ctx.check_poison(self, instr, poison, "a value stored to device memory")?;
            }
        }
        let verb = if t.store { "store" } else { "load" };
        let mut left = places.mask;
        while left != 0 {
            let lane = left.trailing_zeros() as usize;
            let (a, offset) = self.find(ctx, instr, &mut None, lane, at[lane], total, verb)?;
            let start = at[lane] - offset as u64;
            let part = places.within(left, start, a.len() as u64);
            left &= !part;
            // All lanes' bytes, one after the other: then they are looked at together.
            let whole = (places.adjacent && part == !0).then_some(WARP * total as usize);
            let place = |lane: usize| (at[lane] - start) as usize;
            let known = match whole {
                _ if !checks.uninitialised => true,
                Some(len) if t.store => {
                    a.set_valid_range(offset, len);
                    true
                }
                Some(len) => a.is_valid_range(offset, len),
                None => false,
            };
            for (o, register) in t.elements(bases) {
                let first = a.pointer().wrapping_add(o);
                let regs = &mut self.regs;
                // SAFETY: `within` says that the lanes' bytes are in the allocation,
                // `check_aligned` that they are aligned.
                unsafe {
                    if whole.is_some() {
                        let pointer = |lane| first.add(offset + lane * total as usize);
                        t.element(regs, register, part, pointer);
                    } else {
                        t.element(regs, register, part, |lane| first.add(place(lane)));
                    }
                }
                let size = t.size as usize;
                if t.store && !known {
                    lanes(part).for_each(|lane| a.set_valid(place(lane) + o, size));
                } else if !t.store {
                    let unknown = if known { 0 } else { part };
                    let invalid = lanes(unknown).filter(|lane| !a.is_valid(place(*lane) + o, size));
                    let invalid = invalid.fold(0, |m, lane| m | 1 << lane);
                    self.set_poison(register, part, invalid);
                }
            }
            if !checks.global_races {
                continue;
            }
            if let Some(len) = whole
                && !t.strong
                && a.shadow().alone(offset, len, ctx.linear as u32, t.store)
            {
                continue;
            }
            for lane in lanes(part) {
                let (offset, total) = (place(lane), total as usize);
                match (t.strong, t.store) {
                    (true, true) => ctx.release(at[lane]),
                    (true, false) => ctx.acquire(at[lane]),
                    _ => ctx.global_access(self, instr, a, offset, total, lane, t.store),
                }
            }
        }
        ctx.count_global(places, t.store);
        Ok(())
    }

    fn shared(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        t: &Transfer,
        places: &Places,
        bases: Bases,
        pc: u32,
    ) -> Result<()> {
        let (at, total) = (places.at, t.total());
        ctx.count_shared(places);
        let part = places.within(places.mask, 0, ctx.shared.len() as u64);
        for (o, register) in t.elements(bases) {
            let first = ctx.shared.pointer().wrapping_add(o);
            // SAFETY: in range and aligned; shared memory starts aligned to 16.
            unsafe {
                t.element(&mut self.regs, register, part, |lane| {
                    first.add(at[lane] as usize)
                })
            };
            if !ctx.launch.config.checks.uninitialised {
                continue;
            }
            let (size, place) = (t.size as usize, |lane: usize| at[lane] as usize + o);
            let mut invalid = 0;
            for lane in lanes(part) {
                if t.store {
                    let valid = self.poison[register] >> lane & 1 == 0;
                    ctx.shared.set_valid(place(lane), size, valid);
                } else {
                    invalid |= (!ctx.shared.is_valid(place(lane), size) as u32) << lane;
                }
            }
            if !t.store {
                self.set_poison(register, part, invalid);
            }
        }
        if ctx.races.is_some() {
            for lane in lanes(part) {
                let (base, total) = (at[lane] as usize, total as usize);
                ctx.shared_access(self, instr, base, total, lane, pc, t.touch());
            }
        }
        self.in_range(ctx, instr, places, part, ctx.shared.len(), "shared memory")
    }

    fn local(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        t: &Transfer,
        places: &Places,
        bases: Bases,
    ) -> Result<()> {
        let (at, total) = (places.at, t.total());
        ctx.counters.local_bytes += total * places.mask.count_ones() as u64;
        let have = self.local.len();
        let part = places.within(places.mask, 0, have as u64);
        for (o, register) in t.elements(bases) {
            let local = &mut self.local;
            // SAFETY: in range and aligned, so that an element lies in one cell.
            unsafe {
                t.element(&mut self.regs, register, part, |lane| {
                    local.pointer(lane, at[lane] as usize + o)
                })
            };
            let mut invalid = 0;
            for lane in lanes(part) {
                let (place, size) = (at[lane] as usize + o, t.size as usize);
                if t.store {
                    let valid = self.poison[register] >> lane & 1 == 0;
                    self.local.set_valid(lane, place, size, valid);
                } else {
                    invalid |= (!self.local.is_valid(lane, place, size) as u32) << lane;
                }
            }
            if !t.store {
                self.set_poison(register, part, invalid);
            }
        }
        self.in_range(ctx, instr, places, part, have, "local memory")
    }

    fn parameter(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        t: &Transfer,
        places: &Places,
        bases: Bases,
    ) -> Result<()> {
        if t.store {
            let lane = places.mask.trailing_zeros();
            let message = "store to kernel parameters".to_string();
            return Err(ctx.fault(self, instr, Kind::OutOfBounds, lane, message));
        }
        let params = ctx.launch.params;
        let part = places.within(places.mask, 0, params.len() as u64);
        for (o, register) in t.elements(bases) {
            for lane in lanes(part) {
                let bits = cell::of_slice(params, places.at[lane] as usize + o, t.size);
                let bits = cell::extended(bits, t.size, t.extend);
                self.set(register, lane, t.wide, bits);
            }
            self.set_poison(register, part, 0);
        }
        self.in_range(ctx, instr, places, part, params.len(), "parameters")
    }

    /// An error if only a part of the lanes was in range.
    fn in_range(
        &self,
        ctx: &Context,
        instr: &Instr,
        places: &Places,
        part: u32,
        have: usize,
        what: &str,
    ) -> Result<()> {
        if part == places.mask {
            return Ok(());
        }
        let lane = (places.mask & !part).trailing_zeros() as usize;
        let (address, size) = (places.at[lane], places.size);
        self.range(ctx, instr, lane, address, size, have, what)
            .map(|_| ())
    }
}
