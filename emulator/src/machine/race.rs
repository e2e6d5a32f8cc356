//! Unordered accesses to shared memory (threads of a block) and to device memory (blocks).
//!
//! Shared memory: warps carry vector clocks that block barriers join. Every access is stamped
//! with its warp's clock, which only barriers and `bar.warp.sync` advance; within a warp, two
//! lanes are ordered if the clock has advanced in between. Each 2-byte cell remembers its last
//! write and the reads since.
//!
//! Device memory: each 4-byte cell remembers the block that wrote it last and one that read it.
//! Blocks are ordered only by fence + atomic (or volatile) on a common location.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const MANY: u8 = 0xff;

#[derive(Clone, Copy, Default)]
struct Cell {
    write_stamp: u32,
    write_pc: u32,
    read_stamp: u32,
    read_pc: u32,
    /// Warps that read since the last write.
    readers: u32,
    write_warp: u8,
    write_lane: u8,
    /// Warp that read last, and which of its lanes since its clock advanced: one, or `MANY`.
    read_warp: u8,
    read_lane: u8,
    /// Reads have different stamps: they are in `SharedRaces::mixed`.
    mixed: bool,
    strong: bool,
    in_flight: bool,
}

/// How a thread touches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Plain load.
    Read,
    /// Plain store.
    Write,
    /// Volatile or relaxed load.
    StrongRead,
    /// Volatile or relaxed store.
    StrongWrite,
    /// Atomic read-modify-write.
    Atomic,
}

/// The other access of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// It wrote (or this one writes what it read).
    pub wrote: bool,
    /// It was an asynchronous copy that nobody waited for.
    pub in_flight: bool,
    /// Its warp.
    pub warp: u32,
    /// Its lane, if one is known.
    pub lane: Option<u32>,
    /// Its instruction.
    pub pc: u32,
}

/// Clocks of a block and the shadow of its shared memory.
pub struct SharedRaces {
    cells: Vec<Cell>,
    /// Stamps up to this are of earlier blocks.
    floor: u32,
    now: u32,
    warps: usize,
    /// `clocks[w * warps + v]`: what warp w knows of warp v.
    clocks: Vec<u32>,
    own: Vec<u32>,
    mixed: HashMap<u32, Vec<u32>>,
    published: HashMap<u32, Vec<u32>>,
}

impl SharedRaces {
    /// A shadow for blocks of that many warps and bytes of shared memory.
    pub fn new(warps: usize, bytes: usize) -> SharedRaces {
        SharedRaces {
            cells: vec![Cell::default(); bytes.div_ceil(2)],
            floor: 0,
            now: 0,
            warps,
            clocks: vec![0; warps * warps],
            own: vec![0; warps],
            mixed: HashMap::new(),
            published: HashMap::new(),
        }
    }

    /// Forgets the previous block.
    pub fn start_block(&mut self) {
        if self.now > u32::MAX / 2 {
            self.cells.fill(Cell::default());
            self.now = 0;
        }
        self.floor = self.now;
        self.now += 1;
        self.clocks.fill(self.floor);
        self.own.fill(self.now);
        self.mixed.clear();
        self.published.clear();
    }

    /// `bar.warp.sync`: earlier accesses of the warp are ordered before later ones.
    pub fn warp_sync(&mut self, warp: usize) {
        self.now += 1;
        self.own[warp] = self.now;
    }

    /// What a warp knows as it arrives at a barrier; its later accesses are not covered.
    pub fn arrive(&mut self, warp: usize, barrier: &mut Vec<u32>) {
        barrier.resize(self.warps, 0);
        let known = &self.clocks[warp * self.warps..][..self.warps];
        for (b, k) in barrier.iter_mut().zip(known) {
            *b = (*b).max(*k);
        }
        barrier[warp] = barrier[warp].max(self.own[warp]);
        self.now += 1;
        self.own[warp] = self.now;
    }

    /// Threads of a warp leave a barrier knowing all who arrived. Warps that leave together get
    /// one common stamp, which keeps their reads of one cell in its short form.
    pub fn leave(&mut self, warps: &[usize], barrier: &[u32]) {
        self.now += 1;
        for w in warps {
            for (k, b) in self.clocks[w * self.warps..][..self.warps]
                .iter_mut()
                .zip(barrier)
            {
                *k = (*k).max(*b);
            }
            self.own[*w] = self.now;
        }
    }

    fn ordered(&self, stamp: u32, warp: usize, by: usize) -> bool {
        if warp == by {
            stamp < self.own[by]
        } else {
            self.clocks[by * self.warps + warp] >= stamp
        }
    }

    /// Records an access; gives the access it races with, if any.
    pub fn access(
        &mut self,
        offset: usize,
        size: usize,
        warp: usize,
        lane: u32,
        pc: u32,
        touch: Touch,
    ) -> Option<Conflict> {
        let mut found = None;
        for at in offset / 2..(offset + size).div_ceil(2) {
            if touch == Touch::Read && self.read(at, warp, lane, pc) {
                continue;
            }
            found = found.or(self.cell(at, warp, lane, pc, touch));
        }
        found
    }

    /// Records a plain load that is ordered after the last write, of a cell that was not read
    /// since, or at this load's stamp. False, with nothing done, for all others.
    #[inline(always)]
    fn read(&mut self, at: usize, warp: usize, lane: u32, pc: u32) -> bool {
        let (floor, stamp, bit) = (self.floor, self.own[warp], 1 << warp);
        let cell = &mut self.cells[at];
        let writer = cell.write_warp as usize;
        let ordered = cell.write_stamp <= floor
            || !cell.in_flight
                && if writer == warp {
                    cell.write_stamp < stamp || cell.write_lane as u32 == lane
                } else {
                    self.clocks[warp * self.warps + writer] >= cell.write_stamp
                };
        let first = cell.readers == 0 || cell.read_stamp <= floor;
        if !ordered || !first && (cell.read_stamp != stamp || cell.mixed) {
            return false;
        }
        let fresh = first || cell.readers & bit == 0;
        let again = cell.read_warp as usize == warp && cell.read_lane as u32 == lane;
        cell.readers = if first { bit } else { cell.readers | bit };
        cell.read_warp = warp as u8;
        cell.read_lane = if fresh || again { lane as u8 } else { MANY };
        cell.read_stamp = stamp;
        cell.read_pc = pc;
        cell.mixed = false;
        true
    }

    fn cell(
        &mut self,
        at: usize,
        warp: usize,
        lane: u32,
        pc: u32,
        touch: Touch,
    ) -> Option<Conflict> {
        let cell = self.cells[at];
        let stamp = self.own[warp];
        let strong = !matches!(touch, Touch::Read | Touch::Write);
        let writes = matches!(touch, Touch::Write | Touch::StrongWrite | Touch::Atomic);
        let mut conflict = None;
        if cell.write_stamp > self.floor {
            let same = cell.write_warp as usize == warp && cell.write_lane as u32 == lane;
            let ordered = same || self.ordered(cell.write_stamp, cell.write_warp as usize, warp);
            if cell.in_flight || !(ordered || strong && cell.strong) {
                conflict = Some(Conflict {
                    wrote: true,
                    in_flight: cell.in_flight,
                    warp: cell.write_warp as u32,
                    lane: Some(cell.write_lane as u32),
                    pc: cell.write_pc,
                });
            }
            if strong && cell.strong && touch != Touch::StrongWrite {
                self.acquire(at as u32, warp);
            }
        }
        let live_reads = cell.readers != 0 && cell.read_stamp > self.floor;
        if writes {
            if conflict.is_none() && live_reads {
                conflict = self.unordered_reader(at as u32, &cell, warp, lane);
            }
            if cell.mixed {
                self.mixed.remove(&(at as u32));
            }
            let next = &mut self.cells[at];
            *next = Cell {
                write_stamp: stamp,
                write_pc: pc,
                write_warp: warp as u8,
                write_lane: lane as u8,
                strong,
                ..Cell::default()
            };
            if strong {
                self.release(at as u32, warp);
            }
        } else if touch == Touch::Read {
            let bit = 1 << warp;
            // Whether this warp has not read since its clock advanced.
            let fresh;
            if !live_reads || cell.read_stamp == stamp {
                let next = &mut self.cells[at];
                let first = !live_reads;
                fresh = first || cell.readers & bit == 0;
                next.readers = if first { bit } else { cell.readers | bit };
                if first && cell.mixed {
                    next.mixed = false;
                }
                if !first
                    && cell.mixed
                    && let Some(stamps) = self.mixed.get_mut(&(at as u32))
                {
                    stamps[warp] = stamp;
                }
            } else {
                let stamps = self.mixed.entry(at as u32).or_default();
                if !cell.mixed {
                    // What an earlier mixture left counts no more.
                    stamps.clear();
                    stamps.extend((0..self.warps).map(|w| {
                        if cell.readers >> w & 1 == 1 {
                            cell.read_stamp
                        } else {
                            0
                        }
                    }));
                }
                fresh = stamps[warp] != stamp;
                stamps[warp] = stamp;
                let next = &mut self.cells[at];
                next.mixed = true;
                next.readers |= bit;
            }
            let again = cell.read_warp as usize == warp && cell.read_lane as u32 == lane;
            let next = &mut self.cells[at];
            next.read_warp = warp as u8;
            next.read_lane = if fresh || again { lane as u8 } else { MANY };
            next.read_stamp = stamp;
            next.read_pc = pc;
        }
        conflict
    }

    fn unordered_reader(&self, at: u32, cell: &Cell, warp: usize, lane: u32) -> Option<Conflict> {
        let stamps = if cell.mixed {
            self.mixed.get(&at)
        } else {
            None
        };
        for reader in 0..self.warps {
            if cell.readers >> reader & 1 == 0 {
                continue;
            }
            let stamp = stamps.map_or(cell.read_stamp, |s| s[reader]);
            let last = reader == cell.read_warp as usize;
            let same = last && reader == warp && cell.read_lane as u32 == lane;
            if stamp > self.floor && !same && !self.ordered(stamp, reader, warp) {
                let lane = (last && cell.read_lane != MANY).then_some(cell.read_lane as u32);
                let pc = cell.read_pc;
                return Some(Conflict {
                    wrote: false,
                    in_flight: false,
                    warp: reader as u32,
                    lane,
                    pc,
                });
            }
        }
        None
    }

    /// A volatile or atomic write publishes what its warp knows; see the crate's documentation
    /// for the races that this hides.
    fn release(&mut self, at: u32, warp: usize) {
        let mut known = self.clocks[warp * self.warps..][..self.warps].to_vec();
        known[warp] = self.own[warp];
        if let Some(old) = self.published.get(&at) {
            for (k, o) in known.iter_mut().zip(old) {
                *k = (*k).max(*o);
            }
        }
        self.published.insert(at, known);
        self.now += 1;
        self.own[warp] = self.now;
    }

    fn acquire(&mut self, at: u32, warp: usize) {
        if let Some(known) = self.published.get(&at) {
            for (k, p) in self.clocks[warp * self.warps..][..self.warps]
                .iter_mut()
                .zip(known)
            {
                *k = (*k).max(*p);
            }
        }
    }

    /// Marks the target of an asynchronous copy, or (at the wait) its arrival.
    pub fn copy(&mut self, offset: usize, size: usize, warp: usize, lane: u32, in_flight: bool) {
        let stamp = self.own[warp];
        for cell in &mut self.cells[offset / 2..(offset + size).div_ceil(2)] {
            cell.in_flight = in_flight;
            if !in_flight && cell.write_warp as usize == warp && cell.write_lane as u32 == lane {
                cell.write_stamp = stamp;
            }
        }
    }
}

/// Which blocks touched a piece of device memory during one launch.
pub struct GlobalShadow {
    /// Low half: 1 + the block that wrote last. High half: 1 + a block that read, `u32::MAX` for
    /// several. Cells of earlier launches are told by `launches`.
    cells: Box<[AtomicU64]>,
    launch: AtomicU64,
    reset: Mutex<()>,
}

const SEVERAL: u32 = u32::MAX;

impl GlobalShadow {
    pub(super) fn new(len: usize) -> GlobalShadow {
        let mut cells = Vec::with_capacity(len.div_ceil(4));
        cells.resize_with(len.div_ceil(4), || AtomicU64::new(0));
        GlobalShadow {
            cells: cells.into_boxed_slice(),
            launch: AtomicU64::new(0),
            reset: Mutex::new(()),
        }
    }

    /// Forgets earlier launches, once for each.
    pub fn start(&self, launch: u64) {
        if self.launch.load(Ordering::Acquire) == launch {
            return;
        }
        let _turn = match self.reset.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        };
        if self.launch.load(Ordering::Acquire) != launch {
            self.cells
                .iter()
                .for_each(|c| c.store(0, Ordering::Relaxed));
            self.launch.store(launch, Ordering::Release);
        }
    }

    /// Records a plain access by a block to cells that no other block wrote or, if it writes, read.
    /// False if it comes to others: then [`GlobalShadow::access`] must look at the access.
    #[inline(always)]
    pub fn alone(&self, offset: usize, size: usize, block: u32, writes: bool) -> bool {
        let me = block + 1;
        for cell in &self.cells[offset / 4..(offset + size).div_ceil(4)] {
            let old = cell.load(Ordering::Relaxed);
            let (writer, reader) = (old as u32, (old >> 32) as u32);
            let new = match reader {
                _ if writer != 0 && writer != me => return false,
                r if writes && (r == 0 || r == me) => me as u64,
                r if !writes && (r == 0 || r == me) => writer as u64 | (me as u64) << 32,
                SEVERAL if !writes => old,
                _ => return false,
            };
            if new != old {
                cell.store(new, Ordering::Relaxed);
            }
        }
        true
    }

    /// Records a plain access by a block. `knows` tells whether another block's accesses are
    /// ordered before. Several readers are asked for as
    /// `u32::MAX - 1`. Gives the other block of a race and whether it wrote.
    pub fn access(
        &self,
        offset: usize,
        size: usize,
        block: u32,
        writes: bool,
        knows: impl Fn(u32) -> bool,
    ) -> Option<(u32, bool)> {
        let mut found = None;
        for cell in &self.cells[offset / 4..(offset + size).div_ceil(4)] {
            // Blocks on other host threads record here too: what is decided holds for the record
            // that it replaces, or is decided again.
            let mut old = cell.load(Ordering::Relaxed);
            found = loop {
                let (new, race) = record(old, block, writes, &knows);
                if new == old {
                    break race.or(found);
                }
                match cell.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => break race.or(found),
                    Err(now) => old = now,
                }
            };
        }
        found
    }
}

/// A cell after an access, and the access that this one races with.
fn record(
    old: u64,
    block: u32,
    writes: bool,
    knows: impl Fn(u32) -> bool,
) -> (u64, Option<(u32, bool)>) {
    let (writer, reader) = (old as u32, (old >> 32) as u32);
    let mut race = None;
    if writer != 0 && writer != block + 1 && !knows(writer - 1) {
        race = Some((writer - 1, true));
    }
    if writes {
        if reader != 0 && reader != block + 1 && !knows(reader - 1) {
            race = Some((reader - 1, false));
        }
        return ((block + 1) as u64, race);
    }
    let reader = match reader {
        0 => block + 1,
        r if r == block + 1 => r,
        // An ordered earlier reader gives way to this one.
        r if r != SEVERAL && knows(r - 1) => block + 1,
        _ => SEVERAL,
    };
    (writer as u64 | (reader as u64) << 32, race)
}
