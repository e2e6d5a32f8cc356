//! Every operation on a GPU, on the shapes of `docs/counters.md`. Throughput is in the bytes that any
//! implementation must move. Times are of the GPU's events. Without a GPU nothing is measured.

#[path = "../tests/common"]
mod common {
    pub mod cuda;
    pub mod workloads;
}

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::cuda::cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use dust_kernels::{Cuda, Result};
use std::sync::Arc;
use std::time::Duration;

/// The time that the stream takes for `count` runs.
fn time(
    stream: &Arc<CudaStream>,
    count: u64,
    run: &mut dyn FnMut() -> Result<()>,
) -> std::result::Result<Duration, DriverError> {
    let event = || stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
    let start = event()?;
    for _ in 0..count {
        run().expect("the workload's shape");
    }
    let milliseconds = start.elapsed_ms(&event()?)?;
    Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
}

fn cuda(c: &mut Criterion) {
    // Where there is no driver cudarc panics, this does not.
    if let Err(error) = Cuda::new(0) {
        eprintln!("no GPU, nothing to measure: {error}");
        return;
    }
    let context = CudaContext::new(0).expect("a device, as just seen");
    let stream = context.new_stream().expect("a stream");
    // SAFETY: only `time` uses the stream, for events, and nothing is recorded.
    let cuda = unsafe { Cuda::on_stream(stream.clone()) }.expect("a device, as just seen");
    let mut group = c.benchmark_group("cuda");
    common::workloads::each(&cuda, &mut |name, least_bytes, run| {
        group.throughput(Throughput::Bytes(least_bytes as u64));
        group.bench_function(name, |b| {
            b.iter_custom(|count| time(&stream, count, run).expect("events"))
        });
    });
    group.finish();
}

criterion_group!(benches, cuda);
criterion_main!(benches);
