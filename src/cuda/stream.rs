//! The stream of a device, and whose turn on it is.
//!
//! All clones of a [`super::Cuda`] share one [`Stream`]. Whatever reaches it does so in a [`Turn`],
//! which holds the one lock: no other thread's work comes between the kernels of an operation, or
//! between copying out the fault words and clearing them, or into a recording.

use super::launch::{Fault, Kernels, device_error};
use super::{CudaBuffer, Element};
use crate::{Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUgraph, CUgraphExec, CUresult, CUstream};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

/// Bytes of the smallest allocation, so that none is empty.
const SMALLEST: usize = 16;
/// Scratch memory comes in multiples of this many bytes, as drivers hand out memory.
const SCRATCH_STEP: usize = 2 << 20;
/// Words that kernels note a bad index in.
const FAULT_WORDS: usize = 4;

/// A run of device memory, aligned to 256 bytes if it was made here.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub address: CUdeviceptr,
    pub bytes: usize,
}

/// What the clones of a device share.
pub(super) struct Stream {
    // Before the stream, whose context its modules are unloaded from.
    kernels: Kernels,
    cuda: Arc<CudaStream>,
    faults: Block,
    state: Mutex<State>,
    /// Told when a recording ends.
    recorded: Condvar,
}

struct State {
    /// The thread that records, while one does.
    recording: Option<ThreadId>,
    /// Let go during a recording, which must not hold their release: freed when it ends.
    dropped: Vec<Block>,
    /// The newest last. Outgrown ones stay as long as there are graphs, which may use them.
    scratch: Vec<Block>,
    /// Graphs that are alive.
    graphs: usize,
    /// Operation and argument of each fault code, from code 1 on.
    codes: Vec<(&'static str, &'static str)>,
}

impl Stream {
    /// # Safety
    /// Nobody else captures the stream as long as the value lives.
    pub unsafe fn new(cuda: Arc<CudaStream>, kernels: Kernels) -> Result<Self> {
        let faults = allocate(&cuda, FAULT_WORDS * size_of::<u32>())?;
        let stream = Self {
            kernels,
            cuda,
            faults,
            state: Mutex::new(State {
                recording: None,
                dropped: Vec::new(),
                scratch: Vec::new(),
                graphs: 0,
                codes: Vec::new(),
            }),
            recorded: Condvar::new(),
        };
        stream.turn("Cuda::new")?.zero(faults)?;
        Ok(stream)
    }

    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub fn cuda(&self) -> &Arc<CudaStream> {
        &self.cuda
    }

    /// Waits until no other thread has its turn or records, and makes the context current.
    pub fn turn(&self, op: &'static str) -> Result<Turn<'_>> {
        let me = std::thread::current().id();
        let mut state = self.lock();
        while state.recording.is_some_and(|thread| thread != me) {
            state = self
                .recorded
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let context = self.cuda.context();
        context.bind_to_thread().map_err(|e| device_error(op, e))?;
        Ok(Turn {
            kernels: &self.kernels,
            stream: self.cuda.cu_stream(),
            op,
            on: self,
            state,
        })
    }

    /// Gives memory back, now or after a recording, which it does not wait for: buffers may be
    /// dropped anywhere.
    pub fn free(&self, block: Block) {
        let mut state = self.lock();
        self.free_in(&mut state, block);
    }

    fn free_in(&self, state: &mut State, block: Block) {
        match state.recording {
            Some(_) => state.dropped.push(block),
            None => self.release(block),
        }
    }

    fn release(&self, block: Block) {
        self.make_current();
        let context = self.cuda.context();
        // SAFETY: the block was allocated in this context and is given back once; what uses it is
        // on the stream already.
        let freed = unsafe {
            match context.has_async_alloc() {
                true => result::free_async(block.address, self.cuda.cu_stream()),
                false => result::stream::synchronize(self.cuda.cu_stream())
                    .and_then(|()| result::free_sync(block.address)),
            }
        };
        // An error goes to the next call on the context.
        context.record_err(freed);
    }

    /// As `bind_to_thread`, but earlier errors do not keep it from doing so.
    fn make_current(&self) {
        let context = self.cuda.context();
        // SAFETY: the stream keeps its context alive.
        context.record_err(unsafe { result::ctx::set_current(context.cu_ctx()) });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What the mutex guards is never left half made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the capture, and makes a graph of it that can be launched.
    fn end_recording(&self) -> std::result::Result<CUgraphExec, DriverError> {
        let mut state = self.lock();
        self.make_current();
        // SAFETY: this thread began to capture the stream.
        let captured = unsafe { result::stream::end_capture(self.cuda.cu_stream()) };
        let graph = captured.and_then(|graph| self.instantiate(graph));
        state.graphs += usize::from(graph.is_ok());
        state.recording = None;
        for block in std::mem::take(&mut state.dropped) {
            self.release(block);
        }
        self.recorded.notify_all();
        graph
    }

    fn instantiate(&self, graph: CUgraph) -> std::result::Result<CUgraphExec, DriverError> {
        if graph.is_null() {
            return Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        }
        // SAFETY: the graph has just been captured.
        let executable =
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        let context = self.cuda.context();
        // SAFETY: the executable does not need it.
        context.record_err(unsafe { result::graph::destroy(graph) });
        executable
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.make_current();
        // Modules must outlive their kernels. An error has nobody to go to.
        // SAFETY: the stream is alive.
        let _: std::result::Result<(), DriverError> =
            unsafe { result::stream::synchronize(self.cuda.cu_stream()) };
        let scratch = std::mem::take(&mut self.lock().scratch);
        for block in scratch.into_iter().chain([self.faults]) {
            self.release(block);
        }
    }
}

fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<Block> {
    let size = bytes.max(SMALLEST);
    // SAFETY: callers have made the context current, and write the memory before anything reads it.
    let address = unsafe {
        match stream.context().has_async_alloc() {
            true => result::malloc_async(stream.cu_stream(), size),
            false => result::malloc_sync(size),
        }
    };
    match address {
        Ok(address) => Ok(Block {
            address,
            bytes: size,
        }),
        Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::OutOfMemory { bytes }),
        Err(e) => Err(device_error("allocate", e)),
    }
}

/// A thread's turn on the stream, from the first to the last launch of an operation.
pub(super) struct Turn<'a> {
    pub kernels: &'a Kernels,
    pub stream: CUstream,
    op: &'static str,
    on: &'a Stream,
    state: MutexGuard<'a, State>,
}

impl Turn<'_> {
    fn done<T>(&self, result: std::result::Result<T, DriverError>) -> Result<T> {
        result.map_err(|e| device_error(self.op, e))
    }

    /// Refuses what a recording cannot hold: host memory, which it would keep a pointer to, and
    /// new memory, which would belong to the graph.
    fn not_recorded(&self) -> Result<()> {
        match self.state.recording {
            None => Ok(()),
            Some(_) => Err(Error::invalid(
                self.op,
                "cannot be recorded, as nothing can that moves host memory, makes memory or plays \
                 a recording; call it before `record` or after",
            )),
        }
    }

    /// New memory of any content.
    pub fn allocate(&self, bytes: usize) -> Result<Block> {
        self.not_recorded()?;
        allocate(&self.on.cuda, bytes)
    }

    /// New memory, zeroed.
    pub fn zeros(&self, bytes: usize) -> Result<Block> {
        let block = self.allocate(bytes)?;
        self.zero(block).inspect_err(|_| self.on.release(block))?;
        Ok(block)
    }

    /// At least `bytes` of memory of any content, until the turn is over: later operations get the
    /// same bytes, after this one in the order of the stream. An operation asks once for all that
    /// it needs.
    pub fn scratch(&mut self, bytes: usize) -> Result<CUdeviceptr> {
        let newest = self.state.scratch.last().map_or(0, |block| block.bytes);
        if let Some(block) = self.state.scratch.last().filter(|_| bytes <= newest) {
            return Ok(block.address);
        }
        if self.state.recording.is_some() {
            return Err(Error::invalid(
                self.op,
                format!(
                    "needs {bytes} bytes of scratch memory, which cannot be made in a recording; \
                     run the operation once before, with sizes at least as large"
                ),
            ));
        }
        let least = match self.state.graphs {
            0 => {
                for block in std::mem::take(&mut self.state.scratch) {
                    self.on.release(block);
                }
                0
            }
            // Growing by half at least keeps the sum of the outgrown below twice the newest.
            _ => newest + newest / 2,
        };
        let wanted = bytes.max(least);
        let wanted = wanted
            .checked_next_multiple_of(SCRATCH_STEP)
            .unwrap_or(wanted);
        let block = self.allocate(wanted)?;
        self.state.scratch.push(block);
        Ok(block.address)
    }

    /// Where a kernel notes a bad index of the operation's argument `name`.
    pub fn fault(&mut self, name: &'static str) -> Fault {
        let (op, codes) = (self.op, &mut self.state.codes);
        let known = codes.iter().position(|&code| code == (op, name));
        let index = known.unwrap_or_else(|| {
            codes.push((op, name));
            codes.len() - 1
        });
        Fault {
            words: self.on.faults.address,
            code: index as u32 + 1,
            unused: 0,
        }
    }

    /// Copies to device memory. `host` may be written again at once.
    ///
    /// # Safety
    /// `to` is inside of memory of this stream, with room for `host`.
    pub unsafe fn write(&self, to: CUdeviceptr, host: &[u8]) -> Result<()> {
        if host.is_empty() {
            return Ok(());
        }
        self.not_recorded()?;
        // SAFETY: by the caller; `host` is borrowed until the driver is done with it: it stages
        // pageable memory before it returns, and for any other the stream is waited for.
        unsafe {
            let copied = result::memcpy_htod_async(to, host, self.stream);
            if !is_pageable(host) {
                self.done(result::stream::synchronize(self.stream))?;
            }
            self.done(copied)
        }
    }

    /// Copies to host memory, and reports what kernels have noted since the last time. Waits for
    /// the device.
    ///
    /// # Safety
    /// `from` is inside of memory of this stream, which holds as much as `host`.
    pub unsafe fn read(&self, from: CUdeviceptr, host: &mut [u8]) -> Result<()> {
        self.not_recorded()?;
        let faults = self.on.faults;
        let mut words = [0u32; FAULT_WORDS];
        // SAFETY: by the caller, and `words` are as many as there are on the device; both places
        // are borrowed until the stream is done, whatever failed.
        let (copied, waited) = unsafe {
            let copied = match host.is_empty() {
                true => Ok(()),
                false => result::memcpy_dtoh_async(host, from, self.stream),
            };
            let noted = result::memcpy_dtoh_async(&mut words, faults.address, self.stream);
            let waited = result::stream::synchronize(self.stream);
            (copied.and(noted), waited)
        };
        self.done(copied.and(waited))?;
        let [code, at, value, limit] = words;
        if code == 0 {
            return Ok(());
        }
        // Nothing can have been noted between: the lock is still held.
        self.zero(faults)?;
        let known = self.state.codes.get(code as usize - 1).copied();
        let (op, name) = known.unwrap_or((self.op, "?"));
        Err(Error::OutOfRange {
            op,
            name,
            at: at as usize,
            value: value as usize,
            limit: limit as usize,
        })
    }

    /// Copies inside of device memory.
    ///
    /// # Safety
    /// Both runs are inside of memory of this stream, and do not overlap.
    pub unsafe fn copy(&self, from: CUdeviceptr, to: CUdeviceptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: by the caller.
        self.done(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    /// Sets a block of this stream to zero.
    pub fn zero(&self, block: Block) -> Result<()> {
        if block.bytes == 0 {
            return Ok(());
        }
        // SAFETY: blocks are allocated with that many bytes, and this one is alive.
        self.done(unsafe { result::memset_d8_async(block.address, 0, block.bytes, self.stream) })
    }

    /// Takes over the memory of a slice, after all work on the slice's stream.
    pub fn adopt<T>(&self, slice: CudaSlice<T>) -> Result<Block> {
        self.not_recorded()?;
        let theirs = slice.stream().clone();
        let ours = &self.on.cuda;
        if theirs.context().cu_ctx() != ours.context().cu_ctx() {
            return Err(Error::invalid(
                self.op,
                "the slice lies in another CUDA context than the device's",
            ));
        }
        let bytes = slice.num_bytes();
        let address = slice.device_ptr(&theirs).0;
        if !address.is_multiple_of(16) {
            return Err(Error::invalid(
                self.op,
                format!("kernels need an alignment of 16 bytes, the slice lies at {address:#x}"),
            ));
        }
        slice.leak();
        // If this fails nobody knows when the memory is free to be used, so it stays leaked.
        self.done(ours.join(&theirs))?;
        Ok(Block { address, bytes })
    }
}

/// Whether the driver knows nothing of the memory: only what it has made or registered itself can
/// be read by the device directly, thus after a copy has returned.
fn is_pageable(host: &[u8]) -> bool {
    let mut kind = 0u32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: the attribute is a `u32`; the driver only looks the address up.
    let answer = unsafe {
        let kind = (&raw mut kind).cast();
        sys::cuPointerGetAttribute(kind, attribute, host.as_ptr() as CUdeviceptr)
    };
    answer == CUresult::CUDA_ERROR_INVALID_VALUE
}

/// A recording on its way. Ends when dropped, so that neither an error nor a panic leaves the
/// stream captured and other threads waiting.
pub(super) struct Recording<'a> {
    stream: &'a Arc<Stream>,
    ended: bool,
}

impl<'a> Recording<'a> {
    pub fn begin(stream: &'a Arc<Stream>) -> Result<Self> {
        let mut turn = stream.turn("record")?;
        turn.not_recorded()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        turn.done(unsafe { result::stream::begin_capture(turn.stream, mode) })?;
        turn.state.recording = Some(std::thread::current().id());
        Ok(Self {
            stream,
            ended: false,
        })
    }

    pub fn end(mut self) -> Result<Graph> {
        self.ended = true;
        let executable = self.stream.end_recording();
        Ok(Graph {
            executable: executable.map_err(|e| device_error("record", e))?,
            stream: self.stream.clone(),
        })
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if !self.ended
            && let Ok(executable) = self.stream.end_recording()
        {
            drop(Graph {
                executable,
                stream: self.stream.clone(),
            });
        }
    }
}

/// Operations of a [`super::Cuda`] device that were recorded by [`crate::Device::record`].
pub struct Graph {
    executable: CUgraphExec,
    /// Keeps the kernels and the scratch memory that the graph uses.
    stream: Arc<Stream>,
}

impl Graph {
    /// # Safety
    /// The buffers that the graph uses are alive.
    pub(super) unsafe fn replay(&self, stream: &Arc<Stream>) -> Result<()> {
        const OP: &str = "replay";
        if !Arc::ptr_eq(&self.stream, stream) {
            return Err(Error::invalid(OP, "another device recorded the graph"));
        }
        let turn = stream.turn(OP)?;
        turn.not_recorded()?;
        // SAFETY: by the caller; the lock keeps other threads from launching it at once.
        turn.done(unsafe { result::graph::launch(self.executable, turn.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let mut state = self.stream.lock();
        self.stream.make_current();
        let context = self.stream.cuda.context();
        // SAFETY: instantiated when it was recorded; the driver waits with what still runs.
        context.record_err(unsafe { result::graph::exec_destroy(self.executable) });
        state.graphs -= 1;
        if state.graphs == 0
            && let Some(newest) = state.scratch.pop()
        {
            for outgrown in std::mem::replace(&mut state.scratch, vec![newest]) {
                self.stream.free_in(&mut state, outgrown);
            }
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

/// A buffer that an operation uses, or none.
pub(super) trait Lives {
    /// Whether it is none, or lies on this stream.
    fn on(&self, stream: &Arc<Stream>) -> bool;
}

impl<T: Element> Lives for CudaBuffer<T> {
    fn on(&self, stream: &Arc<Stream>) -> bool {
        Arc::ptr_eq(&self.stream, stream)
    }
}

impl<T: Element> Lives for Option<&CudaBuffer<T>> {
    fn on(&self, stream: &Arc<Stream>) -> bool {
        self.is_none_or(|buffer| buffer.on(stream))
    }
}

impl<T: Element> Lives for Option<&mut CudaBuffer<T>> {
    fn on(&self, stream: &Arc<Stream>) -> bool {
        self.as_ref().is_none_or(|buffer| buffer.on(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::CudaContext;

    #[test]
    fn memory_of_the_driver_is_not_pageable() {
        cuda_emulator::install().unwrap();
        let context = CudaContext::new(0).unwrap();
        // SAFETY: bytes may have any value.
        let pinned = unsafe { context.alloc_pinned::<u8>(8) }.unwrap();
        assert!(!is_pageable(pinned.as_slice().unwrap()));
        assert!(is_pageable(&[1u8; 8]));
    }
}
