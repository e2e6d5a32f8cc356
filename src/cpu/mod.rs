//! The CPU back end: f32 arithmetic with SIMD chosen at run time, on every core.

mod activation;
mod adamw;
mod attention;
mod buffer;
mod embedding;
mod gemm;
mod grpo;
mod logprob;
mod norm;
mod pool;
mod ranking;
mod rope;
mod sampling;
mod scratch;
mod simd;

pub use buffer::CpuBuf;
pub use simd::Level;

use crate::{Device, Element, Error, Result, error::check_len};
use pool::Pool;
use std::convert::Infallible;
use std::sync::Arc;

/// The CPU as a device. Cheap to clone; clones share their threads.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<Pool>,
    level: Level,
}

impl Cpu {
    /// All cores and the widest SIMD of this machine.
    pub fn new() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self::with_threads(threads)
    }

    /// `threads` threads (at least 1) and the widest SIMD of this machine.
    pub fn with_threads(threads: usize) -> Self {
        Self {
            pool: Arc::new(Pool::new(threads)),
            level: Level::detect(),
        }
    }

    /// The same threads with another SIMD level, to compare levels.
    ///
    /// # Errors
    /// A level that this machine does not have.
    pub fn with_level(&self, level: Level) -> Result<Self> {
        if !level.available() {
            return Err(crate::Error::invalid(
                "cpu",
                format!("this processor has no {level}"),
            ));
        }
        Ok(Self {
            pool: self.pool.clone(),
            level,
        })
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The SIMD level in use.
    pub fn level(&self) -> Level {
        self.level
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Cpu {
    type Elem = f32;
    type Buf<T: Element> = CpuBuf<T>;
    /// Nothing is recorded: starting an operation costs nothing here.
    type Graph = Infallible;

    fn name(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), self.level)
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<CpuBuf<T>> {
        CpuBuf::zeros(len)
    }

    fn write<T: Element>(&self, dst: &mut CpuBuf<T>, offset: usize, host: &[T]) -> Result<()> {
        check_len("write", "dst", dst.len(), offset.saturating_add(host.len()))?;
        dst[offset..offset + host.len()].copy_from_slice(host);
        Ok(())
    }

    fn read<T: Element>(&self, src: &CpuBuf<T>, offset: usize, host: &mut [T]) -> Result<()> {
        check_len("read", "src", src.len(), offset.saturating_add(host.len()))?;
        host.copy_from_slice(&src[offset..offset + host.len()]);
        Ok(())
    }

    fn copy<T: Element>(
        &self,
        src: &CpuBuf<T>,
        src_offset: usize,
        dst: &mut CpuBuf<T>,
        dst_offset: usize,
        len: usize,
    ) -> Result<()> {
        check_len("copy", "src", src.len(), src_offset.saturating_add(len))?;
        check_len("copy", "dst", dst.len(), dst_offset.saturating_add(len))?;
        dst[dst_offset..dst_offset + len].copy_from_slice(&src[src_offset..src_offset + len]);
        Ok(())
    }

    fn copy_within<T: Element>(
        &self,
        buffer: &mut CpuBuf<T>,
        src_offset: usize,
        dst_offset: usize,
        len: usize,
    ) -> Result<()> {
        let end = src_offset.max(dst_offset).saturating_add(len);
        check_len("copy_within", "buffer", buffer.len(), end)?;
        (**buffer).copy_within(src_offset..src_offset + len, dst_offset);
        Ok(())
    }

    fn fill_zero<T: Element>(&self, dst: &mut CpuBuf<T>) -> Result<()> {
        dst.fill(T::zeroed());
        Ok(())
    }

    fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Infallible>, E> {
        body()?;
        Ok(None)
    }

    unsafe fn replay(&self, graph: &Infallible) -> Result<()> {
        match *graph {}
    }
}
