//! A CUDA driver on the CPU: it loads PTX text and runs it, thread for thread, with checks.
//!
//! Three ways in:
//!
//! - **cudarc** (or anything else that opens `libcuda.so` by name): call [`install`] before the
//!   first CUDA call of a test. Kernels then run on the emulator; errors that its checks find come
//!   back as CUDA errors, on standard error in words, and as values from [`Emulator::reports`].
//! - **Rust**: [`Device`] allocates, loads PTX and launches, without the driver's interface.
//! - **Any language**: the program `emulate` runs one kernel on arrays from `.npy` files.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
//!
//! let emulator = cuda_emulator::install()?;
//! let stream = CudaContext::new(0)?.default_stream();
//! let module = stream.context().load_module(cudarc::nvrtc::Ptx::from_file("saxpy.ptx"))?;
//! let saxpy = module.load_function("saxpy")?;
//! let (x, mut y) = (stream.clone_htod(&[1f32; 100])?, stream.alloc_zeros::<f32>(100)?);
//! let mut launch = stream.launch_builder(&saxpy);
//! launch.arg(&100i32).arg(&2f32).arg(&x).arg(&mut y);
//! unsafe { launch.launch(LaunchConfig::for_num_elems(100)) }?;
//! assert_eq!(stream.clone_dtoh(&y)?, [2f32; 100]);
//! println!("{}", emulator.reports()?[0].table());
//! # Ok(())
//! # }
//! ```
//!
//! An instruction, modifier or form that is not implemented is refused when the module is loaded,
//! with its line: nothing is approximated in silence. What is implemented, what is not, and which
//! errors the checks can miss is listed in the README.

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
