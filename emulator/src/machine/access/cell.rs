//! Single elements of memory: a few bytes, and the record of what was written.

use crate::machine::code::Extend;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Reads 1, 2, 4 or 8 bytes.
///
/// # Safety
/// `p` is valid for `size` bytes and aligned to them.
#[inline(always)]
pub(super) unsafe fn read(p: *const u8, size: u8) -> u64 {
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
pub(super) unsafe fn write(p: *const u8, size: u8, v: u64) {
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

/// Applies a function to memory as one step; gives the old value.
///
/// # Safety
/// `p` is valid for `size` bytes and aligned to them.
pub(super) unsafe fn update(p: *const u8, size: u8, f: impl Fn(u64) -> u64) -> u64 {
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

/// Reads 1, 2, 4 or 8 bytes of a slice.
#[inline(always)]
pub(super) fn of_slice(bytes: &[u8], at: usize, size: u8) -> u64 {
    let mut word = [0; 8];
    word[..size as usize].copy_from_slice(&bytes[at..at + size as usize]);
    u64::from_le_bytes(word)
}

/// What a register of 64 bits gets of a loaded element.
#[inline(always)]
pub(super) fn extended(v: u64, size: u8, extend: Extend) -> u64 {
    if extend == Extend::Zero || size == 8 {
        return v;
    }
    let shift = 64 - 8 * size as u32;
    ((v << shift) as i64 >> shift) as u64
}
