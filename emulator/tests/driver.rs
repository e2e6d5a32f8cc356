//! An unmodified cudarc on the emulated driver.

mod common;

use common::{BASIC, turn};
use cuda_emulator::{Checks, Config, Kind, install};
use cudarc::driver::sys::*;
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::ffi::{CString, c_void};

#[test]
fn cudarc_copies_launches_and_reads_back() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    assert_eq!(context.compute_capability().unwrap(), (8, 0));
    assert_eq!(context.name().unwrap(), "cuda-emulator sm_80");
    let stream = context.default_stream();
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    let saxpy = module.load_function("saxpy").unwrap();
    let n = 1000;
    let x = stream.clone_htod(&vec![2f32; n]).unwrap();
    let mut y = stream
        .clone_htod(&(0..n).map(|i| i as f32).collect::<Vec<_>>())
        .unwrap();
    let (count, a) = (n as i32, 3f32);
    let mut launch = stream.launch_builder(&saxpy);
    launch.arg(&count).arg(&a).arg(&x).arg(&mut y);
    // SAFETY: the kernel takes (int, float, const float*, float*) and guards its index.
    unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.unwrap();
    let got = stream.clone_dtoh(&y).unwrap();
    assert!(got.iter().enumerate().all(|(i, v)| *v == 6.0 + i as f32));
    let reports = install().unwrap().reports().unwrap();
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].counters.global_load_bytes, 8 * n as u64);
}

#[test]
fn a_kernel_error_surfaces_later_and_stays() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    let saxpy = module.load_function("saxpy").unwrap();
    let x = stream.alloc_zeros::<f32>(100).unwrap();
    let mut y = stream.alloc_zeros::<f32>(100).unwrap();
    let (count, a) = (101i32, 3f32);
    let mut launch = stream.launch_builder(&saxpy);
    launch.arg(&count).arg(&a).arg(&x).arg(&mut y);
    // SAFETY: out of bounds on purpose; the emulator catches it.
    unsafe { launch.launch(LaunchConfig::for_num_elems(101)) }.unwrap();
    let error = stream.synchronize().unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert!(stream.clone_dtoh(&x).is_err());
    let reports = install().unwrap().reports().unwrap();
    let finding = &reports[0].findings[0];
    assert_eq!(
        (finding.kind, finding.thread),
        (Kind::OutOfBounds, [100, 0, 0])
    );
    assert_eq!(finding.source, Some(("basic.cu".to_string(), 6)));
    install().unwrap().recover().unwrap();
    stream.synchronize().unwrap();
}

#[test]
fn events_streams_and_memory() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    let (a, b) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let start = a
        .record_event(Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT))
        .unwrap();
    let mut x = a.alloc_zeros::<u16>(4096).unwrap();
    let end = a
        .record_event(Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT))
        .unwrap();
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    b.wait(&end).unwrap();
    b.memcpy_htod(&[7u16; 10], &mut x.slice_mut(5..15)).unwrap();
    let y = b.clone_dtod(&x).unwrap();
    let back = b.clone_dtoh(&y).unwrap();
    assert_eq!(back.iter().map(|v| *v as u32).sum::<u32>(), 70);
    let (free, total) = context.mem_get_info().unwrap();
    assert!(free < total);
    context.synchronize().unwrap();
}

#[test]
fn a_captured_graph_replays() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: one stream uses all memory. Events from before a capture must not be waited for in it.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    let saxpy = module.load_function("saxpy").unwrap();
    let x = stream.clone_htod(&[1f32; 64]).unwrap();
    let mut y = stream.alloc_zeros::<f32>(64).unwrap();
    let (count, a) = (64i32, 1f32);
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
        .unwrap();
    let mut launch = stream.launch_builder(&saxpy);
    launch.arg(&count).arg(&a).arg(&x).arg(&mut y);
    // SAFETY: as in the first test.
    unsafe { launch.launch(LaunchConfig::for_num_elems(64)) }.unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0f32; 64]);
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [3f32; 64]);
    let mut launch = stream.launch_builder(&saxpy);
    launch.arg(&count).arg(&a).arg(&x).arg(&mut y);
    // SAFETY: as above.
    unsafe { launch.launch(LaunchConfig::for_num_elems(64)) }.unwrap();
    let reports = install().unwrap().reports().unwrap();
    let graphs: Vec<_> = reports.iter().map(|r| r.graph).collect();
    assert_eq!(graphs, [true, true, true, false]);
}

#[test]
fn a_thread_without_a_context_is_refused() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let event = context.new_event(None).unwrap();
    let mut module = std::ptr::null_mut();
    let mut saxpy = std::ptr::null_mut();
    let image = CString::new(BASIC).unwrap();
    let mut memory = 0;
    // SAFETY: all pointers are valid.
    unsafe {
        cuModuleLoadData(&mut module, image.as_ptr().cast())
            .result()
            .unwrap();
        cuModuleGetFunction(&mut saxpy, module, c"saxpy".as_ptr())
            .result()
            .unwrap();
        cuMemAlloc_v2(&mut memory, 64).result().unwrap();
    }
    let (stream, event) = (stream.cu_stream() as usize, event.cu_event() as usize);
    let (module, saxpy) = (module as usize, saxpy as usize);
    // What each call gives on this thread, which may have a context or not.
    let calls = move || {
        let (stream, event) = (stream as CUstream, event as CUevent);
        let (module, saxpy) = (module as CUmodule, saxpy as CUfunction);
        let legacy = std::ptr::null_mut();
        let (mut at, mut number, mut byte) = (0, 0, 1u8);
        let [mut a, mut b, mut c, mut d, mut e] = [std::ptr::null_mut::<c_void>(); 5];
        let (count, factor) = (0i32, 0f32);
        let mut params: [*mut c_void; 4] = [
            (&raw const count).cast_mut().cast(),
            (&raw const factor).cast_mut().cast(),
            (&raw const memory).cast_mut().cast(),
            (&raw const memory).cast_mut().cast(),
        ];
        let byte: *mut c_void = (&raw mut byte).cast();
        // SAFETY: all pointers are valid; the kernel, of no elements, touches no memory.
        unsafe {
            [
                ("cuMemAlloc", cuMemAlloc_v2(&mut at, 64)),
                ("cuMemAllocAsync", cuMemAllocAsync(&mut at, 64, legacy)),
                ("cuMemFreeAsync", cuMemFreeAsync(at, legacy)),
                ("cuMemFree", cuMemFree_v2(0)),
                ("cuMemHostAlloc", cuMemHostAlloc(&mut a, 64, 0)),
                ("cuMemcpyHtoD", cuMemcpyHtoD_v2(memory, byte, 1)),
                ("cuMemcpyDtoH", cuMemcpyDtoH_v2(byte, memory, 1)),
                (
                    "cuMemcpyHtoDAsync",
                    cuMemcpyHtoDAsync_v2(memory, byte, 1, stream),
                ),
                ("cuMemsetD8", cuMemsetD8_v2(memory, 1, 1)),
                ("cuMemsetD8Async", cuMemsetD8Async(memory, 1, 1, stream)),
                (
                    "cuModuleLoadData",
                    cuModuleLoadData((&raw mut b).cast(), image.as_ptr().cast()),
                ),
                (
                    "cuModuleGetFunction",
                    cuModuleGetFunction((&raw mut b).cast(), module, c"saxpy".as_ptr()),
                ),
                (
                    "cuFuncGetAttribute",
                    cuFuncGetAttribute(
                        &mut number,
                        CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS,
                        saxpy,
                    ),
                ),
                (
                    "cuLaunchKernel",
                    cuLaunchKernel(
                        saxpy,
                        1,
                        1,
                        1,
                        32,
                        1,
                        1,
                        0,
                        stream,
                        params.as_mut_ptr(),
                        std::ptr::null_mut(),
                    ),
                ),
                ("cuStreamCreate", cuStreamCreate((&raw mut c).cast(), 0)),
                ("cuStreamSynchronize", cuStreamSynchronize(stream)),
                ("cuStreamQuery", cuStreamQuery(stream)),
                ("cuEventCreate", cuEventCreate((&raw mut d).cast(), 0)),
                ("cuEventRecord", cuEventRecord(event, stream)),
                ("cuStreamWaitEvent", cuStreamWaitEvent(stream, event, 0)),
                ("cuGraphCreate", cuGraphCreate((&raw mut e).cast(), 0)),
                ("cuCtxSynchronize", cuCtxSynchronize()),
                ("cuCtxGetDevice", cuCtxGetDevice(&mut number)),
            ]
        }
    };
    for (name, code) in calls.clone()() {
        assert_eq!(code, CUresult::CUDA_SUCCESS, "{name}");
    }
    std::thread::scope(|scope| {
        let context = &context;
        scope.spawn(move || {
            for (name, code) in calls() {
                assert_eq!(code, CUresult::CUDA_ERROR_INVALID_CONTEXT, "{name}");
            }
            // A stream of one's own names its context.
            let mut at = 0;
            // SAFETY: the pointer and the stream are valid.
            unsafe {
                cuMemAllocAsync(&mut at, 64, stream as CUstream)
                    .result()
                    .unwrap();
                cuMemFreeAsync(at, stream as CUstream).result().unwrap();
            }
            context.bind_to_thread().unwrap();
            for (name, code) in calls() {
                assert_eq!(code, CUresult::CUDA_SUCCESS, "{name}");
            }
        });
    });
    // SAFETY: nothing of the context is used after this; handles are looked up, not followed.
    unsafe { cuDevicePrimaryCtxReset_v2(0) };
}

#[test]
fn handles_belong_to_their_context() {
    let _turn = turn();
    let emulator = install().unwrap();
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    let saxpy = module.load_function("saxpy").unwrap();
    let x = stream.alloc_zeros::<f32>(64).unwrap();
    let mut other = std::ptr::null_mut();
    let (mut event, mut module) = (std::ptr::null_mut(), std::ptr::null_mut());
    let mut at = 0;
    let image = CString::new(BASIC).unwrap();
    // SAFETY: all pointers and handles are valid.
    unsafe {
        cuCtxCreate_v2(&mut other, 0, 0).result().unwrap();
        cuEventCreate(&mut event, 0).result().unwrap();
        cuModuleLoadData(&mut module, image.as_ptr().cast())
            .result()
            .unwrap();
        cuMemAlloc_v2(&mut at, 77).result().unwrap();
        let mut found = std::ptr::null_mut();
        cuModuleGetFunction(&mut found, module, c"saxpy".as_ptr())
            .result()
            .unwrap();
        // Of the other context, on a stream of the first.
        let code = cuLaunchKernel(
            found,
            1,
            1,
            1,
            32,
            1,
            1,
            0,
            stream.cu_stream(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
        let code = cuEventRecord(event, stream.cu_stream());
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
        context.bind_to_thread().unwrap();
        let code = cuModuleGetFunction(&mut found, module, c"saxpy".as_ptr());
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(cuMemFree_v2(at), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    // A context that goes takes what is its own; whoever still has it current is told.
    emulator.leaks().unwrap();
    let (now, then) = std::sync::mpsc::channel::<()>();
    let (ready, made) = std::sync::mpsc::channel();
    let address = other as usize;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut at = 0;
            // SAFETY: the pointer is valid.
            unsafe {
                cuCtxSetCurrent(address as CUcontext).result().unwrap();
                ready.send(()).unwrap();
                then.recv().unwrap();
                let code = cuMemAlloc_v2(&mut at, 64);
                assert_eq!(code, CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
            }
        });
        made.recv().unwrap();
        // SAFETY: handles are looked up, not followed.
        unsafe { cuCtxDestroy_v2(other) }.result().unwrap();
        now.send(()).unwrap();
    });
    assert_eq!(emulator.leaks().unwrap(), [(at, 77)]);
    let (mut y, count, a) = (stream.alloc_zeros::<f32>(64).unwrap(), 64i32, 1f32);
    let mut launch = stream.launch_builder(&saxpy);
    launch.arg(&count).arg(&a).arg(&x).arg(&mut y);
    // SAFETY: as in the first test.
    unsafe { launch.launch(LaunchConfig::for_num_elems(64)) }.unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0f32; 64]);
}

#[test]
fn modules_that_cannot_run_are_refused() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    let error = context
        .load_module(Ptx::from_src("\x7fELF...."))
        .err()
        .unwrap();
    assert_eq!(error.0, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    let wrong = BASIC.replace("fma.rn.f32", "fma.rq.f32");
    let error = context.load_module(Ptx::from_src(wrong)).err().unwrap();
    assert_eq!(error.0, CUresult::CUDA_ERROR_INVALID_PTX);
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    assert_eq!(
        module.load_function("nothing").err().unwrap().0,
        CUresult::CUDA_ERROR_NOT_FOUND
    );
    let n = 40 << 10;
    let softmax = module.load_function("softmax").unwrap();
    let stream = context.default_stream();
    let x = stream.alloc_zeros::<f32>(n).unwrap();
    let mut y = stream.alloc_zeros::<f32>(n).unwrap();
    let config = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (32, 1, 1),
        shared_mem_bytes: 100 << 10,
    };
    let count = (n / 2) as i32;
    let mut launch = stream.launch_builder(&softmax);
    launch.arg(&count).arg(&x).arg(&mut y);
    // SAFETY: refused before anything runs: the attribute is not set.
    assert!(unsafe { launch.launch(config) }.is_err());
    use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    softmax
        .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100 << 10)
        .unwrap();
    // SAFETY: (int, const float*, float*), row in shared memory.
    unsafe { launch.launch(config) }.unwrap();
    stream.synchronize().unwrap();
}

#[test]
fn leaked_memory_is_listed_when_the_context_goes() {
    let _turn = turn();
    let emulator = install().unwrap();
    emulator.leaks().unwrap();
    {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        std::mem::forget(stream.alloc_zeros::<u8>(12345));
        // The forgotten slice also holds the stream and so the context: destroy it by hand.
        // SAFETY: nothing of the context is used after this; handles are looked up, not followed.
        unsafe { cudarc::driver::sys::cuDevicePrimaryCtxReset_v2(0) };
    }
    assert_eq!(
        emulator
            .leaks()
            .unwrap()
            .iter()
            .map(|l| l.1)
            .collect::<Vec<_>>(),
        [12345]
    );
    let quiet = Config {
        checks: Checks {
            leaks: false,
            ..Checks::ALL
        },
        ..Config::default()
    };
    emulator.configure(&quiet).unwrap();
    assert_eq!(emulator.config().unwrap(), quiet);
}

#[test]
fn functions_are_found_by_name_and_version() {
    use libloading::os::unix::Library;
    use std::ffi::{CString, c_char, c_int, c_void};
    let _turn = turn();
    // SAFETY: the emulator is loaded under this name; nothing is initialised anew.
    let library = unsafe { Library::new("libcuda.so") }.unwrap();
    let address = |symbol: &str| {
        // SAFETY: only the address is used.
        let found = unsafe { library.get::<*mut c_void>(symbol.as_bytes()) };
        found.map(|s| s.into_raw()).unwrap()
    };
    type Get = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> u32;
    // SAFETY: the symbol has this type.
    let get: Get = unsafe { std::mem::transmute(address("cuGetProcAddress_v2")) };
    let find = |name: &str, version: c_int| {
        let (name, mut at, mut status) = (CString::new(name).unwrap(), std::ptr::null_mut(), -1);
        // SAFETY: all pointers are valid.
        let code = unsafe { get(name.as_ptr(), &mut at, version, 0, &mut status) };
        (code, at, status)
    };
    for (name, version, symbol) in [
        ("cuInit", 12000, "cuInit"),
        ("cuMemAlloc", 12000, "cuMemAlloc_v2"),
        ("cuMemAllocAsync", 11020, "cuMemAllocAsync"),
        ("cuDeviceGetUuid", 11030, "cuDeviceGetUuid"),
        ("cuDeviceGetUuid", 11040, "cuDeviceGetUuid_v2"),
        ("cuGetProcAddress", 11030, "cuGetProcAddress"),
        ("cuGetProcAddress", 12000, "cuGetProcAddress_v2"),
        ("cuEventElapsedTime", 12000, "cuEventElapsedTime"),
        ("cuGraphInstantiate", 12000, "cuGraphInstantiateWithFlags"),
        ("cuCtxCreate", 11030, "cuCtxCreate_v2"),
        ("cuArrayDestroy", 12000, "cuArrayDestroy"),
    ] {
        assert_eq!(find(name, version), (0, address(symbol), 0), "{name}");
    }
    let null = std::ptr::null_mut();
    assert_eq!(find("cuFlyToTheMoon", 12000), (0, null, 1));
    // Other libraries' functions are not the driver's: this is one of libc.
    assert_eq!(find("cuserid", 12000), (0, null, 1));
    // With an affinity: not there, and not to be taken for the one without.
    assert_eq!(find("cuCtxCreate", 11040), (0, null, 1));
    assert_eq!(find("cuGetProcAddress", 11000), (0, null, 2));
    assert_eq!(
        find("cuInit", 13000).0,
        CUresult::CUDA_ERROR_INVALID_VALUE as u32
    );

    // What exists only to be linked against refuses every call.
    type Refuse = unsafe extern "C" fn(usize) -> u32;
    for name in [
        "cuArrayDestroy",
        "cuLinkDestroy",
        "cuGraphGetNodes",
        "cuMemAllocManaged",
    ] {
        // SAFETY: the functions read no argument.
        let code = unsafe { std::mem::transmute::<*mut c_void, Refuse>(address(name))(0) };
        assert_eq!(code, CUresult::CUDA_ERROR_NOT_SUPPORTED as u32, "{name}");
    }
}

#[test]
fn occupancy_follows_threads_and_shared_memory() {
    let _turn = turn();
    let context = CudaContext::new(0).unwrap();
    let module = context.load_module(Ptx::from_src(BASIC)).unwrap();
    let saxpy = module.load_function("saxpy").unwrap();
    // An eighth of 164 KiB, of which each block's first KiB is the system's.
    let left = saxpy.occupancy_available_dynamic_smem_per_block(8, 256);
    assert_eq!(left, Ok((164 << 10) / 8 - 1024));
    assert!(
        saxpy
            .occupancy_available_dynamic_smem_per_block(9, 256)
            .is_err()
    );
    let blocks = saxpy.occupancy_max_active_blocks_per_multiprocessor(256, left.unwrap(), None);
    assert_eq!(blocks, Ok(8));
    // With 100 bytes a thread, 3 blocks of 544 threads are the most that fit; of smaller blocks, 5
    // of 320.
    extern "C" fn shared(threads: i32) -> usize {
        100 * threads as usize
    }
    let best = saxpy.occupancy_max_potential_block_size(shared, 0, 0, None);
    assert_eq!(best, Ok((3 * 108, 544)));
    let best = saxpy.occupancy_max_potential_block_size(shared, 0, 500, None);
    assert_eq!(best, Ok((5 * 108, 320)));
}
