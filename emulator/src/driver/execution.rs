//! Modules, functions, launches, occupancy.

use super::attributes::multiprocessors;
use super::{
    CUdeviceptr, CUresult, E, Function, Handle, State, Work, enter, error, put, put_if, string,
    within,
};
use crate::device::Module;
use crate::machine::code::Kernel;
use crate::machine::launch::shared_limit;
use std::ffi::{c_char, c_int, c_uint, c_void};

impl State {
    fn load(&mut self, context: Handle, text: &str) -> Result<Handle, E> {
        self.unsafe_call("loading a module")?;
        let module = self
            .device
            .load(text)
            .map_err(|e| error::refuse(E::InvalidPtx, e))?;
        let handle = self.handle();
        self.modules.insert(handle, (context, module));
        Ok(handle)
    }

    /// A module of the current context.
    fn module(&self, context: Handle, module: Handle) -> Result<&Module, E> {
        let of_context = self.modules.get(&module).filter(|(c, _)| *c == context);
        of_context.map(|(_, m)| m).ok_or(E::InvalidHandle)
    }

    /// A function of the current context.
    fn function(&mut self, context: Handle, function: Handle) -> Result<&mut Function, E> {
        let found = self.functions.get_mut(&function).ok_or(E::InvalidHandle)?;
        let of_context = self.modules.get(&found.module);
        of_context
            .filter(|(c, _)| *c == context)
            .ok_or(E::InvalidHandle)?;
        Ok(found)
    }

    fn launch(
        &mut self,
        context: Handle,
        function: Handle,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> Result<(), E> {
        if !extra.is_null() {
            let why = "parameters through `extra` are not implemented: use kernelParams";
            return Err(error::refuse(E::NotSupported, why));
        }
        let stream = self.use_stream(stream)?;
        if self.stream(stream)?.context != context {
            let why = "a kernel is launched on a stream of another context than the current";
            return Err(error::refuse(E::InvalidHandle, why));
        }
        let function = self.function(context, function)?;
        let kernel = function.kernel.clone();
        if shared > function.max_dynamic_shared {
            let why = format!(
                "{}: {shared} bytes of dynamic shared memory, allowed are {}: raise it with cuFuncSetAttribute",
                kernel.name, function.max_dynamic_shared
            );
            return Err(error::refuse(E::InvalidValue, why));
        }
        let mut bytes = vec![0u8; kernel.param_size as usize];
        for (i, p) in kernel.params.iter().enumerate() {
            if params.is_null() {
                return Err(E::InvalidValue);
            }
            // SAFETY: CUDA asks for one pointer a parameter, valid for the parameter's size.
            unsafe {
                let from = (*params.add(i)).cast::<u8>();
                if from.is_null() {
                    return Err(E::InvalidValue);
                }
                bytes
                    .as_mut_ptr()
                    .add(p.offset as usize)
                    .copy_from(from, p.size as usize);
            }
        }
        self.submit(
            stream,
            Work::Launch {
                kernel,
                grid,
                block,
                shared,
                params: bytes,
            },
        )
    }
}

/// # Safety
/// As in CUDA: `module` is valid for writing, `image` is NUL-terminated PTX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> CUresult {
    within(|s, context| {
        if image.is_null() {
            return Err(E::InvalidValue);
        }
        // SAFETY: every kind of image has at least four bytes, and PTX a NUL after them.
        let head = unsafe { image.cast::<[u8; 4]>().read_unaligned() };
        if head == *b"\x7fELF" || head == 0xba55_ed50u32.to_le_bytes() {
            let why = "this image is machine code (cubin or fatbin): load PTX text instead";
            return Err(error::refuse(E::NoBinaryForGpu, why));
        }
        // SAFETY: the caller's.
        let text = unsafe { string(image.cast()) }
            .map_err(|e| error::refuse(e, "the image is not PTX text"))?;
        let handle = s.load(context, text)?;
        // SAFETY: the caller's.
        unsafe { put(module, handle) }
    })
}

/// # Safety
/// As [`cuModuleLoadData`]; options are not read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const c_void,
    _count: c_uint,
    _options: *mut c_int,
    _values: *mut *mut c_void,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuModuleLoadData(module, image) }
}

/// # Safety
/// As [`cuModuleLoadData`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadFatBinary(
    module: *mut Handle,
    image: *const c_void,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuModuleLoadData(module, image) }
}

/// # Safety
/// As in CUDA: `module` is valid for writing, `path` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(module: *mut Handle, path: *const c_char) -> CUresult {
    within(|s, context| {
        // SAFETY: the caller's.
        let path = unsafe { string(path) }?;
        let text = std::fs::read_to_string(path)
            .map_err(|e| error::refuse(E::FileNotFound, format!("{path}: {e}")))?;
        let handle = s.load(context, &text)?;
        // SAFETY: the caller's.
        unsafe { put(module, handle) }
    })
}

/// Unloads a module and its variables.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: Handle) -> CUresult {
    within(|s, context| {
        s.unsafe_call("unloading a module")?;
        s.module(context, module)?;
        let (_, gone) = s.modules.remove(&module).ok_or(E::InvalidHandle)?;
        s.functions.retain(|_, f| f.module != module);
        s.device.unload(&gone);
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `function` is valid for writing, `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> CUresult {
    within(|s, context| {
        // SAFETY: the caller's.
        let name = unsafe { string(name) }?;
        let kernel = s.module(context, module)?.kernel(name);
        let kernel = kernel.ok_or(E::NotFound)?.clone();
        let handle = s.handle();
        let max_dynamic_shared = (48u32 << 10).saturating_sub(kernel.shared);
        s.functions.insert(
            handle,
            Function {
                kernel,
                module,
                max_dynamic_shared,
            },
        );
        // SAFETY: the caller's.
        unsafe { put(function, handle) }
    })
}

/// # Safety
/// As in CUDA: `address` and `bytes` are null or valid for writing, `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut CUdeviceptr,
    bytes: *mut usize,
    module: Handle,
    name: *const c_char,
) -> CUresult {
    within(|s, context| {
        // SAFETY: the caller's.
        let name = unsafe { string(name) }?;
        let module = s.module(context, module)?;
        let (at, size) = module.global(name).ok_or(E::NotFound)?;
        // SAFETY: the caller's.
        unsafe {
            put_if(address, at);
            put_if(bytes, size as usize);
        }
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `value` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    function: Handle,
) -> CUresult {
    within(|s, context| {
        let capability = s.device.config.capability;
        let f = s.function(context, function)?;
        let v = match attribute {
            0 => f.kernel.max_threads.min(1024),
            1 => f.kernel.shared,
            2 | 7 => 0,
            3 => f.kernel.functions[0].local,
            // The registers of PTX are virtual; ptxas alone knows. Real kernels have at most 255.
            4 => f.kernel.virtual_registers.min(255),
            5 | 6 => capability.0 * 10 + capability.1,
            8 => f.max_dynamic_shared,
            9 => u32::MAX,
            _ => return Err(E::InvalidValue),
        };
        // SAFETY: the caller's.
        unsafe { put(value, v as c_int) }
    })
}

/// Sets how much dynamic shared memory launches may ask for; other attributes are preferences.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> CUresult {
    within(|s, context| {
        let most = shared_limit(s.device.config.capability);
        let f = s.function(context, function)?;
        match attribute {
            8 => {
                let wanted = u32::try_from(value).map_err(|_| E::InvalidValue)?;
                if wanted.saturating_add(f.kernel.shared) > most {
                    let why =
                        format!("{wanted} bytes of dynamic shared memory: the device has {most}");
                    return Err(error::refuse(E::InvalidValue, why));
                }
                f.max_dynamic_shared = wanted;
                Ok(())
            }
            9 => Ok(()),
            _ => Err(E::InvalidValue),
        }
    })
}

/// Cache preferences change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: c_uint) -> CUresult {
    within(|s, context| s.function(context, function).map(|_| ()))
}

/// Bank widths change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetSharedMemConfig(function: Handle, _config: c_uint) -> CUresult {
    within(|s, context| s.function(context, function).map(|_| ()))
}

/// # Safety
/// As in CUDA: `params` holds one valid pointer a parameter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: Handle,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CUresult {
    within(|s, context| {
        s.launch(
            context,
            function,
            [gx, gy, gz],
            [bx, by, bz],
            shared,
            stream,
            params,
            extra,
        )
    })
}

/// # Safety
/// As [`cuLaunchKernel`]. All blocks make progress together in every launch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchCooperativeKernel(
    function: Handle,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: Handle,
    params: *mut *mut c_void,
) -> CUresult {
    let extra = std::ptr::null_mut();
    // SAFETY: the same contract.
    unsafe {
        cuLaunchKernel(
            function, gx, gy, gz, bx, by, bz, shared, stream, params, extra,
        )
    }
}

/// CUlaunchConfig.
#[repr(C)]
#[allow(missing_docs)] // the fields are CUDA's own
pub struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared: c_uint,
    pub stream: Handle,
    pub attributes: *const c_void,
    pub count: c_uint,
}

/// # Safety
/// As [`cuLaunchKernel`]; `config` is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> CUresult {
    within(|s, context| {
        // SAFETY: the caller's.
        let Some(c) = (unsafe { config.as_ref() }) else {
            return Err(E::InvalidValue);
        };
        if c.count != 0 {
            return Err(error::refuse(
                E::NotSupported,
                "launch attributes are not implemented",
            ));
        }
        s.launch(
            context, function, c.grid, c.block, c.shared, c.stream, params, extra,
        )
    })
}

/// Blocks of `threads` threads and `dynamic` bytes of dynamic shared memory that fit a
/// multiprocessor: what threads and shared memory allow, without ptxas' register counts.
fn resident(kernel: &Kernel, capability: (u32, u32), threads: u32, dynamic: usize) -> u32 {
    if threads == 0 || threads > kernel.max_threads.min(1024) {
        return 0;
    }
    let by_threads = 2048 / threads.next_multiple_of(32);
    let bytes = (kernel.shared as usize + 1024).saturating_add(dynamic);
    let by_shared = (shared_limit(capability) as usize + 1024) / bytes;
    by_threads.min(32).min(by_shared as u32)
}

/// # Safety
/// As in CUDA: `blocks` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: *mut c_int,
    function: Handle,
    threads: c_int,
    shared: usize,
    _flags: c_uint,
) -> CUresult {
    within(|s, context| {
        let capability = s.device.config.capability;
        let f = s.function(context, function)?;
        let threads = u32::try_from(threads).map_err(|_| E::InvalidValue)?;
        if threads == 0 {
            return Err(E::InvalidValue);
        }
        let n = resident(&f.kernel, capability, threads, shared);
        // SAFETY: the caller's.
        unsafe { put(blocks, n as c_int) }
    })
}

/// # Safety
/// As [`cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    function: Handle,
    threads: c_int,
    shared: usize,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe {
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0)
    }
}

/// # Safety
/// As in CUDA: `bytes` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: *mut usize,
    function: Handle,
    blocks: c_int,
    threads: c_int,
) -> CUresult {
    within(|s, context| {
        let capability = s.device.config.capability;
        let kernel = &s.function(context, function)?.kernel;
        let count = |n| {
            u32::try_from(n)
                .ok()
                .filter(|n| *n > 0)
                .ok_or(E::InvalidValue)
        };
        let (blocks, threads) = (count(blocks)?, count(threads)?);
        if resident(kernel, capability, threads, 0) < blocks {
            return Err(E::InvalidValue);
        }
        let share = (shared_limit(capability) + 1024) / blocks;
        // SAFETY: the caller's.
        unsafe { put(bytes, (share - 1024 - kernel.shared) as usize) }
    })
}

/// The largest block with which the most threads are at work, and how many blocks fill the device.
///
/// # Safety
/// As in CUDA: `grid` and `block` are valid for writing; `shared_of`, if given, may be called with
/// any block size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
    shared: usize,
    limit: c_int,
    _flags: c_uint,
) -> CUresult {
    let mut found = None;
    let code = within(|s, context| {
        let kernel = &s.function(context, function)?.kernel;
        found = Some((kernel.clone(), s.device.config.capability));
        Ok(())
    });
    let Some((kernel, capability)) = found else {
        return code;
    };
    // The lock is free again: `shared_of` may call the driver.
    enter(|| {
        let most = match u32::try_from(limit).map_err(|_| E::InvalidValue)? {
            0 => kernel.max_threads.min(1024),
            limit => limit.min(kernel.max_threads).min(1024),
        };
        let mut best = (0, 0);
        let mut threads = most;
        while threads > 0 {
            // SAFETY: the caller's.
            let dynamic = shared_of.map_or(shared, |f| unsafe { f(threads as c_int) });
            let blocks = resident(&kernel, capability, threads, dynamic);
            if blocks * threads > best.0 * best.1 {
                best = (blocks, threads);
            }
            threads = (threads - 1) / 32 * 32;
        }
        // SAFETY: the caller's.
        unsafe {
            put(grid, (best.0 * multiprocessors(capability)) as c_int)?;
            put(block, best.1 as c_int)
        }
    })
}

/// # Safety
/// As [`cuOccupancyMaxPotentialBlockSizeWithFlags`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSize(
    grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
    shared: usize,
    limit: c_int,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe {
        cuOccupancyMaxPotentialBlockSizeWithFlags(
            grid, block, function, shared_of, shared, limit, 0,
        )
    }
}
