//! Memory, copies, fills.

use super::{CUdeviceptr, CUresult, E, Handle, State, Work, error, put, put_if, with, within};
use std::ffi::{c_int, c_uint, c_void};

/// Handle of the pool that every device has.
pub const DEFAULT_POOL: Handle = 0x10;

impl State {
    fn allocate(&mut self, context: Handle, bytes: usize) -> Result<CUdeviceptr, E> {
        let at = self
            .device
            .alloc(bytes as u64)
            .map_err(|e| error::refuse(E::OutOfMemory, e))?;
        self.allocations.insert(at, context);
        Ok(at)
    }

    /// Work of a call that is done when it returns: it is the legacy stream's.
    fn at_once(&mut self, context: Handle, what: &str, work: Vec<Work>) -> Result<(), E> {
        self.legacy_use(context)?;
        self.unsafe_call(what)?;
        work.iter().try_for_each(|work| self.perform(work, false))
    }

    fn enqueue(&mut self, stream: Handle, work: Vec<Work>) -> Result<(), E> {
        let stream = self.use_stream(stream)?;
        let mut work = work.into_iter();
        work.try_for_each(|work| self.submit(stream, work))
    }
}

/// # Safety
/// As in CUDA: `address` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) -> CUresult {
    within(|s, context| {
        s.unsafe_call("cuMemAlloc")?;
        if bytes == 0 {
            return Err(E::InvalidValue);
        }
        let at = s.allocate(context, bytes)?;
        // SAFETY: the caller's.
        unsafe { put(address, at) }
    })
}

/// # Safety
/// As in CUDA: `address` and `pitch` are valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocPitch_v2(
    address: *mut CUdeviceptr,
    pitch: *mut usize,
    width: usize,
    height: usize,
    _element: c_uint,
) -> CUresult {
    let padded = width.next_multiple_of(512);
    let Some(bytes) = padded.checked_mul(height) else {
        return E::InvalidValue as CUresult;
    };
    // SAFETY: the caller's.
    let result = unsafe { cuMemAlloc_v2(address, bytes) };
    if result != 0 {
        return result;
    }
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(pitch, padded) })
}

/// Frees device memory.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    within(|s, context| {
        s.unsafe_call("cuMemFree")?;
        if address == 0 {
            return Ok(());
        }
        if s.allocations.get(&address).is_some_and(|c| *c != context) || s.freed_by_graph(address) {
            let why = format!("free of {address:#x}, which another context or a graph must free");
            return Err(error::refuse(E::InvalidValue, why));
        }
        s.free(address)
    })
}

/// # Safety
/// As in CUDA: `address` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(
    address: *mut CUdeviceptr,
    bytes: usize,
    stream: Handle,
) -> CUresult {
    with(|s| {
        let stream = s.use_stream(stream)?;
        if bytes == 0 {
            return Err(E::InvalidValue);
        }
        let context = s.stream(stream)?.context;
        let at = match s.stream(stream)?.capture {
            Some(_) => s.reserve(stream, bytes)?,
            None => s.allocate(context, bytes)?,
        };
        // SAFETY: the caller's.
        unsafe { put(address, at) }
    })
}

/// # Safety
/// As [`cuMemAllocAsync`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync(
    address: *mut CUdeviceptr,
    bytes: usize,
    _pool: Handle,
    stream: Handle,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuMemAllocAsync(address, bytes, stream) }
}

/// Frees device memory when the stream gets there.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: CUdeviceptr, stream: Handle) -> CUresult {
    with(|s| {
        let stream = s.use_stream(stream)?;
        if s.stream(stream)?.capture.is_some() {
            return s.capture_free(stream, address);
        }
        if s.freed_by_graph(address) {
            let why = format!("free of {address:#x}, which its graph frees");
            return Err(error::refuse(E::InvalidValue, why));
        }
        s.submit(stream, Work::Free(address))
    })
}

/// # Safety
/// As in CUDA: both are valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    within(|s, _| {
        let all = s.device.config.memory;
        // SAFETY: the caller's.
        unsafe {
            put(free, (all - s.device.memory().used().min(all)) as usize)?;
            put(total, all as usize)
        }
    })
}

/// # Safety
/// As in CUDA: `base` and `size` are null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut CUdeviceptr,
    size: *mut usize,
    address: CUdeviceptr,
) -> CUresult {
    within(|s, _| {
        let (start, bytes) = s.device.memory().range_of(address).ok_or(E::NotFound)?;
        // SAFETY: the caller's.
        unsafe {
            put_if(base, start);
            put_if(size, bytes as usize);
        }
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `pointer` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    pointer: *mut *mut c_void,
    bytes: usize,
    _flags: c_uint,
) -> CUresult {
    within(|s, _| {
        s.unsafe_call("cuMemHostAlloc")?;
        let mut memory = vec![0u128; bytes.div_ceil(16).max(1)].into_boxed_slice();
        let at = memory.as_mut_ptr().cast::<u8>();
        s.host.insert(at as usize, memory);
        // SAFETY: the boxed slice lives in `host` until it is freed, which unregisters it.
        unsafe { s.device.memory_mut().register_host(at, bytes) };
        // SAFETY: the caller's.
        unsafe { put(pointer, at.cast()) }
    })
}

/// # Safety
/// As in CUDA: `pointer` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(pointer: *mut *mut c_void, bytes: usize) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuMemHostAlloc(pointer, bytes, 0) }
}

/// Frees host memory that the driver made.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(pointer: *mut c_void) -> CUresult {
    within(|s, _| {
        s.unsafe_call("cuMemFreeHost")?;
        s.device.memory_mut().unregister_host(pointer.cast());
        s.host
            .remove(&(pointer as usize))
            .map(|_| ())
            .ok_or(E::InvalidValue)
    })
}

/// # Safety
/// As in CUDA: `address` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    address: *mut CUdeviceptr,
    pointer: *mut c_void,
    _flags: c_uint,
) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(address, pointer as u64) })
}

/// # Safety
/// As in CUDA: `flags` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetFlags(flags: *mut c_uint, _pointer: *mut c_void) -> CUresult {
    // SAFETY: the caller's.
    within(|_, _| unsafe { put(flags, 2) })
}

/// # Safety
/// As in CUDA: `pointer` is valid for `bytes` until it is unregistered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(
    pointer: *mut c_void,
    bytes: usize,
    _flags: c_uint,
) -> CUresult {
    within(|s, _| {
        s.unsafe_call("cuMemHostRegister")?;
        // SAFETY: the caller's.
        unsafe { s.device.memory_mut().register_host(pointer.cast(), bytes) };
        Ok(())
    })
}

/// Ends [`cuMemHostRegister_v2`].
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(pointer: *mut c_void) -> CUresult {
    within(|s, _| {
        s.unsafe_call("cuMemHostUnregister")?;
        s.device
            .memory_mut()
            .unregister_host(pointer.cast())
            .map(|_| ())
            .ok_or(E::InvalidValue)
    })
}

/// Copies between two places of one kind or another, in all of CUDA's spellings.
macro_rules! copies {
    ($($name:ident($to:ty, $from:ty), $async:ident;)*) => {$(
        /// Copies `bytes`.
        ///
        /// # Safety
        /// As in CUDA: host pointers are valid for `bytes`.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(to: $to, from: $from, bytes: usize) -> CUresult {
            let work = Work::Copy { to: to as u64, from: from as u64, len: bytes };
            within(|s, context| s.at_once(context, "a synchronous copy", vec![work]))
        }

        /// Copies `bytes` when the stream gets there.
        ///
        /// # Safety
        /// As in CUDA: host pointers are valid for `bytes` until then.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $async(to: $to, from: $from, bytes: usize, stream: Handle) -> CUresult {
            let work = Work::Copy { to: to as u64, from: from as u64, len: bytes };
            within(|s, _| s.enqueue(stream, vec![work]))
        }
    )*};
}

copies! {
    cuMemcpyHtoD_v2(CUdeviceptr, *const c_void), cuMemcpyHtoDAsync_v2;
    cuMemcpyDtoH_v2(*mut c_void, CUdeviceptr), cuMemcpyDtoHAsync_v2;
    cuMemcpyDtoD_v2(CUdeviceptr, CUdeviceptr), cuMemcpyDtoDAsync_v2;
    cuMemcpy(CUdeviceptr, CUdeviceptr), cuMemcpyAsync;
}

/// CUDA_MEMCPY2D.
#[repr(C)]
#[allow(missing_docs)] // the fields are CUDA's own
pub struct Copy2d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: c_int,
    pub src_host: *const c_void,
    pub src_device: CUdeviceptr,
    pub src_array: *mut c_void,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: c_int,
    pub dst_host: *mut c_void,
    pub dst_device: CUdeviceptr,
    pub dst_array: *mut c_void,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

/// The copies of the rows.
///
/// # Safety
/// `copy` is null or valid.
unsafe fn rows(copy: *const Copy2d) -> Result<Vec<Work>, E> {
    // SAFETY: the caller's.
    let c = unsafe { copy.as_ref() }.ok_or(E::InvalidValue)?;
    let side = |kind, host: u64, device: u64| match kind {
        1 => Ok(host),
        2 | 4 => Ok(device),
        _ => Err(error::refuse(
            E::NotSupported,
            "copies of arrays are not implemented",
        )),
    };
    let from = side(c.src_type, c.src_host as u64, c.src_device)?;
    let to = side(c.dst_type, c.dst_host as u64, c.dst_device)?;
    let row = |row| Work::Copy {
        from: from + ((c.src_y + row) * c.src_pitch + c.src_x) as u64,
        to: to + ((c.dst_y + row) * c.dst_pitch + c.dst_x) as u64,
        len: c.width,
    };
    Ok((0..c.height).map(row).collect())
}

/// # Safety
/// As in CUDA: `copy` and the host memory it names are valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2d, stream: Handle) -> CUresult {
    // SAFETY: the caller's.
    within(|s, _| s.enqueue(stream, unsafe { rows(copy) }?))
}

/// # Safety
/// As [`cuMemcpy2DAsync_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2D_v2(copy: *const Copy2d) -> CUresult {
    // SAFETY: the caller's.
    within(|s, context| s.at_once(context, "a synchronous copy", unsafe { rows(copy) }?))
}

/// # Safety
/// As [`cuMemcpy2DAsync_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DUnaligned_v2(copy: *const Copy2d) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuMemcpy2D_v2(copy) }
}

/// The fills of `height` rows of `width` elements.
fn filled(to: u64, pitch: usize, pattern: &[u8], width: usize, height: usize) -> Vec<Work> {
    let row = |row| Work::Fill {
        to: to + (row * pitch) as u64,
        pattern: pattern.to_vec(),
        count: width,
    };
    (0..height).map(row).collect()
}

/// Fills, linear and by rows.
macro_rules! fills {
    ($($name:ident, $async:ident, $rows:ident, $rows_async:ident, $value:ty;)*) => {$(
        /// Fills `count` elements.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(to: CUdeviceptr, value: $value, count: usize) -> CUresult {
            let work = filled(to, 0, &value.to_le_bytes(), count, 1);
            within(|s, context| s.at_once(context, "a synchronous fill", work))
        }

        /// Fills `count` elements when the stream gets there.
        #[unsafe(no_mangle)]
        pub extern "C" fn $async(to: CUdeviceptr, value: $value, count: usize, stream: Handle) -> CUresult {
            within(|s, _| s.enqueue(stream, filled(to, 0, &value.to_le_bytes(), count, 1)))
        }

        /// Fills `height` rows of `width` elements.
        #[unsafe(no_mangle)]
        pub extern "C" fn $rows(
            to: CUdeviceptr,
            pitch: usize,
            value: $value,
            width: usize,
            height: usize,
        ) -> CUresult {
            let work = filled(to, pitch, &value.to_le_bytes(), width, height);
            within(|s, context| s.at_once(context, "a synchronous fill", work))
        }

        /// Fills `height` rows of `width` elements when the stream gets there.
        #[unsafe(no_mangle)]
        pub extern "C" fn $rows_async(
            to: CUdeviceptr,
            pitch: usize,
            value: $value,
            width: usize,
            height: usize,
            stream: Handle,
        ) -> CUresult {
            within(|s, _| s.enqueue(stream, filled(to, pitch, &value.to_le_bytes(), width, height)))
        }
    )*};
}

fills! {
    cuMemsetD8_v2, cuMemsetD8Async, cuMemsetD2D8_v2, cuMemsetD2D8Async, u8;
    cuMemsetD16_v2, cuMemsetD16Async, cuMemsetD2D16_v2, cuMemsetD2D16Async, u16;
    cuMemsetD32_v2, cuMemsetD32Async, cuMemsetD2D32_v2, cuMemsetD2D32Async, u32;
}

/// # Safety
/// As in CUDA: `pool` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolCreate(
    pool: *mut Handle,
    _properties: *const c_void,
) -> CUresult {
    with(|s| {
        let handle = s.handle();
        s.pools.push(handle);
        // SAFETY: the caller's.
        unsafe { put(pool, handle) }
    })
}

/// Destroys a pool; allocations of it stay, as all pools are one.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolDestroy(pool: Handle) -> CUresult {
    with(|s| {
        let at = s
            .pools
            .iter()
            .position(|p| *p == pool)
            .ok_or(E::InvalidHandle)?;
        s.pools.remove(at);
        Ok(())
    })
}

/// Thresholds change nothing here: freed memory is never kept.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(
    _pool: Handle,
    _attribute: c_int,
    _value: *mut c_void,
) -> CUresult {
    with(|_| Ok(()))
}

/// Nothing to give back.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(_pool: Handle, _keep: usize) -> CUresult {
    with(|_| Ok(()))
}

/// # Safety
/// As in CUDA: `data` is valid for the attribute's type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    data: *mut c_void,
    attribute: c_int,
    address: CUdeviceptr,
) -> CUresult {
    within(|s, _| {
        let (start, size) = s.device.memory().range_of(address).ok_or(E::InvalidValue)?;
        let device = s.on_device(address);
        // SAFETY: the caller's; CUDA fixes the type of each attribute.
        unsafe {
            match attribute {
                2 => put(data.cast::<c_uint>(), if device { 2 } else { 1 }),
                3 => put(data.cast::<u64>(), address),
                9 => put(data.cast::<c_int>(), 0),
                11 => put(data.cast::<u64>(), start),
                12 => put(data.cast::<usize>(), size as usize),
                _ => Err(E::NotSupported),
            }
        }
    })
}
