//! The CUDA driver's C interface on top of [`Device`].
//!
//! Work runs in the calling thread, at once and in order, so that streams and events need no
//! machinery of their own; errors of kernels still surface only in later calls, and stay. Handles
//! are numbers that are looked up, never pointers that are followed. They belong to the context
//! that was current where they were made; what CUDA does in the current context fails without one.

mod absent;
mod attributes;
mod capture;
mod context;
mod error;
mod execution;
mod graph;
mod memory;
mod stream;
mod symbols;

use crate::config::Config;
use crate::device::{Device, Module};
use crate::machine::code::Kernel;
use crate::report::{Kind, LaunchReport};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::thread::ThreadId;
use std::time::Instant;

pub use error::Error;
use error::Error as E;

/// What the driver's functions give back: 0 or an error code.
pub type CUresult = u32;
/// An address on the device.
pub type CUdeviceptr = u64;
/// Context, module, function, stream, event, pool or graph.
pub type Handle = usize;

/// Work of a stream.
#[derive(Clone)]
enum Work {
    Launch {
        kernel: Arc<Kernel>,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: Vec<u8>,
    },
    /// Between any two places; which side is on the device follows from the address.
    Copy {
        to: u64,
        from: u64,
        len: usize,
    },
    Fill {
        to: u64,
        pattern: Vec<u8>,
        count: usize,
    },
    Call {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Of memory of a graph.
    Alloc(u64),
    Free(u64),
    Record(Handle),
}

struct Stream {
    context: Handle,
    flags: u32,
    priority: i32,
    /// The context's default stream that waits for all blocking ones.
    legacy: bool,
    capture: Option<Handle>,
}

impl Stream {
    fn non_blocking(&self) -> bool {
        self.flags & 1 != 0
    }
}

struct Event {
    context: Handle,
    recorded: Option<Instant>,
    /// What it was recorded in last, if that was a capture.
    captured: Option<capture::Captured>,
    timing: bool,
}

/// A context and its default streams.
struct Context {
    legacy: Handle,
    per_thread: HashMap<ThreadId, Handle>,
}

struct Function {
    kernel: Arc<Kernel>,
    module: Handle,
    max_dynamic_shared: u32,
}

struct State {
    device: Device,
    initialised: bool,
    next: Handle,
    primary: Option<Handle>,
    primary_uses: u32,
    contexts: HashMap<Handle, Context>,
    /// With their contexts.
    modules: HashMap<Handle, (Handle, Module)>,
    functions: HashMap<Handle, Function>,
    streams: HashMap<Handle, Stream>,
    events: HashMap<Handle, Event>,
    captures: HashMap<Handle, capture::Capture>,
    graphs: HashMap<Handle, graph::Graph>,
    executables: HashMap<Handle, graph::Executable>,
    graph_memory: BTreeMap<u64, graph::GraphMemory>,
    /// The context of each allocation.
    allocations: BTreeMap<u64, Handle>,
    pools: Vec<Handle>,
    /// Host memory made by the driver.
    host: HashMap<usize, Box<[u128]>>,
    /// The error that a kernel left; every later call gives it.
    failed: Option<Error>,
    reports: Vec<LaunchReport>,
    leaks: Vec<(u64, u64)>,
}

/// The names of the current context's default streams.
const LEGACY: [Handle; 2] = [0, 1];
const PER_THREAD: Handle = 2;

impl State {
    fn new() -> State {
        let config = match std::env::var("CUDA_EMULATOR_CONFIG") {
            Ok(text) => serde_json::from_str(&text).unwrap_or_else(|e| {
                eprintln!("cuda-emulator: CUDA_EMULATOR_CONFIG is ignored: {e}");
                Config::default()
            }),
            Err(_) => Config::default(),
        };
        State {
            device: Device::new(config),
            initialised: false,
            next: 0x1000,
            primary: None,
            primary_uses: 0,
            contexts: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            graph_memory: BTreeMap::new(),
            allocations: BTreeMap::new(),
            pools: Vec::new(),
            host: HashMap::new(),
            failed: None,
            reports: Vec::new(),
            leaks: Vec::new(),
        }
    }

    fn handle(&mut self) -> Handle {
        self.next += 16;
        self.next
    }

    /// Whether an address is device memory (or host memory that kernels can reach).
    fn on_device(&self, address: u64) -> bool {
        address >= crate::machine::memory::DEVICE_BASE || self.graph_memory_at(address).is_some()
    }

    /// The context that is current on this thread.
    fn current(&self) -> Result<Handle, E> {
        match CURRENT.with_borrow(|c| c.last().copied()) {
            Some(context) if self.contexts.contains_key(&context) => Ok(context),
            Some(_) => Err(error::refuse(
                E::ContextIsDestroyed,
                "the context that is current on this thread was destroyed",
            )),
            None => Err(error::refuse(
                E::InvalidContext,
                "no context is current on this thread",
            )),
        }
    }

    /// A stream by the name that the program has for it.
    fn resolve(&mut self, name: Handle) -> Result<Handle, E> {
        if LEGACY.contains(&name) {
            let context = self.current()?;
            return Ok(self.contexts[&context].legacy);
        }
        if name != PER_THREAD {
            return Ok(name);
        }
        let (context, thread) = (self.current()?, std::thread::current().id());
        if let Some(stream) = self.contexts[&context].per_thread.get(&thread) {
            return Ok(*stream);
        }
        let stream = self.add_stream(context, 0, 0, false);
        if let Some(context) = self.contexts.get_mut(&context) {
            context.per_thread.insert(thread, stream);
        }
        Ok(stream)
    }

    fn stream(&mut self, stream: Handle) -> Result<&mut Stream, E> {
        self.streams.get_mut(&stream).ok_or(E::InvalidHandle)
    }

    /// As [`State::resolve`], for work: no capture must be in the way.
    fn use_stream(&mut self, name: Handle) -> Result<Handle, E> {
        let stream = self.resolve(name)?;
        let Stream {
            context, legacy, ..
        } = *self.stream(stream)?;
        if legacy {
            self.legacy_use(context)?;
        }
        Ok(stream)
    }

    /// Does work now, or records it if the stream is being captured.
    fn submit(&mut self, stream: Handle, work: Work) -> Result<(), E> {
        match self.capture_of(stream)? {
            Some(capture) => {
                capture.push(stream, work);
                Ok(())
            }
            None => self.perform(&work, false),
        }
    }

    /// Does work, as part of the launch of a graph or not.
    fn perform(&mut self, work: &Work, graph: bool) -> Result<(), E> {
        match work {
            Work::Launch {
                kernel,
                grid,
                block,
                shared,
                params,
            } => {
                let mut report = self
                    .device
                    .launch_raw(kernel, *grid, *block, *shared, params)
                    .map_err(|e| error::refuse(E::InvalidValue, e))?;
                report.graph = graph;
                for finding in &report.findings {
                    eprintln!("cuda-emulator: {finding}");
                }
                // What stopped the kernel stands last; races did not stop it, but must not pass.
                self.failed = report.findings.last().map(|f| match f.kind {
                    Kind::OutOfBounds | Kind::UseAfterFree => E::IllegalAddress,
                    Kind::Misaligned => E::MisalignedAddress,
                    Kind::StepLimit | Kind::Deadlock => E::LaunchTimeout,
                    _ => E::LaunchFailed,
                });
                self.reports.push(report);
                Ok(())
            }
            Work::Copy { to, from, len } => self.copy(*to, *from, *len),
            Work::Fill { to, pattern, count } => self
                .device
                .memory()
                .fill(*to, pattern, *count)
                .map_err(|why| {
                    error::refuse(E::InvalidValue, format!("memset at {to:#x}: {why:?}"))
                }),
            Work::Call { function, data } => {
                // SAFETY: the caller of cuLaunchHostFunc or cuStreamAddCallback gave a function
                // that takes this pointer.
                unsafe { function(*data as *mut c_void) };
                Ok(())
            }
            Work::Alloc(address) => self.allocate_in_graph(*address),
            Work::Free(address) => self.free(*address),
            Work::Record(event) => {
                if let Some(event) = self.events.get_mut(event) {
                    event.recorded = Some(Instant::now());
                }
                Ok(())
            }
        }
    }

    /// Frees memory of the device or of a graph.
    fn free(&mut self, address: u64) -> Result<(), E> {
        if let Some(done) = self.free_in_graph(address) {
            self.sweep_graph_memory();
            return done;
        }
        if self.device.free(address) {
            self.allocations.remove(&address);
            return Ok(());
        }
        let why = format!("free of {address:#x}, which is not an allocation");
        Err(error::refuse(E::InvalidValue, why))
    }

    fn copy(&mut self, to: u64, from: u64, len: usize) -> Result<(), E> {
        if len == 0 {
            return Ok(());
        }
        if to == 0 || from == 0 {
            return Err(error::refuse(E::InvalidValue, "copy with a null pointer"));
        }
        let memory = self.device.memory();
        let bad = |why| error::refuse(E::InvalidValue, format!("copy of {len} bytes: {why:?}"));
        match (self.on_device(to), self.on_device(from)) {
            (true, true) => memory.copy(to, from, len).map_err(bad),
            (true, false) => {
                // SAFETY: the caller of the copy gave `len` readable bytes of host memory.
                let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
                memory.write(to, bytes).map_err(bad)
            }
            (false, true) => {
                // SAFETY: likewise, writable.
                let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) };
                memory.read(from, bytes).map_err(bad)
            }
            (false, false) => {
                // SAFETY: likewise, both; `copy` allows overlap.
                unsafe { (to as *mut u8).copy_from(from as *const u8, len) };
                Ok(())
            }
        }
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));

thread_local! {
    /// The stack of current contexts of this thread.
    static CURRENT: std::cell::RefCell<Vec<Handle>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn lock() -> MutexGuard<'static, State> {
    match STATE.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// Runs an entry point: no panic may cross into C.
fn enter(body: impl FnOnce() -> Result<(), E>) -> CUresult {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => error as CUresult,
        Err(_) => E::Unknown as CUresult,
    }
}

/// Runs an entry point that needs a driver in working order.
fn with(body: impl FnOnce(&mut State) -> Result<(), E>) -> CUresult {
    enter(|| {
        let mut state = lock();
        if !state.initialised {
            return Err(E::NotInitialized);
        }
        if let Some(error) = state.failed {
            return Err(error);
        }
        body(&mut state)
    })
}

/// Runs an entry point that works in the current context.
fn within(body: impl FnOnce(&mut State, Handle) -> Result<(), E>) -> CUresult {
    with(|s| {
        let context = s.current()?;
        body(s, context)
    })
}

/// Writes a result through a pointer that C gave.
///
/// # Safety
/// `to` is null or valid for a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Result<(), E> {
    if to.is_null() {
        return Err(E::InvalidValue);
    }
    // SAFETY: not null, and the caller promises the rest.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a result that the caller may not want.
///
/// # Safety
/// `to` is null or valid for a `T`.
unsafe fn put_if<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: not null, and the caller promises the rest.
        unsafe { to.write(value) };
    }
}

/// Reads a C string.
///
/// # Safety
/// `text` is null or a NUL-terminated string.
unsafe fn string<'a>(text: *const c_char) -> Result<&'a str, E> {
    if text.is_null() {
        return Err(E::InvalidValue);
    }
    // SAFETY: not null, and the caller promises the rest.
    unsafe { CStr::from_ptr(text) }
        .to_str()
        .map_err(|_| E::InvalidValue)
}

/// What the Rust side asks of the driver library, as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Replaces the configuration; answers with the old one.
    Configure(Box<Config>),
    /// The configuration.
    Config,
    /// Reports of the launches since the last time.
    Reports,
    /// Allocations (address, bytes) alive when a context was destroyed, since the last time.
    Leaks,
    /// Forgets the error that a kernel left, as a new process would.
    Recover,
}

/// Answers a [`Request`]; the answer must be given back to `cudaEmulatorFree`. Null if the request
/// is not understood.
///
/// # Safety
/// `request` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaEmulatorControl(request: *const c_char) -> *mut c_char {
    // SAFETY: the caller's.
    let Ok(text) = (unsafe { string(request) }) else {
        return std::ptr::null_mut();
    };
    let Ok(request) = serde_json::from_str::<Request>(text) else {
        return std::ptr::null_mut();
    };
    let mut state = lock();
    let answer = match request {
        Request::Configure(config) => {
            serde_json::to_string(&std::mem::replace(&mut state.device.config, *config))
        }
        Request::Config => serde_json::to_string(&state.device.config),
        Request::Reports => serde_json::to_string(&std::mem::take(&mut state.reports)),
        Request::Leaks => serde_json::to_string(&std::mem::take(&mut state.leaks)),
        Request::Recover => {
            state.failed = None;
            Ok("null".to_string())
        }
    };
    match answer.map(CString::new) {
        Ok(Ok(text)) => text.into_raw(),
        _ => std::ptr::null_mut(),
    }
}

/// Frees an answer of [`cudaEmulatorControl`].
///
/// # Safety
/// `answer` is null or came from there, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaEmulatorFree(answer: *mut c_char) {
    if !answer.is_null() {
        // SAFETY: the caller's.
        drop(unsafe { CString::from_raw(answer) });
    }
}
