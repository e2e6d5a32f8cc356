//! Scratch memory of a task: per thread, kept between calls, aligned to a cache line.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// Buffers that nothing on this thread uses now.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Floats with unspecified contents; goes back to the thread's buffers when dropped.
///
/// A guard rather than a closure, whose body would lose the instructions of a SIMD level.
pub(crate) struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// `len` floats.
    pub(crate) fn new(len: usize) -> Self {
        let mut lines = FREE
            .with(|free| free.borrow_mut().pop())
            .unwrap_or_default();
        if lines.len() < len.div_ceil(16) {
            lines.resize(len.div_ceil(16), Line([0.0; 16]));
        }
        Self { lines, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // Where the thread is ending, its buffers are gone, and this one goes with them.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}
