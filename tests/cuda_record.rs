//! Recordings: what they hold, what they refuse, and that they leave the device as it was.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}

use common::cuda::*;
use dust_kernels::activation::Activation;
use dust_kernels::attention::{Attention, Heads, Segment};
use dust_kernels::cuda::cudarc::driver::result::mem_get_info;
use dust_kernels::cuda::{CudaBuffer, Graph};
use dust_kernels::{Buffer, Cuda, Device, Error, Result};
use half::bf16;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

fn record(cuda: &Cuda, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
    cuda.record(body).map(Option::unwrap)
}

fn replay(cuda: &Cuda, graph: &Graph) {
    // SAFETY: the tests keep the buffers.
    unsafe { cuda.replay(graph) }.unwrap();
}

/// Moves all elements one up: needs as much scratch memory as the buffer has.
fn shift(cuda: &Cuda, buffer: &mut CudaBuffer<u8>) -> Result<()> {
    cuda.copy_within(buffer, 0, 1, buffer.len() - 1)
}

fn invalid<T>(result: Result<T>) -> bool {
    matches!(result, Err(Error::Invalid { .. }))
}

#[test]
fn a_recording_runs_when_it_is_replayed() {
    with_cuda(|cuda, _| {
        let mut buffer = up(cuda, &[1u8, 2, 3, 4]);
        shift(cuda, &mut buffer).unwrap();
        let graph = record(cuda, || shift(cuda, &mut buffer)).unwrap();
        assert_eq!(cuda.download(&buffer).unwrap(), [1, 1, 2, 3]);
        for want in [[1, 1, 1, 2], [1, 1, 1, 1]] {
            replay(cuda, &graph);
            assert_eq!(cuda.download(&buffer).unwrap(), want);
        }
        let other = Cuda::new(0).unwrap();
        // SAFETY: the buffer is alive.
        assert!(invalid(unsafe { other.replay(&graph) }));
    });
}

#[test]
fn other_threads_wait_for_the_end_of_a_recording() {
    with_cuda(|cuda, _| {
        let mut mine = up(cuda, &[1u8; 4]);
        shift(cuda, &mut mine).unwrap();
        let (begin, begun) = mpsc::channel();
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let other = scope.spawn(move || {
                let mut theirs = up(cuda, &[5u8; 4]);
                begun.recv().unwrap();
                cuda.fill_zero(&mut theirs).unwrap();
                done.send(()).unwrap();
                theirs
            });
            let graph = record(cuda, || {
                begin.send(()).unwrap();
                // Long enough for a call that does not wait.
                let waited = is_done.recv_timeout(Duration::from_millis(200));
                assert_eq!(waited, Err(mpsc::RecvTimeoutError::Timeout));
                shift(cuda, &mut mine)
            });
            let graph = graph.unwrap();
            let mut theirs = other.join().unwrap();
            assert_eq!(cuda.download(&theirs).unwrap(), [0; 4]);
            cuda.write(&mut theirs, 0, &[6; 4]).unwrap();
            replay(cuda, &graph);
            assert_eq!(cuda.download(&theirs).unwrap(), [6; 4]);
        });
    });
}

#[test]
fn what_a_recording_cannot_hold_is_refused() {
    with_cuda(|cuda, _| {
        let mut buffer = up(cuda, &[7u8; 8]);
        let heads = Heads {
            q_heads: 1,
            kv_heads: 1,
            head_dim: 64,
        };
        let segments = [Segment {
            start: 0,
            len: 1,
            prefix_start: 0,
            prefix_len: 0,
        }];
        let qkv = cuda.zeros(heads.qkv_width()).unwrap();
        let mut out = cuda.zeros(heads.out_width()).unwrap();
        let mut lse = cuda.zeros(1).unwrap();
        let mut attend = || cuda.attention(1, heads, 1.0, &segments, &qkv, &mut out, &mut lse);
        attend().unwrap();
        let gate_up = cuda.zeros(16).unwrap();
        let mut swiglu = cuda.zeros::<bf16>(8).unwrap();
        let mut large = cuda.zeros(3 << 20).unwrap();
        let graph = record(cuda, || Ok(())).unwrap();
        record(cuda, || {
            assert!(invalid(cuda.zeros::<u8>(8)));
            assert!(invalid(cuda.write(&mut buffer, 0, &[1])));
            assert!(invalid(cuda.read(&buffer, 0, &mut [0])));
            assert!(invalid(record(cuda, || Ok(()))));
            // SAFETY: it uses no buffer.
            assert!(invalid(unsafe { cuda.replay(&graph) }));
            // Its segments would be read at the replay, when they may be gone.
            assert!(invalid(attend()));
            // More scratch memory than there is.
            let error = shift(cuda, &mut large).unwrap_err().to_string();
            assert!(error.contains("3145727 bytes of scratch"), "{error}");
            // A kernel that has not been loaded.
            assert!(invalid(cuda.swiglu(1, 8, &gate_up, &mut swiglu)));
            Ok(())
        })
        .unwrap();
        // The device goes on.
        assert_eq!(cuda.download(&buffer).unwrap(), [7; 8]);
        attend().unwrap();
        shift(cuda, &mut large).unwrap();
        cuda.swiglu(1, 8, &gate_up, &mut swiglu).unwrap();
        assert_eq!(cuda.download(&swiglu).unwrap(), [bf16::ZERO; 8]);
    });
}

#[test]
fn a_buffer_that_is_dropped_in_a_recording_is_freed_once() {
    let mut ended = None;
    with_emulator(|cuda, emulator| {
        let spare = up(cuda, &[1u8; 8]);
        let graph = record(cuda, || {
            drop(spare);
            Ok(())
        })
        .unwrap();
        replay(cuda, &graph);
        replay(cuda, &graph);
        cuda.download(&cuda.zeros::<u8>(8).unwrap()).unwrap();
        emulator.leaks().unwrap();
        ended = Some(*emulator);
    });
    // The emulator tells when the last device is gone.
    assert!(ended.is_none_or(|emulator| emulator.leaks().unwrap().is_empty()));
}

#[test]
fn a_body_that_fails_or_panics_ends_the_recording() {
    with_cuda(|cuda, _| {
        let mut buffer = up(cuda, &[1u8, 2, 3]);
        shift(cuda, &mut buffer).unwrap();
        let error = Error::invalid("test", "on purpose");
        let failed = record(cuda, || {
            shift(cuda, &mut buffer)?;
            Err(error.clone())
        });
        assert_eq!(failed.map(drop), Err(error));
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            record(cuda, || panic!("on purpose")).map(drop)
        }));
        assert!(panicked.is_err());
        assert_eq!(cuda.download(&buffer).unwrap(), [1, 1, 2]);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| cuda.download(&cuda.zeros::<u8>(2).unwrap()).unwrap());
            assert_eq!(other.join().unwrap(), [0; 2]);
        });
    });
}

#[test]
fn outgrown_scratch_memory_lives_only_as_long_as_graphs() {
    // A GPU's pool keeps what is freed.
    with_emulator(|cuda, _| {
        let free = || mem_get_info().unwrap().0;
        let mut small = cuda.zeros(5 << 20).unwrap();
        let mut large = cuda.zeros(9 << 20).unwrap();
        let before = free();
        let scratch = || (before - free()) >> 20;
        shift(cuda, &mut small).unwrap();
        assert_eq!(scratch(), 6);
        // No graph: the outgrown is given back, and little more is taken than asked for.
        shift(cuda, &mut large).unwrap();
        assert_eq!(scratch(), 10);
        let graph = record(cuda, || shift(cuda, &mut large)).unwrap();
        let mut larger = cuda.zeros(11 << 20).unwrap();
        shift(cuda, &mut larger).unwrap();
        drop(larger);
        assert_eq!(scratch(), 10 + 16);
        replay(cuda, &graph);
        drop(graph);
        assert_eq!(scratch(), 16);
        assert_eq!(cuda.download(&small).unwrap()[..2], [0; 2]);
    });
}
