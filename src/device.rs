//! Memory of a back end: typed buffers, copies in and out.

use crate::Result;
use half::bf16;

/// A plain value that can lie in a device buffer.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {}
impl<T: bytemuck::Pod + Send + Sync + 'static> Element for T {}

/// An activation's number format.
pub trait Float: Element {
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// Widens without loss.
    fn to_f32(self) -> f32;
}

impl Float for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Float for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// A typed run of device memory.
pub trait Buffer<T: Element>: Send + Sync {
    /// How many elements it holds.
    fn len(&self) -> usize;
    /// Whether it holds none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A back end's memory. All operations of one device run in the order of their calls.
///
/// Operations take buffers that are *at least* as long as their shape asks for, so that one
/// workspace serves batches of many sizes.
pub trait Device: Send + Sync + Sized {
    /// The number format of activations: `f32` on the CPU, `bf16` on a GPU.
    type Elem: Float;
    /// A buffer of `T`.
    type Buf<T: Element>: Buffer<T>;
    /// Operations that were recorded, to be run again with one call.
    type Graph;

    /// The device's name for people.
    fn name(&self) -> String;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn zeros<T: Element>(&self, len: usize) -> Result<Self::Buf<T>>;

    /// Copies `host` into `dst`, from element `offset` on.
    ///
    /// # Errors
    /// [`crate::Error::TooShort`] where it does not fit.
    fn write<T: Element>(&self, dst: &mut Self::Buf<T>, offset: usize, host: &[T]) -> Result<()>;

    /// Copies from element `offset` of `src` on into all of `host`. Waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::TooShort`] where `src` ends before.
    fn read<T: Element>(&self, src: &Self::Buf<T>, offset: usize, host: &mut [T]) -> Result<()>;

    /// Copies `len` elements from `src[src_offset..]` to `dst[dst_offset..]`.
    ///
    /// # Errors
    /// [`crate::Error::TooShort`] where either ends before.
    fn copy<T: Element>(
        &self,
        src: &Self::Buf<T>,
        src_offset: usize,
        dst: &mut Self::Buf<T>,
        dst_offset: usize,
        len: usize,
    ) -> Result<()>;

    /// Copies `len` elements of `buffer` from `src_offset` to `dst_offset`; the two may overlap.
    ///
    /// # Errors
    /// [`crate::Error::TooShort`] where either ends after the buffer.
    fn copy_within<T: Element>(
        &self,
        buffer: &mut Self::Buf<T>,
        src_offset: usize,
        dst_offset: usize,
        len: usize,
    ) -> Result<()>;

    /// Sets every element to zero.
    ///
    /// # Errors
    /// Only what the device reports.
    fn fill_zero<T: Element>(&self, dst: &mut Self::Buf<T>) -> Result<()>;

    /// Records the operations that `body` calls. Devices that start every operation on its own run
    /// them instead and return `None`.
    ///
    /// The same operations must have run once before, with sizes at least as large. Inside of `body`
    /// the device refuses, with [`crate::Error::Invalid`]: what reads or writes host memory (also the
    /// operations that take lists from the host, such as `attention` and `attention_backward`), new
    /// buffers, another `record` and `replay`. Buffers that are dropped there are freed afterwards.
    ///
    /// Calls of other threads wait until the recording has ended, so `body` must not wait for such a
    /// thread. Errors and panics of `body` end the recording, and nothing of it is kept.
    ///
    /// # Errors
    /// Those of `body`, and what the device reports.
    fn record<E: From<crate::Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Self::Graph>, E>;

    /// Runs recorded operations again, on the buffers of then with their content of now.
    ///
    /// # Errors
    /// A graph of another device; what the device reports.
    ///
    /// # Safety
    /// Every buffer that the recorded operations used is alive. Scratch memory and kernels are kept
    /// by the graph itself.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()>;

    /// A new buffer with the elements of `host`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    fn upload<T: Element>(&self, host: &[T]) -> Result<Self::Buf<T>> {
        let mut buffer = self.zeros(host.len())?;
        self.write(&mut buffer, 0, host)?;
        Ok(buffer)
    }

    /// All elements of `src`. Waits for the device.
    ///
    /// # Errors
    /// Only what the device reports.
    fn download<T: Element>(&self, src: &Self::Buf<T>) -> Result<Vec<T>> {
        let mut host = vec![T::zeroed(); src.len()];
        self.read(src, 0, &mut host)?;
        Ok(host)
    }
}

/// A weight matrix as it is stored, `[outputs, inputs]` row-major. Arithmetic is always f32.
pub enum Weight<'a, D: Device> {
    /// Full precision.
    F32(&'a D::Buf<f32>),
    /// Half the bytes; widened as it is read.
    Bf16(&'a D::Buf<bf16>),
}

impl<D: Device> Clone for Weight<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Weight<'_, D> {}

impl<D: Device> Weight<'_, D> {
    /// How many elements it holds.
    pub fn len(&self) -> usize {
        match self {
            Weight::F32(b) => b.len(),
            Weight::Bf16(b) => b.len(),
        }
    }
    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
