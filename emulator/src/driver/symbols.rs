//! `cuGetProcAddress`: the driver's functions by name, as CUDA's runtime and newer bindings ask.

use super::{CUresult, E, enter, error, put, put_if, string};
use libloading::os::unix::{Library, RTLD_NOW};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

/// Version of CUDA that this driver is: 1000 major + 10 minor.
pub const DRIVER_VERSION: c_int = 12000;

/// Functions that CUDA's headers rename otherwise than by the newest suffix that is exported here:
/// name, first version of CUDA of this meaning, symbol.
const RENAMED: [(&str, c_int, &str); 8] = [
    ("cuCtxCreate", 3020, "cuCtxCreate_v2"),
    ("cuCtxCreate", 11040, "cuCtxCreate_v3"),
    ("cuDeviceGetUuid", 9020, "cuDeviceGetUuid"),
    ("cuDeviceGetUuid", 11040, "cuDeviceGetUuid_v2"),
    ("cuEventElapsedTime", 2000, "cuEventElapsedTime"),
    ("cuGetProcAddress", 11030, "cuGetProcAddress"),
    ("cuGetProcAddress", 12000, "cuGetProcAddress_v2"),
    ("cuGraphInstantiate", 12000, "cuGraphInstantiateWithFlags"),
];

/// Why a symbol has no address; CUdriverProcAddressQueryResult.
#[derive(Clone, Copy)]
enum Missing {
    Symbol = 1,
    Version = 2,
}

/// The library, or program, that this code is in: its table of symbols is the list of what exists.
fn own_library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            // SAFETY: all fields are plain data for which zero is a value.
            let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
            // SAFETY: any address may be asked about, and `info` is valid for writing.
            let found = unsafe { libc::dladdr(own_library as *const c_void, &mut info) };
            if found == 0 || info.dli_fname.is_null() {
                return None;
            }
            // SAFETY: the loader's string lives as long as the library, which holds this code.
            let path = unsafe { CStr::from_ptr(info.dli_fname) };
            let path = OsStr::from_bytes(path.to_bytes());
            // SAFETY: it is loaded already, so that no initialiser runs.
            unsafe { Library::open(Some(path), RTLD_NOW | libc::RTLD_NOLOAD) }.ok()
        })
        .as_ref()
}

fn find(name: &str, version: c_int) -> Result<*mut c_void, Missing> {
    // The search goes on into libraries that this one needs: `cuserid` is not CUDA's.
    let own = name.starts_with("cu") && name[2..].starts_with(|c: char| c.is_ascii_uppercase());
    let library = own_library().filter(|_| own).ok_or(Missing::Symbol)?;
    let exported = |symbol: &str| {
        // SAFETY: the symbol's type is not used here: only its address is given on.
        let found = unsafe { library.get::<*mut c_void>(symbol.as_bytes()) };
        found.ok().map(|s| s.into_raw())
    };
    let mut renamed = RENAMED.iter().filter(|r| r.0 == name).peekable();
    if renamed.peek().is_some() {
        let newest = renamed.rfind(|r| r.1 <= version);
        let symbol = newest.ok_or(Missing::Version)?.2;
        return exported(symbol).ok_or(Missing::Symbol);
    }
    exported(&format!("{name}_v2"))
        .or_else(|| exported(name))
        .ok_or(Missing::Symbol)
}

fn get(
    symbol: *const c_char,
    version: c_int,
    flags: u64,
) -> Result<Result<*mut c_void, Missing>, E> {
    // SAFETY: the callers' contract.
    let name = unsafe { string(symbol) }?;
    if version > DRIVER_VERSION {
        let why = format!("{name} of CUDA {version}: this driver is {DRIVER_VERSION}");
        return Err(error::refuse(E::InvalidValue, why));
    }
    // Functions on per-thread default streams are asked for by 2; where there are none, CUDA gives
    // the common ones, and here there are none.
    if flags > 2 {
        return Err(E::InvalidValue);
    }
    Ok(find(name, version))
}

/// Gives null, and the reason through `status`, for what is not there.
///
/// # Safety
/// As in CUDA: `symbol` is a string, `address` valid for writing, `status` null or valid for
/// writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    address: *mut *mut c_void,
    version: c_int,
    flags: u64,
    status: *mut c_int,
) -> CUresult {
    enter(|| {
        let found = get(symbol, version, flags)?;
        // SAFETY: the caller's.
        unsafe {
            put_if(status, found.err().map_or(0, |missing| missing as c_int));
            put(address, found.unwrap_or(std::ptr::null_mut()))
        }
    })
}

/// The older form, which fails for what is not there.
///
/// # Safety
/// As in CUDA: `symbol` is a string, `address` valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    address: *mut *mut c_void,
    version: c_int,
    flags: u64,
) -> CUresult {
    enter(|| {
        let found = get(symbol, version, flags)?;
        // SAFETY: the caller's.
        unsafe { put(address, found.unwrap_or(std::ptr::null_mut())) }?;
        found.map(|_| ()).map_err(|_| E::NotFound)
    })
}
