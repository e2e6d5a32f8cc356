//! Stream capture: what it refuses, what it invalidates, and the memory of graphs.

mod common;

use common::{BASIC, turn};
use cuda_emulator::{Kind, install};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::CUstreamCaptureMode::*;
use cudarc::driver::sys::*;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

const MODES: [CUstreamCaptureMode; 3] = [
    CU_STREAM_CAPTURE_MODE_GLOBAL,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    CU_STREAM_CAPTURE_MODE_RELAXED,
];
const BLOCKING: u32 = 0;
const NON_BLOCKING: u32 = 1;

fn stream(flags: u32) -> CUstream {
    let mut stream = null_mut();
    // SAFETY: the pointer is valid.
    unsafe { cuStreamCreate(&mut stream, flags) }
        .result()
        .unwrap();
    stream
}

fn event() -> CUevent {
    let mut event = null_mut();
    // SAFETY: the pointer is valid.
    unsafe { cuEventCreate(&mut event, 0) }.result().unwrap();
    event
}

fn memory(bytes: usize) -> CUdeviceptr {
    let mut at = 0;
    // SAFETY: the pointer is valid.
    unsafe { cuMemAlloc_v2(&mut at, bytes) }.result().unwrap();
    at
}

fn begin(stream: CUstream, mode: CUstreamCaptureMode) {
    // SAFETY: handles are looked up, not followed.
    unsafe { cuStreamBeginCapture_v2(stream, mode) }
        .result()
        .unwrap();
}

/// Ends a capture: the graph, or why there is none.
fn end(stream: CUstream) -> Result<CUgraph, CUresult> {
    let mut graph = 1 as CUgraph;
    // SAFETY: the pointer is valid.
    let code = unsafe { cuStreamEndCapture(stream, &mut graph) };
    assert_eq!(
        code == CUDA_SUCCESS,
        !graph.is_null(),
        "a graph and {code:?}"
    );
    code.result().map(|()| graph).map_err(|e| e.0)
}

fn instantiate(graph: CUgraph, flags: u64) -> Result<CUgraphExec, CUresult> {
    let mut it = null_mut();
    // SAFETY: the pointer is valid.
    let code = unsafe { cuGraphInstantiateWithFlags(&mut it, graph, flags) };
    code.result().map(|()| it).map_err(|e| e.0)
}

fn byte(at: CUdeviceptr) -> Result<u8, CUresult> {
    let mut byte = 0u8;
    // SAFETY: one byte is writable there.
    let code = unsafe { cuMemcpyDtoH_v2((&raw mut byte).cast(), at, 1) };
    code.result().map(|()| byte).map_err(|e| e.0)
}

/// Leaves nothing behind: also what a test leaves allocated goes with the context.
struct Fresh(Arc<CudaContext>);

impl Fresh {
    fn new() -> Fresh {
        let context = CudaContext::new(0).unwrap();
        context.bind_to_thread().unwrap();
        Fresh(context)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: only handles, which are looked up, are left to it.
        unsafe { cuDevicePrimaryCtxReset_v2(0) };
    }
}

type Call = (&'static str, Box<dyn Fn() -> CUresult>);

/// Calls that do not go through a stream, or wait for one.
fn unsafe_calls() -> Vec<Call> {
    let image = CString::new(BASIC).unwrap();
    let (other, done, at) = (stream(NON_BLOCKING), event(), memory(64));
    // SAFETY: all pointers are valid, here and below.
    unsafe { cuEventRecord(done, other) }.result().unwrap();
    let call = |name, f: Box<dyn Fn() -> CUresult>| (name, f);
    // SAFETY: as above.
    unsafe {
        vec![
            call("cuMemAlloc", Box::new(|| cuMemAlloc_v2(&mut 0, 64))),
            call("cuMemFree", Box::new(|| cuMemFree_v2(0))),
            call(
                "cuMemHostAlloc",
                Box::new(|| cuMemHostAlloc(&mut null_mut(), 64, 0)),
            ),
            call(
                "cuMemcpyHtoD",
                Box::new(move || cuMemcpyHtoD_v2(at, (&raw const at).cast(), 8)),
            ),
            call(
                "cuMemcpyDtoD",
                Box::new(move || cuMemcpyDtoD_v2(at, at + 8, 8)),
            ),
            call("cuMemsetD8", Box::new(move || cuMemsetD8_v2(at, 0, 64))),
            call(
                "cuModuleLoadData",
                Box::new(move || cuModuleLoadData(&mut null_mut(), image.as_ptr().cast())),
            ),
            call(
                "cuStreamSynchronize",
                Box::new(move || cuStreamSynchronize(other)),
            ),
            call("cuEventQuery", Box::new(move || cuEventQuery(done))),
        ]
    }
}

#[test]
fn unsafe_calls_are_refused_by_mode_and_invalidate() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let calls = unsafe_calls();
    let on = stream(NON_BLOCKING);
    for mode in MODES {
        for (name, call) in &calls {
            begin(on, mode);
            let got = call();
            if mode == CU_STREAM_CAPTURE_MODE_RELAXED {
                assert_eq!(got, CUDA_SUCCESS, "{name}");
                assert!(end(on).is_ok(), "{name}");
                continue;
            }
            assert_eq!(
                got, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                "{name} {mode:?}"
            );
            let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            // SAFETY: the pointer is valid.
            unsafe { cuStreamIsCapturing(on, &mut status) }
                .result()
                .unwrap();
            let invalidated = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED;
            assert_eq!(status, invalidated, "{name} {mode:?}");
            // Work is refused too from now on.
            // SAFETY: the call gets no further than its stream.
            let code = unsafe { cuMemsetD8Async(0, 0, 1, on) };
            assert_eq!(code, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "{name}");
            assert_eq!(
                end(on),
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
                "{name}"
            );
            // The stream is free again.
            // SAFETY: handles are looked up, not followed.
            unsafe { cuStreamSynchronize(on) }.result().unwrap();
        }
    }
}

#[test]
fn other_threads_are_held_by_global_captures_alone() {
    let _turn = turn();
    let fresh = Fresh::new();
    let on = stream(NON_BLOCKING);
    let allocate = |own: CUstreamCaptureMode| {
        let context = fresh.0.clone();
        let there = std::thread::spawn(move || {
            context.bind_to_thread().unwrap();
            let mut mode = own;
            // SAFETY: both pointers are valid.
            unsafe {
                cuThreadExchangeStreamCaptureMode(&mut mode)
                    .result()
                    .unwrap();
                assert_eq!(
                    mode, CU_STREAM_CAPTURE_MODE_GLOBAL,
                    "what a thread begins with"
                );
                cuMemAlloc_v2(&mut 0, 64)
            }
        });
        there.join().unwrap()
    };
    for mode in MODES {
        for own in MODES {
            begin(on, mode);
            let both = mode == CU_STREAM_CAPTURE_MODE_GLOBAL && own == mode;
            let (code, outcome) = (allocate(own), end(on));
            if both {
                assert_eq!(code, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
                assert_eq!(outcome, Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
            } else {
                assert_eq!(code, CUDA_SUCCESS, "{mode:?} {own:?}");
                assert!(outcome.is_ok(), "{mode:?} {own:?}");
            }
        }
    }
    // Nor may another thread end what is not relaxed.
    for mode in MODES {
        begin(on, mode);
        let (context, there) = (fresh.0.clone(), on as usize);
        let ended = std::thread::spawn(move || {
            context.bind_to_thread().unwrap();
            end(there as CUstream).map(|graph| graph as usize)
        });
        let ended = ended.join().unwrap();
        if mode == CU_STREAM_CAPTURE_MODE_RELAXED {
            assert!(ended.is_ok());
        } else {
            assert_eq!(ended, Err(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD));
            assert!(end(on).is_err());
        }
    }
}

#[test]
fn a_captured_stream_cannot_be_waited_for() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let (on, noted) = (stream(NON_BLOCKING), event());
    let (unsupported, captured) = (
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        CUDA_ERROR_CAPTURED_EVENT,
    );
    // SAFETY: handles are looked up, not followed.
    let calls: [(&str, &dyn Fn() -> CUresult, CUresult); 7] = unsafe {
        [
            (
                "cuStreamSynchronize",
                &|| cuStreamSynchronize(on),
                unsupported,
            ),
            ("cuStreamQuery", &|| cuStreamQuery(on), unsupported),
            ("cuStreamDestroy", &|| cuStreamDestroy_v2(on), unsupported),
            ("cuCtxSynchronize", &|| cuCtxSynchronize(), unsupported),
            ("cuEventQuery", &|| cuEventQuery(noted), captured),
            (
                "cuEventSynchronize",
                &|| cuEventSynchronize(noted),
                captured,
            ),
            (
                "cuStreamBeginCapture",
                &|| cuStreamBeginCapture_v2(on, CU_STREAM_CAPTURE_MODE_RELAXED),
                CUDA_ERROR_ILLEGAL_STATE,
            ),
        ]
    };
    for mode in MODES {
        for (name, call, code) in &calls {
            begin(on, mode);
            // SAFETY: as above.
            unsafe { cuEventRecord(noted, on) }.result().unwrap();
            assert_eq!(call(), *code, "{name} {mode:?}");
            assert_eq!(
                end(on),
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
                "{name} {mode:?}"
            );
        }
    }
    assert_eq!(end(on), Err(CUDA_ERROR_ILLEGAL_STATE));
}

#[test]
fn the_legacy_stream_cannot_be_used_beside_a_blocking_one() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let (at, noted) = (memory(64), event());
    let legacy = null_mut();
    // SAFETY: all pointers are valid.
    let calls: [&dyn Fn() -> CUresult; 5] = unsafe {
        [
            &|| cuMemcpyHtoD_v2(at, (&raw const at).cast(), 8),
            &|| cuMemsetD8Async(at, 1, 64, legacy),
            &|| cuStreamSynchronize(legacy),
            &|| cuEventRecord(noted, legacy),
            &|| cuMemAllocAsync(&mut 0, 64, legacy),
        ]
    };
    for flags in [BLOCKING, NON_BLOCKING] {
        let on = stream(flags);
        for (i, call) in calls.iter().enumerate() {
            begin(on, CU_STREAM_CAPTURE_MODE_RELAXED);
            let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            // SAFETY: the pointer is valid.
            let asked = unsafe { cuStreamIsCapturing(legacy, &mut status) };
            if flags == NON_BLOCKING {
                assert_eq!((asked, call()), (CUDA_SUCCESS, CUDA_SUCCESS), "{i}");
                assert!(end(on).is_ok());
                continue;
            }
            // The question alone does no harm.
            assert_eq!(asked, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
            // SAFETY: the pointer is valid.
            unsafe { cuStreamIsCapturing(on, &mut status) }
                .result()
                .unwrap();
            assert_eq!(
                status,
                CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
            );
            assert_eq!(call(), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "{i}");
            assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), "{i}");
        }
    }
    // SAFETY: handles are looked up, not followed.
    let code = unsafe { cuStreamBeginCapture_v2(legacy, CU_STREAM_CAPTURE_MODE_RELAXED) };
    assert_eq!(code, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

#[test]
fn streams_join_a_capture_by_events_and_must_come_back() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let (on, other) = (stream(NON_BLOCKING), stream(NON_BLOCKING));
    let (fork, join, at) = (event(), event(), memory(1));
    let mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: handles are looked up, not followed; the memory is there.
    unsafe {
        cuMemsetD8_v2(at, 1, 1).result().unwrap();
        begin(on, mode);
        cuEventRecord(fork, on).result().unwrap();
        cuStreamWaitEvent(other, fork, 0).result().unwrap();
        cuMemsetD8Async(at, 2, 1, other).result().unwrap();
        cuEventRecord(join, other).result().unwrap();
        cuStreamWaitEvent(on, join, 0).result().unwrap();
        // No work, so that nothing is left to join.
        cuEventRecord(fork, other).result().unwrap();
        let graph = end(on).unwrap();
        assert_eq!(byte(at), Ok(1), "captured work was done at once");
        let it = instantiate(graph, 0).unwrap();
        cuGraphLaunch(it, on).result().unwrap();
        assert_eq!(byte(at), Ok(2));
        // Both streams are free again.
        cuStreamSynchronize(other).result().unwrap();
        assert_eq!(cuEventQuery(join), CUDA_ERROR_CAPTURED_EVENT);

        // Work after what the first stream waited for is not joined.
        begin(on, mode);
        cuEventRecord(fork, on).result().unwrap();
        cuStreamWaitEvent(other, fork, 0).result().unwrap();
        cuEventRecord(join, other).result().unwrap();
        cuStreamWaitEvent(on, join, 0).result().unwrap();
        cuMemsetD8Async(at, 3, 1, other).result().unwrap();
        assert_eq!(end(other), Err(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED));
        assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        begin(on, mode);
        cuEventRecord(fork, on).result().unwrap();
        cuStreamWaitEvent(other, fork, 0).result().unwrap();
        cuEventRecord(join, other).result().unwrap();
        cuStreamWaitEvent(on, join, 0).result().unwrap();
        cuMemsetD8Async(at, 3, 1, other).result().unwrap();
        assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_UNJOINED));

        // Events of outside do not come in, nor do two captures become one.
        cuEventRecord(join, other).result().unwrap();
        begin(on, mode);
        assert_eq!(
            cuStreamWaitEvent(on, join, 0),
            CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        );
        assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        begin(on, mode);
        begin(other, mode);
        cuEventRecord(join, other).result().unwrap();
        assert_eq!(
            cuStreamWaitEvent(on, join, 0),
            CUDA_ERROR_STREAM_CAPTURE_MERGE
        );
        assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        assert_eq!(end(other), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
    }
}

#[test]
fn an_event_recorded_in_a_graph_comes_when_it_runs() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let (on, start, stop) = (stream(NON_BLOCKING), event(), event());
    let external = 1;
    let mut ms = 0f32;
    // SAFETY: handles are looked up, not followed; the pointer is valid.
    unsafe {
        cuEventRecord(start, on).result().unwrap();
        begin(on, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        cuEventRecordWithFlags(stop, on, external).result().unwrap();
        let it = instantiate(end(on).unwrap(), 0).unwrap();
        let code = cuEventElapsedTime(&mut ms, start, stop);
        assert_eq!(code, CUDA_ERROR_INVALID_HANDLE, "not recorded yet");
        cuGraphLaunch(it, on).result().unwrap();
        cuEventElapsedTime(&mut ms, start, stop).result().unwrap();
        assert!(ms >= 0.0);
        let code = cuEventRecordWithFlags(stop, on, external);
        assert_eq!(code, CUDA_ERROR_INVALID_VALUE, "outside of a capture");
    }
}

/// A graph that allocates 64 bytes, fills them with `value` and, if told so, frees them.
fn allocating(on: CUstream, value: u8, frees: bool) -> (CUgraph, CUdeviceptr) {
    let mut at = 0;
    begin(on, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    // SAFETY: the pointer is valid.
    unsafe {
        cuMemAllocAsync(&mut at, 64, on).result().unwrap();
        cuMemsetD8Async(at, value, 64, on).result().unwrap();
        if frees {
            cuMemFreeAsync(at, on).result().unwrap();
        }
    }
    (end(on).unwrap(), at)
}

#[test]
fn captured_memory_is_the_graphs() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let on = stream(NON_BLOCKING);
    let (graph, at) = allocating(on, 5, false);
    let it = instantiate(graph, 0).unwrap();
    assert_eq!(instantiate(graph, 0), Err(CUDA_ERROR_NOT_SUPPORTED));
    // SAFETY: handles are looked up, not followed; addresses are checked.
    unsafe {
        // Nothing is there before the launch.
        assert_eq!(byte(at), Err(CUDA_ERROR_INVALID_VALUE));
        assert_eq!(cuMemsetD8Async(at, 1, 1, on), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(cuMemFreeAsync(at, on), CUDA_ERROR_INVALID_VALUE);
        for _ in 0..2 {
            cuGraphLaunch(it, on).result().unwrap();
            assert_eq!(byte(at + 63), Ok(5));
            // What a launch left must be freed before the next.
            assert_eq!(cuGraphLaunch(it, on), CUDA_ERROR_INVALID_VALUE);
            assert_eq!(byte(at + 63), Ok(5));
            cuMemFreeAsync(at, on).result().unwrap();
            assert_eq!(byte(at), Err(CUDA_ERROR_INVALID_VALUE));
        }
        // Graphs that free cleanly, and graphs that free at their next launch, run on and on.
        let (graph, at) = allocating(on, 6, true);
        let it = instantiate(graph, 0).unwrap();
        for _ in 0..3 {
            cuGraphLaunch(it, on).result().unwrap();
            assert_eq!(byte(at), Err(CUDA_ERROR_INVALID_VALUE));
            assert_eq!(cuMemFree_v2(at), CUDA_ERROR_INVALID_VALUE);
        }
        let (graph, at) = allocating(on, 7, false);
        let it = instantiate(graph, 1).unwrap();
        for _ in 0..3 {
            cuGraphLaunch(it, on).result().unwrap();
            assert_eq!(byte(at), Ok(7));
        }
        // It outlives its graph.
        cuGraphExecDestroy(it).result().unwrap();
        cuGraphDestroy(graph).result().unwrap();
        assert_eq!(byte(at), Ok(7));
        cuMemFree_v2(at).result().unwrap();
        // Other memory cannot be freed in a graph.
        let eager = memory(64);
        begin(on, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        assert_eq!(cuMemFreeAsync(eager, on), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(end(on), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
        cuMemFree_v2(eager).result().unwrap();
    }
}

#[test]
fn a_kernel_outside_of_the_graph_does_not_reach_its_memory() {
    let _turn = turn();
    let _fresh = Fresh::new();
    let emulator = install().unwrap();
    let on = stream(NON_BLOCKING);
    let image = CString::new(BASIC).unwrap();
    let (mut module, mut saxpy) = (null_mut(), null_mut());
    let (graph, at) = allocating(on, 0, false);
    let it = instantiate(graph, 0).unwrap();
    let (count, factor, x) = (16i32, 1f32, memory(64));
    let mut params: [*mut c_void; 4] = [
        (&raw const count).cast_mut().cast(),
        (&raw const factor).cast_mut().cast(),
        (&raw const x).cast_mut().cast(),
        (&raw const at).cast_mut().cast(),
    ];
    // SAFETY: all pointers are valid; the emulator checks the kernel's addresses.
    unsafe {
        cuModuleLoadData(&mut module, image.as_ptr().cast())
            .result()
            .unwrap();
        cuModuleGetFunction(&mut saxpy, module, c"saxpy".as_ptr())
            .result()
            .unwrap();
        cuMemsetD32_v2(x, 1f32.to_bits(), 16).result().unwrap();
        let mut launch = || {
            let none = null_mut();
            cuLaunchKernel(saxpy, 1, 1, 1, 16, 1, 1, 0, on, params.as_mut_ptr(), none)
        };
        launch().result().unwrap();
        assert_eq!(cuStreamSynchronize(on), CUDA_ERROR_ILLEGAL_ADDRESS);
        let reports = emulator.reports().unwrap();
        assert_eq!(reports[0].findings[0].kind, Kind::OutOfBounds);
        emulator.recover().unwrap();
        cuGraphLaunch(it, on).result().unwrap();
        launch().result().unwrap();
        assert_eq!(byte(at + 3), Ok(0x3f), "1.0, by its highest byte");
        cuMemFreeAsync(at, on).result().unwrap();
        launch().result().unwrap();
        assert_eq!(cuStreamSynchronize(on), CUDA_ERROR_ILLEGAL_ADDRESS);
        emulator.recover().unwrap();
    }
}
