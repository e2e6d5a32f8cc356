//! A CUDA driver on the CPU.

pub mod config;
pub mod device;
pub mod machine;
pub mod ptx;
pub mod report;

pub use config::{BlockOrder, Checks, Config, CopyAsync, MmaRounding, Schedule};
pub use device::{Arg, Device, Error, Module};
pub use report::{Counters, Finding, Kind, LaunchReport};
