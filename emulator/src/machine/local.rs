//! Local memory of the lanes of a warp.

use super::lanes::WARP;

/// Bytes that lie together; no element is larger.
const CELL: usize = 8;

/// Local memory of a warp: an equal number of bytes for each lane. Cells of the same offset lie
/// side by side, so that what the lanes of a warp spill together lies together.
#[derive(Default)]
pub struct Local {
    cells: Vec<u64>,
    /// A bit a byte: has it been written?
    valid: Vec<u8>,
    len: usize,
}

impl Local {
    /// Makes it empty.
    pub fn clear(&mut self) {
        self.cells.clear();
        self.valid.clear();
        self.len = 0;
    }

    /// Makes room for a frame's bytes. Whatever an earlier call left there is not this call's.
    /// Frames start at multiples of 8.
    pub fn frame(&mut self, from: usize, to: usize) {
        self.len = self.len.max(to);
        let cells = self.len.div_ceil(CELL) * WARP;
        self.cells.resize(cells, 0);
        self.valid.resize(cells, 0);
        self.valid[from / CELL * WARP..to.div_ceil(CELL) * WARP].fill(0);
    }

    /// Size in bytes, of a lane.
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn cell(lane: usize, at: usize) -> usize {
        at / CELL * WARP + lane
    }

    /// Where an element starts: within its cell, if it is aligned and not larger than one.
    #[inline(always)]
    pub fn pointer(&mut self, lane: usize, at: usize) -> *mut u8 {
        let cell: *mut u64 = &mut self.cells[Self::cell(lane, at)];
        // SAFETY: below 8, the size of a cell.
        unsafe { cell.cast::<u8>().add(at % CELL) }
    }

    /// Whether the bytes of an element (up to 8, aligned) were all written.
    #[inline]
    pub fn is_valid(&self, lane: usize, at: usize, size: usize) -> bool {
        let wanted = (((1u32 << size) - 1) << (at % CELL)) as u8;
        self.valid[Self::cell(lane, at)] & wanted == wanted
    }

    /// Notes that an element was written, or that what was written is unknown.
    #[inline]
    pub fn set_valid(&mut self, lane: usize, at: usize, size: usize, valid: bool) {
        let bits = (((1u32 << size) - 1) << (at % CELL)) as u8;
        let byte = &mut self.valid[Self::cell(lane, at)];
        *byte = if valid { *byte | bits } else { *byte & !bits };
    }

    /// Copies bytes of a lane, with the record of what was written.
    pub fn copy(&mut self, lane: usize, from: usize, to: usize, size: usize) {
        for i in 0..size {
            let (from, to) = (from + i, to + i);
            let byte = self.cells[Self::cell(lane, from)].to_le_bytes()[from % CELL];
            let cell = &mut self.cells[Self::cell(lane, to)];
            let mut bytes = cell.to_le_bytes();
            bytes[to % CELL] = byte;
            *cell = u64::from_le_bytes(bytes);
            let valid = self.is_valid(lane, from, 1);
            self.set_valid(lane, to, 1, valid);
        }
    }
}
