//! Device memory: allocations far apart, each with its own record of what was written.

use super::race::GlobalShadow;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// First device address: above every host pointer, so that the two are never confused.
pub const DEVICE_BASE: u64 = 1 << 47;
/// Allocations start this many address bits apart; the rest of each slice is guard.
const SLICE_BITS: u32 = 36;
/// Largest allocation.
pub const MAX_ALLOCATION: u64 = (1 << SLICE_BITS) - (1 << 20);

/// Why an address was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// No allocation is there.
    Nowhere,
    /// Beyond the end of the allocation of this size, by this many bytes from its start.
    Beyond {
        /// Size of the allocation.
        size: u64,
        /// Offset of the access.
        offset: u64,
    },
    /// The allocation of this size was freed.
    Freed {
        /// Its size.
        size: u64,
    },
}

/// A piece of memory that kernels can reach.
pub struct Allocation {
    pointer: *mut u8,
    len: usize,
    owned: bool,
    /// A bit a byte: has it been written? Absent where that is not tracked.
    valid: Option<Box<[AtomicU8]>>,
    all_valid: AtomicBool,
    shadow: OnceLock<GlobalShadow>,
}

// SAFETY: the bytes behind `pointer` are only accessed through atomics of the access's size or,
// by the host interface, while no kernel runs; everything else is Sync by itself.
unsafe impl Sync for Allocation {}
// SAFETY: as above; ownership of the bytes moves with the value.
unsafe impl Send for Allocation {}

const ALIGN: usize = 256;

impl Allocation {
    fn new(len: usize, tracked: bool) -> Option<Allocation> {
        let layout = Layout::from_size_align(len.max(1), ALIGN).ok()?;
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            return None;
        }
        let valid = tracked.then(|| {
            let mut bits = Vec::with_capacity(len.div_ceil(8));
            bits.resize_with(len.div_ceil(8), || AtomicU8::new(0));
            bits.into_boxed_slice()
        });
        let all_valid = AtomicBool::new(!tracked);
        Some(Allocation {
            pointer,
            len,
            owned: true,
            valid,
            all_valid,
            shadow: OnceLock::new(),
        })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of its first byte in host memory.
    pub fn pointer(&self) -> *mut u8 {
        self.pointer
    }

    /// Whether `size` bytes (a power of two up to 8, aligned) were all written.
    #[inline]
    pub fn is_valid(&self, offset: usize, size: usize) -> bool {
        if self.all_valid.load(Ordering::Relaxed) {
            return true;
        }
        let Some(valid) = &self.valid else {
            return true;
        };
        let wanted = (((1u32 << size) - 1) << (offset & 7)) as u8;
        valid[offset >> 3].load(Ordering::Relaxed) & wanted == wanted
    }

    /// Whether a range was all written; false if it is not cheaply known.
    pub fn is_valid_range(&self, offset: usize, len: usize) -> bool {
        if self.all_valid.load(Ordering::Relaxed) {
            return true;
        }
        let Some(valid) = &self.valid else {
            return true;
        };
        let bytes = &valid[offset >> 3..(offset + len).div_ceil(8)];
        bytes.iter().all(|b| b.load(Ordering::Relaxed) == 0xff)
    }

    /// Notes that `size` bytes (as for [`Allocation::is_valid`]) were written.
    #[inline]
    pub fn set_valid(&self, offset: usize, size: usize) {
        if self.all_valid.load(Ordering::Relaxed) {
            return;
        }
        let Some(valid) = &self.valid else { return };
        let bits = (((1u32 << size) - 1) << (offset & 7)) as u8;
        let byte = &valid[offset >> 3];
        if byte.load(Ordering::Relaxed) & bits != bits {
            byte.fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// Notes that a range was written by the host.
    pub fn set_valid_range(&self, offset: usize, len: usize) {
        if len == self.len {
            self.all_valid.store(true, Ordering::Relaxed);
        }
        if self.all_valid.load(Ordering::Relaxed) {
            return;
        }
        let Some(valid) = &self.valid else { return };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            if at & 7 == 0 && end - at >= 8 {
                valid[at >> 3].store(0xff, Ordering::Relaxed);
                at += 8;
            } else {
                valid[at >> 3].fetch_or(1 << (at & 7), Ordering::Relaxed);
                at += 1;
            }
        }
    }

    /// Copies the record of `len` written bytes from another allocation.
    pub fn copy_valid(&self, offset: usize, from: &Allocation, from_offset: usize, len: usize) {
        if from.all_valid.load(Ordering::Relaxed) {
            self.set_valid_range(offset, len);
            return;
        }
        let Some(valid) = &self.valid else { return };
        for i in 0..len {
            let bit = 1u8 << ((offset + i) & 7);
            if from.is_valid(from_offset + i, 1) {
                valid[(offset + i) >> 3].fetch_or(bit, Ordering::Relaxed);
            } else if !self.all_valid.load(Ordering::Relaxed) {
                valid[(offset + i) >> 3].fetch_and(!bit, Ordering::Relaxed);
            } else {
                for byte in valid.iter() {
                    byte.store(0xff, Ordering::Relaxed);
                }
                self.all_valid.store(false, Ordering::Relaxed);
                valid[(offset + i) >> 3].fetch_and(!bit, Ordering::Relaxed);
            }
        }
    }

    /// The record of accesses by block, made when first wanted.
    pub fn shadow(&self) -> &GlobalShadow {
        self.shadow.get_or_init(|| GlobalShadow::new(self.len))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.owned
            && let Ok(layout) = Layout::from_size_align(self.len.max(1), ALIGN)
        {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.pointer, layout) };
        }
    }
}

enum Slice {
    Live(Allocation),
    Freed(u64),
}

/// All memory of a device.
#[derive(Default)]
pub struct Memory {
    slices: Vec<Slice>,
    host: BTreeMap<u64, Allocation>,
    used: u64,
}

impl Memory {
    /// Allocates; `None` if the host has no memory or `limit` would be passed. `tracked` memory
    /// counts as uninitialised until written.
    pub fn allocate(&mut self, len: u64, limit: u64, tracked: bool) -> Option<u64> {
        if len > MAX_ALLOCATION || self.used + len > limit {
            return None;
        }
        let allocation = Allocation::new(len as usize, tracked)?;
        self.slices.push(Slice::Live(allocation));
        self.used += len;
        Some(DEVICE_BASE + ((self.slices.len() as u64 - 1) << SLICE_BITS))
    }

    /// Frees; the address must be the start of a live allocation. Addresses are not used again.
    pub fn free(&mut self, address: u64) -> bool {
        let Some(offset) = address.checked_sub(DEVICE_BASE) else {
            return false;
        };
        if offset & ((1 << SLICE_BITS) - 1) != 0 {
            return false;
        }
        match self.slices.get_mut((offset >> SLICE_BITS) as usize) {
            Some(slice @ Slice::Live(_)) => {
                let Slice::Live(allocation) = slice else {
                    return false;
                };
                let size = allocation.len as u64;
                self.used -= size;
                *slice = Slice::Freed(size);
                true
            }
            _ => false,
        }
    }

    /// Lets kernels reach host memory under its own address.
    ///
    /// # Safety
    /// `pointer` must be valid for `len` bytes until [`Memory::unregister_host`] is called.
    pub unsafe fn register_host(&mut self, pointer: *mut u8, len: usize) {
        let allocation = Allocation {
            pointer,
            len,
            owned: false,
            valid: None,
            all_valid: AtomicBool::new(true),
            shadow: OnceLock::new(),
        };
        self.host.insert(pointer as u64, allocation);
    }

    /// Ends [`Memory::register_host`]; gives the size if it was registered.
    pub fn unregister_host(&mut self, pointer: *mut u8) -> Option<usize> {
        self.host.remove(&(pointer as u64)).map(|a| a.len)
    }

    /// Bytes allocated.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Live allocations: address and size.
    pub fn live(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.slices.iter().enumerate().filter_map(|(i, s)| match s {
            Slice::Live(a) => Some((DEVICE_BASE + ((i as u64) << SLICE_BITS), a.len as u64)),
            Slice::Freed(_) => None,
        })
    }

    /// Finds the allocation that holds `size` bytes at an address, and the offset in it.
    #[inline]
    pub fn resolve(&self, address: u64, size: u64) -> Result<(&Allocation, usize), AccessError> {
        let Some(relative) = address.checked_sub(DEVICE_BASE) else {
            return self.resolve_host(address, size);
        };
        let offset = relative & ((1 << SLICE_BITS) - 1);
        match self.slices.get((relative >> SLICE_BITS) as usize) {
            Some(Slice::Live(a)) if offset + size <= a.len as u64 => Ok((a, offset as usize)),
            Some(Slice::Live(a)) => Err(AccessError::Beyond {
                size: a.len as u64,
                offset,
            }),
            Some(Slice::Freed(size)) => Err(AccessError::Freed { size: *size }),
            None => Err(AccessError::Nowhere),
        }
    }

    fn resolve_host(&self, address: u64, size: u64) -> Result<(&Allocation, usize), AccessError> {
        let (start, a) = self
            .host
            .range(..=address)
            .next_back()
            .ok_or(AccessError::Nowhere)?;
        let offset = address - start;
        if offset.saturating_add(size) <= a.len as u64 {
            Ok((a, offset as usize))
        } else {
            Err(AccessError::Nowhere)
        }
    }

    /// Base address and size of the live allocation that holds an address.
    pub fn range_of(&self, address: u64) -> Option<(u64, u64)> {
        let (a, offset) = self.resolve(address, 0).ok()?;
        Some((address - offset as u64, a.len as u64))
    }

    /// Copies bytes in; marks them written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let (a, offset) = self.resolve(address, bytes.len() as u64)?;
        // SAFETY: resolve checked the range; no kernel runs during host copies.
        unsafe { a.pointer.add(offset).copy_from(bytes.as_ptr(), bytes.len()) };
        a.set_valid_range(offset, bytes.len());
        Ok(())
    }

    /// Copies bytes out.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), AccessError> {
        let (a, offset) = self.resolve(address, bytes.len() as u64)?;
        // SAFETY: as in `write`.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from(a.pointer.add(offset), bytes.len())
        };
        Ok(())
    }

    /// Copies within device memory, with the record of what was written.
    pub fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), AccessError> {
        let (s, s_at) = self.resolve(from, len as u64)?;
        let (d, d_at) = self.resolve(to, len as u64)?;
        // SAFETY: both ranges were checked; `copy` allows overlap.
        unsafe { d.pointer.add(d_at).copy_from(s.pointer.add(s_at), len) };
        d.copy_valid(d_at, s, s_at, len);
        Ok(())
    }

    /// Fills `count` elements with a pattern.
    pub fn fill(&self, address: u64, pattern: &[u8], count: usize) -> Result<(), AccessError> {
        let len = pattern.len().saturating_mul(count);
        let (a, offset) = self.resolve(address, len as u64)?;
        // SAFETY: resolve checked the range; no kernel runs during host fills.
        let bytes = unsafe { std::slice::from_raw_parts_mut(a.pointer.add(offset), len) };
        match pattern {
            [byte] => bytes.fill(*byte),
            _ => bytes
                .chunks_exact_mut(pattern.len())
                .for_each(|c| c.copy_from_slice(pattern)),
        }
        a.set_valid_range(offset, len);
        Ok(())
    }
}
