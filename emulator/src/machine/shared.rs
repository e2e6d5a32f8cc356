//! Shared memory of a block.

use super::lanes::Lanes;

/// Shared memory of a block.
#[derive(Default)]
pub struct Shared {
    bytes: Vec<Lanes>,
    len: usize,
    valid: Vec<u8>,
}

impl Shared {
    /// Makes it `len` bytes that were never written.
    pub fn start(&mut self, len: usize) {
        self.bytes.resize(len.div_ceil(128), Lanes::ZERO);
        self.len = len;
        self.valid.clear();
        self.valid.resize(len.div_ceil(8), 0);
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its first byte. Aligned to 64.
    pub fn pointer(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr() as *mut u8
    }

    /// Whether bytes were written.
    #[inline]
    pub fn is_valid(&self, at: usize, size: usize) -> bool {
        let wanted = ((1u32 << size) - 1) << (at & 7);
        self.valid[at >> 3] as u32 & wanted == wanted
    }

    /// Notes that bytes (up to 8, aligned) were written, or that what was written is unknown.
    #[inline]
    pub fn set_valid(&mut self, at: usize, size: usize, valid: bool) {
        let bits = (((1u32 << size) - 1) << (at & 7)) as u8;
        let byte = &mut self.valid[at >> 3];
        *byte = if valid { *byte | bits } else { *byte & !bits };
    }

    /// Two bytes.
    pub(super) fn half(&self, at: usize) -> u16 {
        // SAFETY: rows were checked to be in range and aligned.
        unsafe { *(self.bytes.as_ptr() as *const u8).add(at).cast::<u16>() }
    }

    /// Writes two bytes.
    pub(super) fn set_half(&mut self, at: usize, v: u16) {
        // SAFETY: as in `half`.
        unsafe { *self.pointer().add(at).cast::<u16>() = v };
    }
}
