//! For programs on [cust](https://docs.rs/cust): its contexts, streams and buffers, as the
//! launches of [`Kernels`] take them.
//!
//! cust links libcuda when it is built: it needs `CUDA_LIBRARY_PATH`, a folder with
//! `lib64/libcuda.so`. `make test-cust` shows how to do that with `cuda-emulator` in its place.
//!
//! ```no_run
//! use cust::memory::DeviceBuffer;
//! use cust::stream::{Stream, StreamFlags};
//! use dust_kernels::cuda::cust::{CustKernels, address, stream};
//! use dust_kernels::grpo::AdvantageConfig;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = cust::quick_init()?;
//! let kernels = CustKernels::new(&context)?;
//! let on = Stream::new(StreamFlags::NON_BLOCKING, None)?;
//! // One group of two answers, the first is right.
//! let rewards = DeviceBuffer::from_slice(&[1f32, 0.0])?;
//! let advantages = DeviceBuffer::<f32>::zeroed(2)?;
//! let config = AdvantageConfig::default();
//! // SAFETY: two elements in each buffer, which live until the stream is done.
//! unsafe {
//!     kernels.advantages(stream(&on), 1, 2, config, address(&rewards), address(&advantages))
//! }?;
//! on.synchronize()?;
//! # Ok(())
//! # }
//! ```

use super::Kernels;
use crate::{Error, Result};
use ::cust::context::{Context, CurrentContext};
use ::cust::memory::{DeviceCopy, GpuBuffer};
use ::cust::stream::Stream;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use std::marker::PhantomData;
use std::ops::Deref;

/// The kernels in a context of cust's, which they borrow.
pub struct CustKernels<'context> {
    kernels: Kernels,
    context: PhantomData<&'context Context>,
}

impl<'context> CustKernels<'context> {
    /// Makes the context current on this thread, as every launch wants it.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(context: &'context Context) -> Result<Self> {
        CurrentContext::set_current(context).map_err(|e| Error::Device {
            op: "CustKernels::new",
            message: e.to_string(),
            code: None,
        })?;
        // SAFETY: the value borrows the context that is current now.
        let kernels = unsafe { Kernels::in_current_context() }?;
        Ok(Self {
            kernels,
            context: PhantomData,
        })
    }
}

impl Deref for CustKernels<'_> {
    type Target = Kernels;

    fn deref(&self) -> &Kernels {
        &self.kernels
    }
}

/// The driver's handle of a stream.
pub fn stream(stream: &Stream) -> CUstream {
    // One type, declared by two crates.
    stream.as_inner().cast()
}

/// The device address of a buffer.
pub fn address<T: DeviceCopy>(buffer: &impl GpuBuffer<T>) -> CUdeviceptr {
    buffer.as_device_ptr().as_raw()
}
