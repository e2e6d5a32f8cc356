//! The CUDA back end: bf16 activations, f32 arithmetic, kernels of this crate alone.
//!
//! [`Cuda`] is the device behind the operations' traits. [`Kernels`] has the same operations on
//! plain device pointers, for buffers and streams of other libraries.
//!
//! It has run on `cuda-emulator` only, which executes the very PTX that a GPU's driver would get;
//! on hardware it is untried.

mod activation;
mod adamw;
mod attention;
#[cfg(feature = "cust")]
pub mod cust;
mod embedding;
mod gemm;
mod grpo;
mod launch;
mod logprob;
mod norm;
mod ranking;
mod rope;
mod sampling;
mod stream;

pub use attention::{PagedFaults, PagedPointers};
pub use cudarc;
pub use launch::{Fault, Kernels};
// For the tests and tools of this repository; no part of the interface.
#[doc(hidden)]
pub use launch::{Entry, MODULES, Module};
pub use stream::Graph;

use crate::error::check_len;
use crate::{Buffer, Device, Element, Error, Result, Weight};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError, result, sys};
use half::bf16;
use launch::device_error;
use std::marker::PhantomData;
use std::sync::Arc;
use stream::{Block, Lives, Recording, Stream, Turn};

/// A run of `T` in the memory of a [`Cuda`] device, aligned to 16 bytes. Works only with the
/// device that made it and with clones of that.
pub struct CudaBuffer<T: Element> {
    block: Block,
    len: usize,
    stream: Arc<Stream>,
    holds: PhantomData<T>,
}

impl<T: Element> CudaBuffer<T> {
    /// The device address, for launches of one's own.
    pub fn address(&self) -> CUdeviceptr {
        self.block.address
    }

    fn at(&self, element: usize) -> CUdeviceptr {
        self.address() + (element * size_of::<T>()) as CUdeviceptr
    }
}

impl<T: Element> Drop for CudaBuffer<T> {
    fn drop(&mut self) {
        self.stream.free(self.block);
    }
}

impl<T: Element> Buffer<T> for CudaBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T: Element> std::fmt::Debug for CudaBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Block { address, bytes } = self.block;
        let len = self.len;
        write!(f, "CudaBuffer({address:#x}, {len} elements, {bytes} bytes)")
    }
}

/// A CUDA device. Cheap to clone; clones share one stream, on which all work runs in the order of
/// the calls.
///
/// Errors of kernels appear at a later call, at the latest when memory is read. An index that
/// points outside of what it indexes (a token, a page) cannot be checked when an operation is
/// called: the kernel leaves the memory behind it alone, and the next [`Device::read`] returns
/// [`Error::OutOfRange`]. Threads that share a device share this too: the error may be of an
/// operation that another thread called.
///
/// While one thread records (see [`Device::record`]), the calls of others wait.
///
/// # Limits
/// What the kernels ask for beyond the traits. All else is refused with [`Error::Invalid`].
///
/// | operations | limits |
/// |---|---|
/// | all that read weights | weights are bf16 |
/// | `swiglu`, norms, `embed`, `gather_rows` and their backward passes | `width` a multiple of 8 |
/// | `linear` and its backward passes | `inputs` and `outputs` multiples of 8 |
/// | `logprob`, `logits` | `hidden` a multiple of 8 |
/// | `qk_norm` | heads of a multiple of 8 elements, at most 256 |
/// | `rope` | heads of a multiple of 16 elements, at most 512 |
/// | `attention`, `attention_paged`, `cache_write` | heads of 64 or 128 elements; at most 65535 segments or sequences |
/// | `sample` | at most 2^20 tokens in the vocabulary |
/// | `plackett_luce_loss`, `pairwise_logistic_loss` | at most 4096 items in a list |
/// | all | rows and widths below 2^31 |
///
/// A NaN or an infinity among attention's values may also reach earlier rows of its own sequence,
/// never another's; on the CPU it reaches later rows alone.
#[derive(Clone)]
pub struct Cuda {
    stream: Arc<Stream>,
}

impl Cuda {
    /// The device `ordinal`, from 0 on, in its primary context, on a stream of its own. Memory that
    /// is freed stays with the process, for later buffers.
    ///
    /// # Errors
    /// No driver, no such device, or a device older than compute capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
        const OP: &str = "Cuda::new";
        let error = |e| device_error(OP, e);
        if !driver_present() {
            return Err(Error::Device {
                op: OP,
                message: "there is no libcuda.so: install NVIDIA's driver, or use the CPU".into(),
                code: None,
            });
        }
        let context = CudaContext::new(ordinal).map_err(error)?;
        keep_freed_memory(&context).map_err(error)?;
        // Not the default stream, which cannot be captured.
        let stream = context.new_stream().map_err(error)?;
        // SAFETY: nobody else knows the stream.
        unsafe { Self::on_stream(stream) }
    }

    /// A device that works on a stream of cudarc's, in the stream's context.
    ///
    /// # Errors
    /// A device older than compute capability 8.0; what the driver reports.
    ///
    /// # Safety
    /// As long as the value, its clones, buffers and graphs live, nobody else captures the stream,
    /// and nobody else puts work on it while [`Device::record`] runs.
    pub unsafe fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        const OP: &str = "Cuda::on_stream";
        let error = |e| device_error(OP, e);
        let context = stream.context();
        context.bind_to_thread().map_err(error)?;
        let (major, minor) = context.compute_capability().map_err(error)?;
        if major < 8 {
            return Err(Error::Device {
                op: OP,
                message: format!("compute capability {major}.{minor}; the kernels need 8.0"),
                code: None,
            });
        }
        // SAFETY: `Stream` drops the kernels before cudarc's stream, which keeps the context.
        let kernels = unsafe { Kernels::in_current_context() }?;
        // SAFETY: by the caller.
        let stream = Arc::new(unsafe { Stream::new(stream, kernels) }?);
        Ok(Self { stream })
    }

    /// The stream that all work runs on, for launches of one's own. What is launched there while
    /// [`Device::record`] runs becomes part of the recording, whichever thread launches it.
    pub fn stream(&self) -> CUstream {
        self.stream.cuda().cu_stream()
    }

    /// The operations on plain device pointers, in this device's context.
    pub fn kernels(&self) -> &Kernels {
        self.stream.kernels()
    }

    /// A buffer with the memory and the content of a slice of cudarc's. Work that the slice's
    /// stream has got before comes before what is done with the buffer.
    ///
    /// # Errors
    /// A slice of another context, or one that is not aligned to 16 bytes.
    pub fn adopt<T: Element>(&self, slice: CudaSlice<T>) -> Result<CudaBuffer<T>> {
        let len = slice.len();
        let block = self.turn("adopt", &[])?.adopt(slice)?;
        Ok(self.buffer(block, len))
    }

    /// The turn of an operation that uses these buffers, which must be this device's.
    fn turn(&self, op: &'static str, buffers: &[&dyn Lives]) -> Result<Turn<'_>> {
        if !buffers.iter().all(|buffer| buffer.on(&self.stream)) {
            return Err(Error::invalid(
                op,
                "a buffer was made by another device; buffers work with the device that made them \
                 and its clones",
            ));
        }
        self.stream.turn(op)
    }

    fn buffer<T: Element>(&self, block: Block, len: usize) -> CudaBuffer<T> {
        CudaBuffer {
            block,
            len,
            stream: self.stream.clone(),
            holds: PhantomData,
        }
    }
}

/// Whether the driver's library can be loaded. cudarc panics where it cannot.
fn driver_present() -> bool {
    ["libcuda.so", "libcuda.so.1", "nvcuda.dll"]
        .into_iter()
        // SAFETY: the driver's initialisers are sound; cudarc loads the same library.
        .any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

/// By default the driver gives freed memory back to the system whenever a stream is waited for,
/// which every read does.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's; the attribute is a `u64`.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    }
}

/// The weight's buffer: kernels read bf16 alone.
fn bf16_weight<'a>(op: &'static str, weight: Weight<'a, Cuda>) -> Result<&'a CudaBuffer<bf16>> {
    match weight {
        Weight::Bf16(buffer) => Ok(buffer),
        Weight::F32(_) => Err(Error::invalid(
            op,
            "the CUDA back end reads weights in bf16; round them when they are uploaded",
        )),
    }
}

impl Device for Cuda {
    type Elem = bf16;
    type Buf<T: Element> = CudaBuffer<T>;
    type Graph = Graph;

    fn name(&self) -> String {
        let context = self.stream.cuda().context();
        let name = context.name().unwrap_or_else(|_| "CUDA device".into());
        format!("{name} (cuda:{})", context.ordinal())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        let bytes = len.saturating_mul(size_of::<T>());
        let block = self.turn("zeros", &[])?.zeros(bytes)?;
        Ok(self.buffer(block, len))
    }

    fn write<T: Element>(&self, dst: &mut CudaBuffer<T>, offset: usize, host: &[T]) -> Result<()> {
        const OP: &str = "write";
        check_len(OP, "dst", dst.len, offset.saturating_add(host.len()))?;
        let turn = self.turn(OP, &[dst])?;
        // SAFETY: inside of `dst`, which is this stream's.
        unsafe { turn.write(dst.at(offset), bytemuck::cast_slice(host)) }
    }

    fn read<T: Element>(&self, src: &CudaBuffer<T>, offset: usize, host: &mut [T]) -> Result<()> {
        const OP: &str = "read";
        check_len(OP, "src", src.len, offset.saturating_add(host.len()))?;
        let turn = self.turn(OP, &[src])?;
        // SAFETY: inside of `src`, which is this stream's.
        unsafe { turn.read(src.at(offset), bytemuck::cast_slice_mut(host)) }
    }

    fn copy<T: Element>(
        &self,
        src: &CudaBuffer<T>,
        src_offset: usize,
        dst: &mut CudaBuffer<T>,
        dst_offset: usize,
        len: usize,
    ) -> Result<()> {
        const OP: &str = "copy";
        check_len(OP, "src", src.len, src_offset.saturating_add(len))?;
        check_len(OP, "dst", dst.len, dst_offset.saturating_add(len))?;
        let turn = self.turn(OP, &[src, dst])?;
        let (src, dst) = (src.at(src_offset), dst.at(dst_offset));
        // SAFETY: inside of two buffers, both of this stream.
        unsafe { turn.copy(src, dst, len * size_of::<T>()) }
    }

    fn copy_within<T: Element>(
        &self,
        buffer: &mut CudaBuffer<T>,
        src_offset: usize,
        dst_offset: usize,
        len: usize,
    ) -> Result<()> {
        const OP: &str = "copy_within";
        let end = src_offset.max(dst_offset).saturating_add(len);
        check_len(OP, "buffer", buffer.len, end)?;
        let mut turn = self.turn(OP, &[buffer])?;
        let (src, dst) = (buffer.at(src_offset), buffer.at(dst_offset));
        let bytes = len * size_of::<T>();
        if src.abs_diff(dst) >= bytes as u64 {
            // SAFETY: inside of a buffer of this stream, and apart.
            return unsafe { turn.copy(src, dst, bytes) };
        }
        // The driver leaves open what a copy onto itself does.
        let between = turn.scratch(bytes)?;
        // SAFETY: inside of a buffer of this stream, and of scratch memory of that size.
        unsafe {
            turn.copy(src, between, bytes)?;
            turn.copy(between, dst, bytes)
        }
    }

    fn fill_zero<T: Element>(&self, dst: &mut CudaBuffer<T>) -> Result<()> {
        self.turn("fill_zero", &[dst])?.zero(dst.block)
    }

    fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Graph>, E> {
        let recording = Recording::begin(&self.stream)?;
        body()?;
        Ok(Some(recording.end()?))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: by the caller.
        unsafe { graph.replay(&self.stream) }
    }
}
