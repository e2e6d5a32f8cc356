//! Contexts.

use super::symbols::DRIVER_VERSION;
use super::{CURRENT, CUresult, Context, E, Handle, State, enter, lock, put, put_if, with, within};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint};

impl State {
    fn add_context(&mut self) -> Handle {
        let handle = self.handle();
        let context = Context {
            legacy: self.add_stream(handle, 0, 0, true),
            per_thread: HashMap::new(),
        };
        self.contexts.insert(handle, context);
        handle
    }

    /// Takes all that belongs to a context with it; memory that is left has leaked.
    fn destroy(&mut self, context: Handle) -> Result<(), E> {
        self.contexts.remove(&context).ok_or(E::InvalidContext)?;
        let gone: Vec<Handle> = self
            .streams
            .values()
            .filter(|s| s.context == context)
            .filter_map(|s| s.capture)
            .collect();
        self.captures.retain(|id, _| !gone.contains(id));
        self.streams.retain(|_, s| s.context != context);
        for stream in self.streams.values_mut() {
            stream.capture = stream.capture.filter(|id| !gone.contains(id));
        }
        self.events.retain(|_, e| e.context != context);
        self.graphs.retain(|_, g| g.context != context);
        self.executables.retain(|_, e| e.context != context);
        let modules = self.modules.extract_if(|_, (c, _)| *c == context);
        for (handle, (_, module)) in modules.collect::<Vec<_>>() {
            self.functions.retain(|_, f| f.module != handle);
            self.device.unload(&module);
        }
        let sizes: HashMap<u64, u64> = self.device.memory().live().collect();
        let mut left = Vec::new();
        for (address, _) in self.allocations.iter().filter(|(_, c)| **c == context) {
            left.push((*address, sizes.get(address).copied().unwrap_or(0)));
        }
        for (address, memory) in &self.graph_memory {
            if memory.context == context && memory.live {
                left.push((*address, memory.bytes as u64));
            }
        }
        for (address, bytes) in left {
            if self.device.config.checks.leaks {
                eprintln!("cuda-emulator: leak: {bytes} bytes at {address:#x} were never freed");
                self.leaks.push((address, bytes));
            }
            self.free(address)?;
        }
        self.sweep_graph_memory();
        // A kernel's error dies with its context.
        self.failed = None;
        Ok(())
    }
}

/// # Safety
/// As in CUDA: `context` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> CUresult {
    with(|s| {
        if device != 0 {
            return Err(E::InvalidDevice);
        }
        let handle = match s.primary {
            Some(handle) => handle,
            None => {
                let handle = s.add_context();
                s.primary = Some(handle);
                handle
            }
        };
        s.primary_uses += 1;
        // SAFETY: the caller's.
        unsafe { put(context, handle) }
    })
}

/// Gives up one use of the primary context; the last destroys it.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> CUresult {
    enter(|| {
        let mut s = lock();
        if device != 0 {
            return Err(E::InvalidDevice);
        }
        let handle = s.primary.ok_or(E::InvalidContext)?;
        s.primary_uses -= 1;
        if s.primary_uses == 0 {
            s.primary = None;
            return s.destroy(handle);
        }
        Ok(())
    })
}

/// Destroys the primary context.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxReset_v2(device: c_int) -> CUresult {
    enter(|| {
        let mut s = lock();
        if device != 0 {
            return Err(E::InvalidDevice);
        }
        s.primary_uses = 0;
        match s.primary.take() {
            Some(handle) => s.destroy(handle),
            None => Ok(()),
        }
    })
}

/// Flags change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxSetFlags_v2(_device: c_int, _flags: c_uint) -> CUresult {
    0
}

/// # Safety
/// As in CUDA: both are valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(
    _device: c_int,
    flags: *mut c_uint,
    active: *mut c_int,
) -> CUresult {
    enter(|| {
        let on = lock().primary.is_some() as c_int;
        // SAFETY: the caller's.
        unsafe {
            put(flags, 0)?;
            put(active, on)
        }
    })
}

/// # Safety
/// As in CUDA: `context` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(
    context: *mut Handle,
    _flags: c_uint,
    device: c_int,
) -> CUresult {
    with(|s| {
        if device != 0 {
            return Err(E::InvalidDevice);
        }
        let handle = s.add_context();
        CURRENT.with_borrow_mut(|c| c.push(handle));
        // SAFETY: the caller's.
        unsafe { put(context, handle) }
    })
}

/// Destroys a context.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(context: Handle) -> CUresult {
    enter(|| {
        lock().destroy(context)?;
        CURRENT.with_borrow_mut(|c| {
            if c.last() == Some(&context) {
                c.pop();
            }
        });
        Ok(())
    })
}

/// Makes a context current, on top of the present one.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> CUresult {
    enter(|| {
        if !lock().contexts.contains_key(&context) {
            return Err(E::InvalidContext);
        }
        CURRENT.with_borrow_mut(|c| c.push(context));
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `context` is null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> CUresult {
    enter(|| {
        let top = CURRENT.with_borrow_mut(Vec::pop).ok_or(E::InvalidContext)?;
        // SAFETY: the caller's.
        unsafe { put_if(context, top) };
        Ok(())
    })
}

/// Replaces the current context; 0 for none.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> CUresult {
    enter(|| {
        if context != 0 && !lock().contexts.contains_key(&context) {
            return Err(E::InvalidContext);
        }
        CURRENT.with_borrow_mut(|c| {
            c.pop();
            if context != 0 {
                c.push(context);
            }
        });
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `context` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> CUresult {
    let top = CURRENT.with_borrow(|c| c.last().copied().unwrap_or(0));
    // SAFETY: the caller's.
    enter(|| unsafe { put(context, top) })
}

/// # Safety
/// As in CUDA: `device` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(device, 0) })
}

/// # Safety
/// As in CUDA: `version` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetApiVersion(_context: Handle, version: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    enter(|| unsafe { put(version, DRIVER_VERSION as c_uint) })
}

/// # Safety
/// As in CUDA: `flags` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetFlags(flags: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(flags, 0) })
}

/// Waits for all work: gives the error that a kernel left.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> CUresult {
    within(|s, context| s.context_is_idle(context))
}

/// # Safety
/// As in CUDA: both are null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(
    least: *mut c_int,
    greatest: *mut c_int,
) -> CUresult {
    within(|_, _| {
        // SAFETY: the caller's.
        unsafe {
            put_if(least, 0);
            put_if(greatest, -5);
        }
        Ok(())
    })
}

/// Cache preferences change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCacheConfig(_config: c_uint) -> CUresult {
    within(|_, _| Ok(()))
}

/// # Safety
/// As in CUDA: `config` is valid for writing. There is no preference to be had.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCacheConfig(config: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(config, 0) })
}

/// Bank widths change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetSharedMemConfig(_config: c_uint) -> CUresult {
    within(|_, _| Ok(()))
}

/// # Safety
/// As in CUDA: `config` is valid for writing. Banks are four bytes wide.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetSharedMemConfig(config: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(config, 1) })
}

/// Stack and heap limits change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetLimit(_limit: c_uint, _value: usize) -> CUresult {
    within(|_, _| Ok(()))
}
