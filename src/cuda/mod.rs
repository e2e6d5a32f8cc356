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

pub use attention::{PagedFaults, PagedPointers};
pub use launch::{Entry, Fault, Kernels, MODULES, Module};

use crate::error::check_len;
use crate::{Buffer, Device, Element, Error, Result, Weight};
use cudarc::driver::sys::{CUdeviceptr, CUresult, CUstream};
use cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream, DriverError, result, sys};
use half::bf16;
use launch::device_error;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A run of `T` in the memory of a [`Cuda`] device, aligned to 256 bytes.
pub struct CudaBuffer<T: Element> {
    bytes: CudaSlice<u8>,
    address: CUdeviceptr,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Element> CudaBuffer<T> {
    /// The device address, for launches of one's own.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    fn at(&self, element: usize) -> CUdeviceptr {
        self.address + (element * size_of::<T>()) as CUdeviceptr
    }
}

impl<T: Element> Buffer<T> for CudaBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T: Element> std::fmt::Debug for CudaBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CudaBuffer({:#x}, {} elements, {} bytes)",
            self.address,
            self.len,
            self.bytes.len()
        )
    }
}

/// A CUDA device. Cheap to clone; clones share one stream, on which all work runs in the order of
/// the calls.
///
/// Errors of kernels appear at a later call, at the latest when memory is read. An index that
/// points outside of what it indexes (a token, a page) cannot be checked when an operation is
/// called: the kernel leaves the memory behind it alone, and the next [`Device::read`] returns
/// [`Error::OutOfRange`].
#[derive(Clone)]
pub struct Cuda {
    shared: Arc<Shared>,
}

struct Shared {
    // Before the stream, whose context its modules are unloaded from.
    kernels: Kernels,
    scratch: Mutex<Vec<CudaSlice<u8>>>,
    faults: CudaBuffer<u32>,
    /// Operation and argument of each fault code, from code 1 on.
    codes: Mutex<Vec<(&'static str, &'static str)>>,
    stream: Arc<CudaStream>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Modules must outlive their kernels. An error has nobody to go to.
        let _: std::result::Result<(), DriverError> = self.stream.synchronize();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that these mutexes guard is ever left half made.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that `CudaSlice`s of at least this size are asked for, so that none is empty.
const SMALLEST: usize = 16;

fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<(CudaSlice<u8>, CUdeviceptr)> {
    use cudarc::driver::DevicePtr;
    // SAFETY: callers write the memory before anything reads it.
    let slice = unsafe { stream.alloc::<u8>(bytes.max(SMALLEST)) }.map_err(|e| match e.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes },
        _ => device_error("allocate", e),
    })?;
    let address = slice.device_ptr(stream).0;
    Ok((slice, address))
}

impl Cuda {
    /// The device `ordinal`, from 0 on, in its primary context.
    ///
    /// # Errors
    /// No driver, no such device, or a device older than compute capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
        const OP: &str = "Cuda::new";
        let error = |e| device_error(OP, e);
        // SAFETY: opens the driver's library and closes it again.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(Error::Device {
                op: OP,
                message: "there is no libcuda.so: install NVIDIA's driver, or use the CPU".into(),
            });
        }
        let context = CudaContext::new(ordinal).map_err(error)?;
        // SAFETY: all memory is allocated, used and freed on the one stream made below.
        unsafe { context.disable_event_tracking() };
        // Not the default stream, which cannot be captured.
        let stream = context.new_stream().map_err(error)?;
        let (major, minor) = context.compute_capability().map_err(error)?;
        if major < 8 {
            return Err(Error::Device {
                op: OP,
                message: format!("compute capability {major}.{minor}; the kernels need 8.0"),
            });
        }
        // SAFETY: `Shared` drops the kernels before the stream, which keeps the context.
        let kernels = unsafe { Kernels::in_current_context() }?;
        let faults = zeros(&stream, 4)?;
        Ok(Self {
            shared: Arc::new(Shared {
                kernels,
                scratch: Mutex::new(Vec::new()),
                faults,
                codes: Mutex::new(Vec::new()),
                stream,
            }),
        })
    }

    /// The stream that all work runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.shared.stream
    }

    /// The operations on plain device pointers, in this device's context.
    pub fn kernels(&self) -> &Kernels {
        &self.shared.kernels
    }

    /// The kernels and the stream to launch them on, with the context current on this thread.
    fn launcher(&self, op: &'static str) -> Result<(&Kernels, CUstream)> {
        self.bind(op)?;
        Ok((&self.shared.kernels, self.shared.stream.cu_stream()))
    }

    fn bind(&self, op: &'static str) -> Result<()> {
        let context = self.shared.stream.context();
        context.bind_to_thread().map_err(|e| device_error(op, e))
    }

    /// At least `bytes` of memory of any content, until the guard is dropped: later operations get
    /// the same bytes, after this one in the order of the stream.
    ///
    /// An operation must ask once for all that it needs: a second call waits for the first guard.
    fn scratch(&self, bytes: usize) -> Result<Scratch<'_>> {
        let mut slices = lock(&self.shared.scratch);
        if slices.last().is_none_or(|slice| slice.len() < bytes) {
            // Outgrown ones live on, because a captured graph may hold their address; doubling
            // keeps their sum below the newest.
            let newest = bytes.max(slices.last().map_or(1 << 20, |slice| 2 * slice.len()));
            slices.push(allocate(&self.shared.stream, newest)?.0);
        }
        Ok(Scratch {
            slices,
            stream: &self.shared.stream,
        })
    }

    /// Where a kernel notes a bad index of argument `name` of operation `op`.
    fn fault(&self, op: &'static str, name: &'static str) -> Fault {
        let mut codes = lock(&self.shared.codes);
        let known = codes.iter().position(|&code| code == (op, name));
        let index = known.unwrap_or_else(|| {
            codes.push((op, name));
            codes.len() - 1
        });
        Fault {
            words: self.shared.faults.address,
            code: index as u32 + 1,
            unused: 0,
        }
    }

    /// What kernels have noted since this was last asked, as an error. Waits for the device.
    fn check_faults(&self) -> Result<()> {
        const OP: &str = "read";
        let error = |e| device_error(OP, e);
        let stream = self.shared.stream.cu_stream();
        let mut words = [0u32; 4];
        let address = self.shared.faults.address;
        // SAFETY: four words on both sides, and `words` is not touched before the stream is done.
        unsafe { result::memcpy_dtoh_async(&mut words, address, stream) }.map_err(error)?;
        self.shared.stream.synchronize().map_err(error)?;
        let [code, at, value, limit] = words;
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the four words, on their own stream.
        unsafe { result::memset_d8_async(address, 0, 16, stream) }.map_err(error)?;
        let codes = lock(&self.shared.codes);
        let (op, name) = codes.get(code as usize - 1).copied().unwrap_or((OP, "?"));
        Err(Error::OutOfRange {
            op,
            name,
            at: at as usize,
            value: value as usize,
            limit: limit as usize,
        })
    }
}

/// Memory for intermediate results, see [`Cuda::scratch`].
struct Scratch<'a> {
    slices: MutexGuard<'a, Vec<CudaSlice<u8>>>,
    stream: &'a Arc<CudaStream>,
}

impl Scratch<'_> {
    /// Its device address, aligned to 256 bytes.
    fn address(&self) -> CUdeviceptr {
        use cudarc::driver::DevicePtr;
        let newest = self.slices.last();
        newest.map_or(0, |slice| slice.device_ptr(self.stream).0)
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

fn zeros<T: Element>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaBuffer<T>> {
    let size = len.saturating_mul(size_of::<T>());
    let (bytes, address) = allocate(stream, size)?;
    // SAFETY: the memory was allocated on this stream with at least this size.
    unsafe { result::memset_d8_async(address, 0, bytes.len(), stream.cu_stream()) }
        .map_err(|e| device_error("zeros", e))?;
    Ok(CudaBuffer {
        bytes,
        address,
        len,
        holds: PhantomData,
    })
}

/// Operations of a [`Cuda`] device that were recorded by [`Device::record`].
pub struct Graph {
    graph: CudaGraph,
    /// Keeps the kernels and the scratch memory that the graph uses.
    _device: Arc<Shared>,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Device for Cuda {
    type Elem = bf16;
    type Buf<T: Element> = CudaBuffer<T>;
    type Graph = Graph;

    fn name(&self) -> String {
        let context = self.shared.stream.context();
        let name = context.name().unwrap_or_else(|_| "CUDA device".into());
        format!("{name} (cuda:{})", context.ordinal())
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        self.bind("zeros")?;
        zeros(&self.shared.stream, len)
    }

    fn write<T: Element>(&self, dst: &mut CudaBuffer<T>, offset: usize, host: &[T]) -> Result<()> {
        const OP: &str = "write";
        check_len(OP, "dst", dst.len, offset.saturating_add(host.len()))?;
        if host.is_empty() {
            return Ok(());
        }
        let (_, stream) = self.launcher(OP)?;
        let host: &[u8] = bytemuck::cast_slice(host);
        // SAFETY: inside of `dst`, which lives on this stream; the driver copies pageable host
        // memory before it returns.
        unsafe { result::memcpy_htod_async(dst.at(offset), host, stream) }
            .map_err(|e| device_error(OP, e))
    }

    fn read<T: Element>(&self, src: &CudaBuffer<T>, offset: usize, host: &mut [T]) -> Result<()> {
        const OP: &str = "read";
        check_len(OP, "src", src.len, offset.saturating_add(host.len()))?;
        let (_, stream) = self.launcher(OP)?;
        if !host.is_empty() {
            let host: &mut [u8] = bytemuck::cast_slice_mut(host);
            // SAFETY: inside of `src`; `host` is borrowed until `check_faults` has waited.
            unsafe { result::memcpy_dtoh_async(host, src.at(offset), stream) }
                .map_err(|e| device_error(OP, e))?;
        }
        self.check_faults()
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
        self.copy_bytes(
            OP,
            src.at(src_offset),
            dst.at(dst_offset),
            len * size_of::<T>(),
        )
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
        let (src, dst) = (buffer.at(src_offset), buffer.at(dst_offset));
        let bytes = len * size_of::<T>();
        if src.abs_diff(dst) >= bytes as u64 {
            return self.copy_bytes(OP, src, dst, bytes);
        }
        // The driver leaves open what a copy onto itself does.
        self.bind(OP)?;
        let between = self.scratch(bytes)?;
        self.copy_bytes(OP, src, between.address(), bytes)?;
        self.copy_bytes(OP, between.address(), dst, bytes)
    }

    fn fill_zero<T: Element>(&self, dst: &mut CudaBuffer<T>) -> Result<()> {
        const OP: &str = "fill_zero";
        let (_, stream) = self.launcher(OP)?;
        // SAFETY: all of the buffer, which lives on this stream.
        unsafe { result::memset_d8_async(dst.address, 0, dst.bytes.len(), stream) }
            .map_err(|e| device_error(OP, e))
    }

    fn record<E: From<Error>>(
        &self,
        body: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Graph>, E> {
        const OP: &str = "record";
        let error = |e| E::from(device_error(OP, e));
        let stream = &self.shared.stream;
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(error)?;
        let outcome = body();
        // Also after a failure, or the stream would stay closed to other work.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        outcome?;
        let graph = graph.map_err(error)?.ok_or_else(|| {
            E::from(Error::invalid(
                OP,
                "the recording holds an operation that waits for the device",
            ))
        })?;
        Ok(Some(Graph {
            graph,
            _device: self.shared.clone(),
        }))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        graph.graph.launch().map_err(|e| device_error("replay", e))
    }
}

impl Cuda {
    /// Copies inside of device memory; the two runs do not overlap.
    fn copy_bytes(
        &self,
        op: &'static str,
        src: CUdeviceptr,
        dst: CUdeviceptr,
        bytes: usize,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let (_, stream) = self.launcher(op)?;
        // SAFETY: callers have checked that both runs lie inside of buffers of this stream.
        unsafe { result::memcpy_dtod_async(dst, src, bytes, stream) }
            .map_err(|e| device_error(op, e))
    }
}
