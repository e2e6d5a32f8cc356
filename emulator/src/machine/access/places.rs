//! Where the lanes of a warp access memory, and what a GPU would make of that.

use crate::machine::block::Context;
use crate::machine::execute::lanes;
use crate::machine::lanes::WARP;
use crate::widened;

const BANKS: usize = 32;

/// An access of some lanes: as many bytes for each.
pub(in crate::machine) struct Places<'a> {
    /// Addresses, or offsets within a space.
    pub at: &'a [u64; WARP],
    /// The lanes.
    pub mask: u32,
    /// Bytes of a lane.
    pub size: u64,
    /// All 32 lanes take part, and each starts where the one before it ends.
    pub adjacent: bool,
}

widened! {
    /// Zero if each lane starts `size` bytes after the one before it.
    fn gaps(at: &[u64; WARP], size: u64) -> u64 {
        let mut gaps = 0;
        for (lane, a) in at.iter().enumerate() {
            gaps |= a ^ at[0].wrapping_add(lane as u64 * size);
        }
        gaps
    }

    /// A bit a lane that starts at `start` or up to `last` bytes later.
    fn between(at: &[u64; WARP], start: u64, last: u64) -> u32 {
        let mut bits = [0u32; WARP];
        for (lane, a) in at.iter().enumerate() {
            bits[lane] = ((a.wrapping_sub(start) <= last) as u32) << lane;
        }
        bits.iter().fold(0, |all, b| all | b)
    }
}

impl<'a> Places<'a> {
    /// The lanes of `mask` access `size` bytes each.
    #[inline(always)]
    pub fn new(at: &'a [u64; WARP], mask: u32, size: u64) -> Places<'a> {
        let adjacent = mask == !0 && gaps(at, size) == 0;
        Places {
            at,
            mask,
            size,
            adjacent,
        }
    }

    /// The lanes of `left` before the first that is not in the `len` bytes from `start`.
    pub fn within(&self, left: u32, start: u64, len: u64) -> u32 {
        let Some(last) = len.checked_sub(self.size) else {
            return 0;
        };
        let is_in = |lane: usize| self.at[lane].wrapping_sub(start) <= last;
        if self.adjacent && is_in(0) && is_in(WARP - 1) {
            return left;
        }
        let outside = left & !between(self.at, start, last);
        let first = outside & outside.wrapping_neg();
        left & first.wrapping_sub(1)
    }

    /// The 32-byte sectors of device memory touched, and the different addresses.
    fn sectors(&self) -> (u64, u64) {
        if self.adjacent {
            let (first, last) = (self.at[0] >> 5, self.at[WARP - 1] >> 5);
            return (last - first + 1, WARP as u64);
        }
        let mut all = [0; WARP];
        let mut n = 0;
        let mut sorted = true;
        for lane in lanes(self.mask) {
            let address = self.at[lane];
            sorted &= n == 0 || address >= all[n - 1];
            all[n] = address;
            n += 1;
        }
        let all = &mut all[..n];
        if !sorted {
            all.sort_unstable();
        }
        let (mut sectors, mut unique) = (0, 0);
        let mut last = None;
        for a in all.iter() {
            unique += last.is_none_or(|l: u64| l != *a) as u64;
            sectors += last.is_none_or(|l: u64| l >> 5 != a >> 5) as u64;
            last = Some(*a);
        }
        (sectors, unique)
    }

    /// The wavefronts of shared memory, 128 bytes of different banks each: those that there are
    /// without conflicts, and those on top.
    fn wavefronts(&self) -> (u64, u64) {
        let words = (self.size as usize).div_ceil(4);
        if self.adjacent {
            return (words as u64, 0);
        }
        let phase = WARP / words;
        let (mut wavefronts, mut conflicts) = (0, 0);
        for first in (0..WARP).step_by(phase) {
            let part = self.mask >> first & (!0 >> (WARP - phase));
            if part == 0 {
                continue;
            }
            wavefronts += 1;
            let mut banks = [u64::MAX; BANKS];
            // Words that find their bank taken by another.
            let mut extra = [0; WARP];
            let mut n = 0;
            for lane in lanes(part) {
                for w in 0..words as u64 {
                    let word = (self.at[first + lane] >> 2) + w;
                    let bank = &mut banks[word as usize % BANKS];
                    if *bank == u64::MAX {
                        *bank = word;
                    } else if *bank != word && !extra[..n].contains(&word) {
                        extra[n] = word;
                        n += 1;
                    }
                }
            }
            let mut taken = [0; BANKS];
            for word in &extra[..n] {
                taken[*word as usize % BANKS] += 1;
            }
            conflicts += taken.iter().max().copied().unwrap_or(0);
        }
        (wavefronts, conflicts)
    }
}

impl Context<'_> {
    /// Counts what an access to device memory moves and touches.
    pub(in crate::machine) fn count_global(&mut self, places: &Places, store: bool) {
        if !self.launch.config.counters {
            return;
        }
        let (sectors, unique) = places.sectors();
        let (total, unique) = (
            places.size * places.mask.count_ones() as u64,
            places.size * unique,
        );
        let c = &mut self.counters;
        if store {
            c.global_store_bytes += total;
            c.global_store_sectors += sectors;
            c.global_store_unique_bytes += unique;
        } else {
            c.global_load_bytes += total;
            c.global_load_sectors += sectors;
            c.global_load_unique_bytes += unique;
        }
    }

    /// Counts the wavefronts of an access to shared memory.
    pub(in crate::machine) fn count_shared(&mut self, places: &Places) {
        if !self.launch.config.counters {
            return;
        }
        let (wavefronts, conflicts) = places.wavefronts();
        self.counters.shared_wavefronts += wavefronts;
        self.counters.bank_conflicts += conflicts;
    }
}
