//! `--device`: where a model runs.

use std::str::FromStr;

use anyhow::Result;
use dust_kernels::Cpu;
#[cfg(feature = "cuda")]
use dust_kernels::Cuda;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Place {
    #[default]
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
    /// The code of the GPU, on `cuda-emulator`.
    Emulated,
}

impl FromStr for Place {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map(Place::Cuda).ok();
        match text {
            "cpu" => Some(Place::Cpu),
            "cuda" => Some(Place::Cuda(0)),
            "emulated" => Some(Place::Emulated),
            _ => text.strip_prefix("cuda:").and_then(number),
        }
        .ok_or_else(|| "say cpu, cuda, cuda:N or emulated".to_owned())
    }
}

/// A device that is ready.
pub(super) enum Ready {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

impl Place {
    /// Makes the device; `threads` are the CPU's.
    pub fn open(self, threads: Option<u16>) -> Result<Ready> {
        match self {
            Place::Cpu => Ok(Ready::Cpu(match threads {
                Some(n) => Cpu::with_threads(n.into()),
                None => Cpu::new(),
            })),
            #[cfg(feature = "cuda")]
            Place::Cuda(number) => Ok(Ready::Cuda(Cuda::new(number)?)),
            #[cfg(feature = "cuda")]
            Place::Emulated => {
                cuda_emulator::install()?;
                Ok(Ready::Cuda(Cuda::new(0)?))
            }
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) | Place::Emulated => anyhow::bail!(
                "this program was built without CUDA: build it with the feature `cuda`, or say --device cpu"
            ),
        }
    }
}

/// Runs `$body` with `$device` bound to the device, whatever its type.
macro_rules! on_device {
    ($ready:expr, |$device:ident| $body:expr) => {
        match $ready {
            $crate::cli::device::Ready::Cpu($device) => $body,
            #[cfg(feature = "cuda")]
            $crate::cli::device::Ready::Cuda($device) => $body,
        }
    };
}
pub(super) use on_device;
