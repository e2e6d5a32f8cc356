//! Memory, copies, fills.

use super::{CUdeviceptr, CUresult, E, Handle, Work, error, put, put_if, with};
use std::ffi::{c_int, c_uint, c_void};

/// Handle of the pool that every device has.
pub const DEFAULT_POOL: Handle = 0x10;

/// # Safety
/// As in CUDA: `address` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) -> CUresult {
    with(|s| {
        if bytes == 0 {
            return Err(E::InvalidValue);
        }
        let at = s
            .device
            .alloc(bytes as u64)
            .map_err(|e| error::refuse(E::OutOfMemory, e))?;
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
    with(|_| unsafe { put(pitch, padded) })
}

/// Frees device memory.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    with(|s| {
        if address == 0 || s.device.free(address) {
            return Ok(());
        }
        Err(error::refuse(
            E::InvalidValue,
            format!("free of {address:#x}, which is not an allocation"),
        ))
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
    let known = with(|s| {
        s.streams
            .contains_key(&stream)
            .then_some(())
            .ok_or(E::InvalidHandle)
    });
    if known != 0 {
        return known;
    }
    // SAFETY: the same contract. Allocations while capturing are made once, at the capture.
    unsafe { cuMemAlloc_v2(address, bytes) }
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
    with(|s| s.submit(stream, Work::Free(address)))
}

/// # Safety
/// As in CUDA: both are valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
    with(|s| {
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
    with(|s| {
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
    with(|s| {
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
    with(|s| {
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
    with(|_| unsafe { put(address, pointer as u64) })
}

/// # Safety
/// As in CUDA: `flags` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetFlags(flags: *mut c_uint, _pointer: *mut c_void) -> CUresult {
    // SAFETY: the caller's.
    with(|_| unsafe { put(flags, 2) })
}

/// # Safety
/// As in CUDA: `pointer` is valid for `bytes` until it is unregistered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(
    pointer: *mut c_void,
    bytes: usize,
    _flags: c_uint,
) -> CUresult {
    with(|s| {
        // SAFETY: the caller's.
        unsafe { s.device.memory_mut().register_host(pointer.cast(), bytes) };
        Ok(())
    })
}

/// Ends [`cuMemHostRegister_v2`].
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(pointer: *mut c_void) -> CUresult {
    with(|s| {
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
            with(|s| s.submit(0, Work::Copy { to: to as u64, from: from as u64, len: bytes }))
        }

        /// Copies `bytes` when the stream gets there.
        ///
        /// # Safety
        /// As in CUDA: host pointers are valid for `bytes` until then.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $async(to: $to, from: $from, bytes: usize, stream: Handle) -> CUresult {
            with(|s| s.submit(stream, Work::Copy { to: to as u64, from: from as u64, len: bytes }))
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

/// # Safety
/// As in CUDA: `copy` and the host memory it names are valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2d, stream: Handle) -> CUresult {
    with(|s| {
        // SAFETY: the caller's.
        let Some(c) = (unsafe { copy.as_ref() }) else {
            return Err(E::InvalidValue);
        };
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
        for row in 0..c.height {
            let from = from + ((c.src_y + row) * c.src_pitch + c.src_x) as u64;
            let to = to + ((c.dst_y + row) * c.dst_pitch + c.dst_x) as u64;
            s.submit(
                stream,
                Work::Copy {
                    to,
                    from,
                    len: c.width,
                },
            )?;
        }
        Ok(())
    })
}

/// # Safety
/// As [`cuMemcpy2DAsync_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2D_v2(copy: *const Copy2d) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuMemcpy2DAsync_v2(copy, 0) }
}

/// # Safety
/// As [`cuMemcpy2DAsync_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DUnaligned_v2(copy: *const Copy2d) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuMemcpy2DAsync_v2(copy, 0) }
}

/// Fills, linear and by rows.
macro_rules! fills {
    ($($name:ident, $async:ident, $rows:ident, $rows_async:ident, $value:ty;)*) => {$(
        /// Fills `count` elements.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(to: CUdeviceptr, value: $value, count: usize) -> CUresult {
            $async(to, value, count, 0)
        }

        /// Fills `count` elements when the stream gets there.
        #[unsafe(no_mangle)]
        pub extern "C" fn $async(to: CUdeviceptr, value: $value, count: usize, stream: Handle) -> CUresult {
            with(|s| {
                let pattern = value.to_le_bytes().to_vec();
                s.submit(stream, Work::Fill { to, pattern, count })
            })
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
            $rows_async(to, pitch, value, width, height, 0)
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
            with(|s| {
                for row in 0..height {
                    let pattern = value.to_le_bytes().to_vec();
                    let to = to + (row * pitch) as u64;
                    s.submit(stream, Work::Fill { to, pattern, count: width })?;
                }
                Ok(())
            })
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
    with(|s| {
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
