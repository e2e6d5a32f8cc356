//! A CUDA driver on the CPU.

pub mod config;
pub mod device;
#[allow(non_snake_case)] // the names are CUDA's own
pub mod driver;
pub mod estimate;
mod install;
pub mod machine;
pub mod npy;
pub mod ptx;
pub mod report;

pub use config::{BlockOrder, Checks, Config, CopyAsync, MmaRounding, Schedule};
pub use device::{Arg, Device, Error, Module};
pub use install::{Emulator, InstallError, install};
pub use report::{Counters, Finding, Kind, LaunchReport};
