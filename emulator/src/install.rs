//! Finding the driver library and talking to it.

use crate::config::Config;
use crate::driver::Request;
use crate::report::LaunchReport;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde::de::DeserializeOwned;
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Why the driver could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The library is not beside the program.
    #[error(
        "libcuda_emulator.so is not in {0}: build it with cargo, or set CUDA_EMULATOR_LIBRARY to its path"
    )]
    NotFound(String),
    /// The library does not load.
    #[error("{path}: {error}")]
    Load {
        /// Its path.
        path: String,
        /// The loader's words.
        error: libloading::Error,
    },
    /// The library is of another version.
    #[error("the driver library does not understand this crate: build both from one version")]
    Version,
}

type Control = unsafe extern "C" fn(*const c_char) -> *mut c_char;
type Free = unsafe extern "C" fn(*mut c_char);

/// The driver that CUDA calls of this process go to.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    control: Control,
    free: Free,
}

/// Makes the emulator the CUDA driver of this process. Call it before the first CUDA call.
///
/// The library is opened under its SONAME `libcuda.so`; the loader then gives it to whoever opens
/// `libcuda.so` by name, as cudarc does.
pub fn install() -> Result<Emulator, InstallError> {
    static INSTALLED: OnceLock<Emulator> = OnceLock::new();
    if let Some(emulator) = INSTALLED.get() {
        return Ok(*emulator);
    }
    let path = find()?;
    let load = |error| InstallError::Load {
        path: path.display().to_string(),
        error,
    };
    // SAFETY: the library is this crate's own; it has no initialisers.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(load)?;
    // SAFETY: the symbols have these types, see `driver`.
    let emulator = unsafe {
        Emulator {
            control: *library
                .get::<Control>(b"cudaEmulatorControl\0")
                .map_err(load)?,
            free: *library.get::<Free>(b"cudaEmulatorFree\0").map_err(load)?,
        }
    };
    // Never unloaded: cudarc keeps function pointers for good.
    std::mem::forget(library);
    Ok(*INSTALLED.get_or_init(|| emulator))
}

fn find() -> Result<PathBuf, InstallError> {
    if let Some(path) = std::env::var_os("CUDA_EMULATOR_LIBRARY") {
        return Ok(path.into());
    }
    let program = std::env::current_exe().unwrap_or_default();
    let near: Vec<&Path> = program.ancestors().skip(1).take(2).collect();
    let mut tried = Vec::new();
    for folder in near.iter().flat_map(|f| [f.to_path_buf(), f.join("deps")]) {
        let newest = std::fs::read_dir(&folder).ok().and_then(|entries| {
            let named = |p: &PathBuf| {
                let name = p
                    .file_name()
                    .map(|n| n.to_string_lossy().into_owned())
                    .unwrap_or_default();
                name.starts_with("libcuda_emulator") && name.ends_with(".so")
            };
            let time = |p: &PathBuf| p.metadata().and_then(|m| m.modified()).ok();
            entries
                .flatten()
                .map(|e| e.path())
                .filter(named)
                .max_by_key(time)
        });
        if let Some(path) = newest {
            return Ok(path);
        }
        tried.push(folder.display().to_string());
    }
    Err(InstallError::NotFound(tried.join(", ")))
}

impl Emulator {
    fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<T, InstallError> {
        let text = serde_json::to_string(request)
            .ok()
            .and_then(|t| CString::new(t).ok());
        let text = text.ok_or(InstallError::Version)?;
        // SAFETY: a NUL-terminated string, as the function asks.
        let answer = unsafe { (self.control)(text.as_ptr()) };
        if answer.is_null() {
            return Err(InstallError::Version);
        }
        // SAFETY: the answer is a string until it is freed.
        let value = unsafe { CStr::from_ptr(answer) }
            .to_str()
            .map(serde_json::from_str);
        let value = match value {
            Ok(Ok(value)) => Ok(value),
            _ => Err(InstallError::Version),
        };
        // SAFETY: it came from `control` and is not used again.
        unsafe { (self.free)(answer) };
        value
    }

    /// The driver's configuration.
    pub fn config(&self) -> Result<Config, InstallError> {
        self.ask(&Request::Config)
    }

    /// Replaces the configuration for the calls to come; gives the old one.
    pub fn configure(&self, config: &Config) -> Result<Config, InstallError> {
        self.ask(&Request::Configure(Box::new(config.clone())))
    }

    /// Reports of all launches since this was last asked.
    pub fn reports(&self) -> Result<Vec<LaunchReport>, InstallError> {
        self.ask(&Request::Reports)
    }

    /// Allocations (address, bytes) still alive when a context was destroyed, since this was last
    /// asked.
    pub fn leaks(&self) -> Result<Vec<(u64, u64)>, InstallError> {
        self.ask(&Request::Leaks)
    }

    /// Forgets the error that a kernel left, so that a test may go on.
    pub fn recover(&self) -> Result<(), InstallError> {
        self.ask(&Request::Recover)
    }
}
