//! Memory of the CPU back end: zeroed, aligned to a cache line.

use crate::{Buffer, Element, Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment in bytes: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// A run of `T`, aligned to 64 bytes. Reads and writes as a slice.
pub struct CpuBuf<T: Element> {
    ptr: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

// SAFETY: it owns its memory as a Vec does, and `Element` is Send + Sync.
unsafe impl<T: Element> Send for CpuBuf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Element> Sync for CpuBuf<T> {}

impl<T: Element> CpuBuf<T> {
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let layout = Layout::from_size_align(bytes.max(1), ALIGN.max(align_of::<T>()))
            .map_err(|_| Error::OutOfMemory { bytes })?;
        // SAFETY: the layout's size is not 0.
        let raw = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(raw.cast::<T>()).ok_or(Error::OutOfMemory { bytes })?;
        Ok(Self {
            ptr,
            len,
            owns: PhantomData,
        })
    }
}

impl<T: Element> Drop for CpuBuf<T> {
    fn drop(&mut self) {
        let size = (self.len * size_of::<T>()).max(1);
        if let Ok(layout) = Layout::from_size_align(size, ALIGN.max(align_of::<T>())) {
            // SAFETY: `zeros` allocated with this very layout, and nothing else frees it.
            unsafe { dealloc(self.ptr.as_ptr().cast(), layout) }
        }
    }
}

impl<T: Element> Deref for CpuBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated, and all bytes of a Pod are valid.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Element> DerefMut for CpuBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Element> Buffer<T> for CpuBuf<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T: Element + std::fmt::Debug> std::fmt::Debug for CpuBuf<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.deref().fmt(f)
    }
}
