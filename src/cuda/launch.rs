//! Modules and launches, by the driver's interface alone: works in any CUDA context.

use crate::{Error, Result};
use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUfunction, CUmodule, CUresult, CUstream};
use cudarc::driver::{DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A kernel file's PTX for one target, as it is embedded in this crate.
#[derive(Debug)]
pub struct Module {
    /// The operation: the file's stem in `kernels/`.
    pub op: &'static str,
    /// The target, such as `80` or `90a`.
    pub arch: &'static str,
    /// The text, ending in NUL.
    text: &'static str,
    /// Its kernels.
    pub entries: &'static [Entry],
}

/// A kernel, and what ptxas says that it takes.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// Bytes of each parameter.
    pub params: &'static [usize],
    /// The largest block it may be launched with.
    pub threads: usize,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of static shared memory.
    pub shared: usize,
}

/// Every kernel file, sorted by operation.
pub const MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

impl Module {
    /// The PTX text.
    pub fn ptx(&self) -> &'static str {
        self.text.trim_end_matches('\0')
    }

    /// The compute capability that it needs, and whether it needs exactly that one.
    fn target(&self) -> (u32, bool) {
        let digits = self.arch.strip_suffix('a');
        let number = digits.unwrap_or(self.arch).parse().unwrap_or(u32::MAX);
        (number, digits.is_some())
    }
}

/// The driver's error in words.
pub(super) fn device_error(op: &'static str, error: DriverError) -> Error {
    let words = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| String::new(), |t| t.to_string_lossy().into_owned())
    };
    let message = format!(
        "{} ({})",
        words(error.error_string()),
        words(error.error_name())
    );
    Error::Device {
        op,
        message,
        code: Some(error.0 as u32),
    }
}

/// A value that a kernel takes: plain bytes without padding.
pub(super) trait Arg {
    /// Its bytes.
    fn bytes(&self) -> &[u8];
}

impl<T: bytemuck::NoUninit> Arg for T {
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(self)
    }
}

/// Blocks of a launch, threads of a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub blocks: [usize; 3],
    pub threads: usize,
    pub shared: usize,
}

impl Grid {
    /// A row of blocks without dynamic shared memory.
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self {
            blocks: [blocks, 1, 1],
            threads,
            shared: 0,
        }
    }

    /// The same with `bytes` of dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self {
            shared: bytes,
            ..self
        }
    }
}

/// Where kernels note an index that points outside of what it indexes.
///
/// `words` are four `u32` of device memory, zero before the first launch. A kernel that finds a bad
/// index leaves the memory behind it alone and, if nothing has been noted before, writes: `code`,
/// the position of the index, the index, the first value that is not allowed. With `words` 0
/// nothing is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Fault {
    /// Device address of the four words, or 0.
    pub words: CUdeviceptr,
    /// What `words[0]` becomes; not 0.
    pub code: u32,
    /// 0.
    pub unused: u32,
}

impl Fault {
    /// Nothing is noted.
    pub const IGNORED: Fault = Fault {
        words: 0,
        code: 1,
        unused: 0,
    };
}

#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    entry: &'static Entry,
    /// Dynamic shared memory that the driver has been asked to allow.
    shared: usize,
}

struct Loaded {
    modules: Vec<CUmodule>,
    functions: HashMap<&'static str, Function>,
}

// SAFETY: the handles are the driver's; it lets every thread use them.
unsafe impl Send for Loaded {}

impl Loaded {
    /// Loads a module into the current context.
    fn load(&mut self, module: &'static Module) -> Result<()> {
        let handle = load_text(module.op, module.text)?;
        self.modules.push(handle);
        for entry in module.entries {
            let name = CString::new(entry.name)
                .map_err(|_| Error::invalid(entry.name, "a name may hold no NUL"))?;
            // SAFETY: the module has just been loaded.
            let function = unsafe { result::module::get_function(handle, name) };
            let function = Function {
                handle: function.map_err(|e| device_error(entry.name, e))?,
                entry,
                shared: SHARED_DEFAULT.saturating_sub(entry.shared),
            };
            self.functions.insert(entry.name, function);
        }
        Ok(())
    }
}

/// Loads PTX that ends in NUL. An error holds what the driver's compiler says.
fn load_text(op: &'static str, text: &'static str) -> Result<CUmodule> {
    let mut log = [0u8; 4096];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    let mut values: [*mut c_void; 2] = [
        log.as_mut_ptr().cast(),
        std::ptr::without_provenance_mut(log.len()),
    ];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends in NUL; two options with their values, which are a buffer and its size.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            text.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.result().map_err(|e| {
        let said = log.split(|&byte| byte == 0).next().unwrap_or_default();
        let said = String::from_utf8_lossy(said);
        match (device_error(op, e), said.trim()) {
            (error, "") => error,
            (Error::Device { op, message, code }, said) => Error::Device {
                op,
                message: format!("{message}: {said}"),
                code,
            },
            (error, _) => error,
        }
    })?;
    Ok(module)
}

/// The kernels, in one CUDA context. Each method launches one operation on plain device pointers;
/// the safe way is [`super::Cuda`].
///
/// Launches go to the stream that is passed and return at once. The driver compiles an operation's
/// kernels at its first launch, which is refused while the stream is captured, or all of them in
/// [`Kernels::load_all`].
pub struct Kernels {
    context: CUcontext,
    capability: u32,
    loaded: Mutex<Loaded>,
}

// SAFETY: the context handle is the driver's; it lets every thread use it.
unsafe impl Send for Kernels {}
// SAFETY: as above; what changes is behind a mutex.
unsafe impl Sync for Kernels {}

/// Shared memory that a launch gets without being asked for, in bytes.
const SHARED_DEFAULT: usize = 48 << 10;

impl Kernels {
    /// For the CUDA context that is current on this thread.
    ///
    /// # Errors
    /// No context is current.
    ///
    /// # Safety
    /// The context must outlive the value and all work that is launched through it.
    pub unsafe fn in_current_context() -> Result<Self> {
        const OP: &str = "Kernels::in_current_context";
        let error = |e| device_error(OP, e);
        let context = result::ctx::get_current().map_err(error)?.ok_or_else(|| {
            Error::invalid(
                OP,
                "no CUDA context is current on this thread; make one first",
            )
        })?;
        let mut device = 0;
        // SAFETY: a context is current, as just seen; `device` is a place for the answer.
        unsafe { sys::cuCtxGetDevice(&mut device) }
            .result()
            .map_err(error)?;
        use sys::CUdevice_attribute::*;
        let attribute = |which| {
            // SAFETY: `device` came from the driver.
            unsafe { result::device::get_attribute(device, which) }.map_err(error)
        };
        let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Self {
            context,
            capability: (10 * major + minor) as u32,
            loaded: Mutex::new(Loaded {
                modules: Vec::new(),
                functions: HashMap::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        // A panic elsewhere leaves no half-made entry behind: they are inserted whole.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The module that holds `entry` and suits the device best.
    fn module_of(&self, entry: &'static str) -> Result<&'static Module> {
        MODULES
            .iter()
            .filter(|module| module.entries.iter().any(|e| e.name == entry))
            .filter(|module| match module.target() {
                (target, true) => target == self.capability,
                (target, false) => target <= self.capability,
            })
            .max_by_key(|module| module.target())
            .ok_or_else(|| {
                let (major, minor) = (self.capability / 10, self.capability % 10);
                Error::invalid(
                    entry,
                    format!(
                        "this build has no kernel for compute capability {major}.{minor}; build \
                         with 80 in DUST_CUDA_ARCHS, which suits all from 8.0 on"
                    ),
                )
            })
    }

    /// Has the driver compile every kernel now rather than at first use, which can take it seconds.
    ///
    /// # Errors
    /// A build without kernels for this device; what the driver's compiler says.
    pub fn load_all(&self) -> Result<()> {
        let _current = Current::set(self.context)?;
        let mut loaded = self.lock();
        for entry in MODULES.iter().flat_map(|module| module.entries) {
            if !loaded.functions.contains_key(entry.name) {
                loaded.load(self.module_of(entry.name)?)?;
            }
        }
        Ok(())
    }

    fn function(&self, stream: CUstream, entry: &'static str, shared: usize) -> Result<Function> {
        let error = |e| device_error(entry, e);
        let mut loaded = self.lock();
        if !loaded.functions.contains_key(entry) {
            // SAFETY: by `launch` the stream is alive.
            let status = unsafe { result::stream::is_capturing(stream) }.map_err(error)?;
            if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
                return Err(Error::invalid(
                    entry,
                    "the kernel has not been loaded, which a captured stream does not allow; run \
                     the operation once before, or `load_all`",
                ));
            }
            loaded.load(self.module_of(entry)?)?;
        }
        let function = loaded
            .functions
            .get_mut(entry)
            .ok_or_else(|| Error::invalid(entry, "the module lacks the kernel"))?;
        if shared > function.shared {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to a loaded module.
            unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    bytes,
                )
            }
            .map_err(|e| match e.0 {
                CUresult::CUDA_ERROR_INVALID_VALUE => Error::invalid(
                    entry,
                    format!(
                        "the shape needs {shared} bytes of shared memory, more than the device has"
                    ),
                ),
                _ => error(e),
            })?;
            function.shared = shared;
        }
        Ok(*function)
    }

    /// Launches a kernel. An empty grid does nothing.
    ///
    /// The number of arguments and the size of each are checked against the kernel's.
    ///
    /// # Safety
    /// The context of `self` is current on this thread and `stream` belongs to it; the arguments
    /// are what the kernel's source says, and the memory that it reaches through them is alive
    /// until the work is done and touched by no unordered work.
    pub(super) unsafe fn launch(
        &self,
        stream: CUstream,
        entry: &'static str,
        grid: Grid,
        args: &[&dyn Arg],
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let function = self.function(stream, entry, grid.shared)?;
        let sizes = args.iter().map(|arg| arg.bytes().len());
        if !sizes.eq(function.entry.params.iter().copied()) {
            let given: Vec<usize> = args.iter().map(|arg| arg.bytes().len()).collect();
            let rule = format!(
                "takes {:?}-byte arguments, not {given:?}",
                function.entry.params
            );
            return Err(Error::invalid(entry, rule));
        }
        let mut params: Vec<*mut c_void> = args
            .iter()
            .map(|arg| arg.bytes().as_ptr().cast_mut().cast())
            .collect();
        let size = |n: usize| {
            u32::try_from(n)
                .map_err(|_| Error::invalid(entry, format!("a grid of {grid:?} is too large")))
        };
        let [x, y, z] = grid.blocks;
        let (blocks, threads) = ((size(x)?, size(y)?, size(z)?), (size(grid.threads)?, 1, 1));
        // SAFETY: the function is loaded; the driver copies the arguments, which have the sizes
        // that it reads, before it returns; the rest is the caller's promise.
        unsafe {
            result::launch_kernel(
                function.handle,
                blocks,
                threads,
                size(grid.shared)?,
                stream,
                &mut params,
            )
        }
        .map_err(|e| device_error(entry, e))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Ok(_current) = Current::set(self.context) else {
            return;
        };
        for module in self.lock().modules.drain(..) {
            // SAFETY: loaded by `load`, unloaded only here. An error has nobody to go to.
            let _: std::result::Result<(), DriverError> = unsafe { result::module::unload(module) };
        }
    }
}

/// A context that is current on this thread until the value is dropped.
struct Current {
    before: CUcontext,
}

impl Current {
    /// `context` is that of a [`Kernels`], which it outlives.
    fn set(context: CUcontext) -> Result<Self> {
        let error = |e| device_error("cuCtxSetCurrent", e);
        let before = result::ctx::get_current().map_err(error)?;
        // SAFETY: by `in_current_context` the context is alive.
        unsafe { result::ctx::set_current(context) }.map_err(error)?;
        Ok(Self {
            before: before.unwrap_or(std::ptr::null_mut()),
        })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: what was current before, or none.
        let _: CUresult = unsafe { sys::cuCtxSetCurrent(self.before) };
    }
}

/// A dimension as the `int` that kernels take.
pub(super) fn dim(op: &'static str, name: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| {
        Error::invalid(
            op,
            format!("`{name}` is {n}, it may not be above {}", i32::MAX),
        )
    })
}

/// Refuses a width whose rows are not aligned to 16 bytes: kernels access 8 elements at a time.
pub(super) fn check_width(op: &'static str, name: &'static str, width: usize) -> Result<()> {
    match width.is_multiple_of(8) {
        true => Ok(()),
        false => Err(Error::invalid(
            op,
            format!("`{name}` must be a multiple of 8, it is {width}"),
        )),
    }
}
