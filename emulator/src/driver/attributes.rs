//! What the device says about itself: an A100 or an H100, by compute capability.

use super::symbols::DRIVER_VERSION;
use super::{CUresult, E, Handle, enter, lock, put};
use crate::machine::launch::shared_limit;
use std::ffi::{c_char, c_int, c_uint};

/// Multiprocessors of the device.
pub fn multiprocessors(capability: (u32, u32)) -> u32 {
    if capability.0 >= 9 { 132 } else { 108 }
}

/// Value of a device attribute, by CUDA's number for it.
fn attribute(number: c_int, capability: (u32, u32)) -> Option<i32> {
    let hopper = capability.0 >= 9;
    Some(match number {
        1 => 1024,           // threads per block
        2 | 3 => 1024,       // block x, y
        4 => 64,             // block z
        5 => i32::MAX,       // grid x
        6 | 7 => 65535,      // grid y, z
        8 => 48 << 10,       // shared memory per block without opting in
        9 => 64 << 10,       // constant memory
        10 => 32,            // warp size
        11 => i32::MAX,      // pitch
        12 | 82 => 64 << 10, // registers per block, per multiprocessor
        13 => {
            if hopper {
                1_980_000
            } else {
                1_410_000
            }
        } // clock, kHz
        14 => 512,           // texture alignment
        15 => 1,             // copy and execute at once
        16 => multiprocessors(capability) as i32,
        17 => 0,           // kernel timeout
        18 => 0,           // integrated
        19 => 1,           // can map host memory
        20 => 0,           // compute mode: default
        31 => 1,           // concurrent kernels
        32 => 0,           // ECC
        33 | 34 | 50 => 0, // PCI ids
        35 => 0,           // TCC
        36 => {
            if hopper {
                2_619_000
            } else {
                1_593_000
            }
        } // memory clock, kHz
        37 => 5120,        // memory bus width
        38 => {
            if hopper {
                50 << 20
            } else {
                40 << 20
            }
        } // L2
        39 => 2048,        // threads per multiprocessor
        40 => 2,           // copy engines
        41 => 1,           // unified addressing
        75 => capability.0 as i32,
        76 => capability.1 as i32,
        78 => 1,      // stream priorities
        79 | 80 => 1, // L1 caches
        81 => {
            if hopper {
                228 << 10
            } else {
                164 << 10
            }
        } // shared per multiprocessor
        83 => 1,      // managed memory
        84 | 85 => 0, // multi-GPU board
        86 => 0,      // native host atomics
        87 => 2,      // single to double ratio
        88 | 89 | 100 | 101 => 0, // pageable and concurrent managed access
        90 => 0,      // compute preemption
        91 => 0,      // host pointer for registered memory
        95 => 1,      // cooperative launch
        97 => shared_limit(capability) as i32, // shared memory per block with opting in
        99 => 1,      // host registration
        106 => 32,    // blocks per multiprocessor
        111 => 1 << 10, // reserved shared memory
        115 => 1,     // memory pools
        _ => return None,
    })
}

/// # Safety
/// As in CUDA: `value` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    number: c_int,
    device: c_int,
) -> CUresult {
    enter(|| {
        check(device)?;
        let capability = lock().device.config.capability;
        // Properties that CUDA lists and this device lacks are 0.
        let v = attribute(number, capability).unwrap_or(0);
        // SAFETY: the caller's.
        unsafe { put(value, v) }
    })
}

fn check(device: c_int) -> Result<(), E> {
    if device == 0 {
        Ok(())
    } else {
        Err(E::InvalidDevice)
    }
}

/// Starts the driver. Flags must be 0.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> CUresult {
    enter(|| {
        if flags != 0 {
            return Err(E::InvalidValue);
        }
        lock().initialised = true;
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `version` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    // SAFETY: the caller's.
    enter(|| unsafe { put(version, DRIVER_VERSION) })
}

/// # Safety
/// As in CUDA: `device` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> CUresult {
    enter(|| {
        if !lock().initialised {
            return Err(E::NotInitialized);
        }
        check(ordinal)?;
        // SAFETY: the caller's.
        unsafe { put(device, 0) }
    })
}

/// # Safety
/// As in CUDA: `count` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
    // SAFETY: the caller's.
    enter(|| unsafe { put(count, 1) })
}

/// # Safety
/// As in CUDA: `name` is valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> CUresult {
    enter(|| {
        check(device)?;
        if name.is_null() || len <= 0 {
            return Err(E::InvalidValue);
        }
        let (major, minor) = lock().device.config.capability;
        let text = format!("cuda-emulator sm_{major}{minor}");
        let n = text.len().min(len as usize - 1);
        // SAFETY: the caller gives `len` bytes and n < len.
        unsafe {
            name.cast::<u8>().copy_from(text.as_ptr(), n);
            name.add(n).write(0);
        }
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `uuid` is valid for 16 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) -> CUresult {
    enter(|| {
        check(device)?;
        // SAFETY: the caller's.
        unsafe { put(uuid, *b"cuda-emulator\0\0\0") }
    })
}

/// # Safety
/// As [`cuDeviceGetUuid`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuDeviceGetUuid(uuid, device) }
}

/// # Safety
/// As in CUDA: `bytes` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> CUresult {
    enter(|| {
        check(device)?;
        // SAFETY: the caller's.
        unsafe { put(bytes, lock().device.config.memory as usize) }
    })
}

/// # Safety
/// As in CUDA: both are valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceComputeCapability(
    major: *mut c_int,
    minor: *mut c_int,
    device: c_int,
) -> CUresult {
    enter(|| {
        check(device)?;
        let capability = lock().device.config.capability;
        // SAFETY: the caller's.
        unsafe {
            put(major, capability.0 as c_int)?;
            put(minor, capability.1 as c_int)
        }
    })
}

/// # Safety
/// As in CUDA: `pool` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) -> CUresult {
    enter(|| {
        check(device)?;
        // SAFETY: the caller's.
        unsafe { put(pool, super::memory::DEFAULT_POOL) }
    })
}

/// # Safety
/// As in CUDA: `pool` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetMemPool(pool: *mut Handle, device: c_int) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuDeviceGetDefaultMemPool(pool, device) }
}
