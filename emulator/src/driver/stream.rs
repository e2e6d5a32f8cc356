//! Streams, events, capture, graphs.

use super::{CUresult, E, Event, Handle, State, Stream, Work, error, put, with};
use std::ffi::{c_int, c_uint, c_void};
use std::time::Instant;

/// # Safety
/// As in CUDA: `stream` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    flags: c_uint,
    priority: c_int,
) -> CUresult {
    with(|s| {
        let handle = s.handle();
        s.streams.insert(
            handle,
            Stream {
                flags,
                priority,
                capture: None,
            },
        );
        // SAFETY: the caller's.
        unsafe { put(stream, handle) }
    })
}

/// # Safety
/// As in CUDA: `stream` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, flags: c_uint) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuStreamCreateWithPriority(stream, flags, 0) }
}

/// Destroys a stream.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> CUresult {
    with(|s| {
        s.streams
            .remove(&stream)
            .map(|_| ())
            .ok_or(E::InvalidHandle)
    })
}

fn idle(stream: Handle) -> CUresult {
    with(|s| match s.streams.get(&stream) {
        None => Err(E::InvalidHandle),
        Some(Stream {
            capture: Some(_), ..
        }) => Err(E::CaptureUnsupported),
        Some(_) => Ok(()),
    })
}

/// Waits for a stream: gives the error that a kernel left.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> CUresult {
    idle(stream)
}

/// Asks whether a stream is done: it always is.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Handle) -> CUresult {
    idle(stream)
}

/// Work runs in order of submission, so that the event's has been done already.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> CUresult {
    with(|s| {
        let known = s.streams.contains_key(&stream) && s.events.contains_key(&event);
        known.then_some(()).ok_or(E::InvalidHandle)
    })
}

/// # Safety
/// As in CUDA: `flags` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    with(|s| unsafe { put(flags, s.streams.get(&stream).ok_or(E::InvalidHandle)?.flags) })
}

/// # Safety
/// As in CUDA: `priority` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) -> CUresult {
    // SAFETY: the caller's.
    with(|s| unsafe {
        put(
            priority,
            s.streams.get(&stream).ok_or(E::InvalidHandle)?.priority,
        )
    })
}

/// # Safety
/// As in CUDA: `function` takes `data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: Option<unsafe extern "C" fn(*mut c_void)>,
    data: *mut c_void,
) -> CUresult {
    with(|s| {
        let function = function.ok_or(E::InvalidValue)?;
        s.submit(
            stream,
            Work::Call {
                function,
                data: data as usize,
            },
        )
    })
}

/// # Safety
/// As in CUDA: `event` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, flags: c_uint) -> CUresult {
    with(|s| {
        let handle = s.handle();
        s.events.insert(
            handle,
            Event {
                recorded: None,
                timing: flags & 2 == 0,
            },
        );
        // SAFETY: the caller's.
        unsafe { put(event, handle) }
    })
}

/// Destroys an event.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> CUresult {
    with(|s| s.events.remove(&event).map(|_| ()).ok_or(E::InvalidHandle))
}

/// Notes the time.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> CUresult {
    with(|s| {
        if !s.streams.contains_key(&stream) {
            return Err(E::InvalidHandle);
        }
        s.events.get_mut(&event).ok_or(E::InvalidHandle)?.recorded = Some(Instant::now());
        Ok(())
    })
}

/// Notes the time.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecordWithFlags(
    event: Handle,
    stream: Handle,
    _flags: c_uint,
) -> CUresult {
    cuEventRecord(event, stream)
}

/// Asks whether an event has come: it always has.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> CUresult {
    with(|s| s.events.get(&event).map(|_| ()).ok_or(E::InvalidHandle))
}

/// Waits for an event: gives the error that a kernel left.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> CUresult {
    cuEventQuery(event)
}

/// # Safety
/// As in CUDA: `ms` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) -> CUresult {
    with(|s| {
        let time = |e| -> Result<Instant, E> {
            let event = s.events.get(&e).ok_or(E::InvalidHandle)?;
            if !event.timing {
                return Err(E::InvalidHandle);
            }
            event.recorded.ok_or(E::InvalidHandle)
        };
        let (a, b) = (time(start)?, time(end)?);
        let forward = b.saturating_duration_since(a).as_secs_f32();
        let back = a.saturating_duration_since(b).as_secs_f32();
        // SAFETY: the caller's.
        unsafe { put(ms, (forward - back) * 1e3) }
    })
}

/// # Safety
/// As [`cuEventElapsedTime`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(
    ms: *mut f32,
    start: Handle,
    end: Handle,
) -> CUresult {
    // SAFETY: the same contract.
    unsafe { cuEventElapsedTime(ms, start, end) }
}

/// Starts recording a stream's work instead of doing it.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_uint) -> CUresult {
    with(|s| {
        if super::DEFAULT_STREAMS[..2].contains(&stream) {
            return Err(error::refuse(
                E::CaptureUnsupported,
                "the legacy stream cannot be captured",
            ));
        }
        let stream = s.streams.get_mut(&stream).ok_or(E::InvalidHandle)?;
        if stream.capture.is_some() {
            return Err(E::IllegalState);
        }
        stream.capture = Some(Vec::new());
        Ok(())
    })
}

/// # Safety
/// As in CUDA: `graph` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> CUresult {
    with(|s| {
        let stream = s.streams.get_mut(&stream).ok_or(E::InvalidHandle)?;
        let work = stream.capture.take().ok_or(E::IllegalState)?;
        let handle = s.handle();
        s.graphs.insert(handle, work);
        // SAFETY: the caller's.
        unsafe { put(graph, handle) }
    })
}

/// # Safety
/// As in CUDA: `status` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) -> CUresult {
    with(|s| {
        let stream = s.streams.get(&stream).ok_or(E::InvalidHandle)?;
        // SAFETY: the caller's.
        unsafe { put(status, stream.capture.is_some() as c_uint) }
    })
}

/// Capture modes change nothing here.
#[unsafe(no_mangle)]
pub extern "C" fn cuThreadExchangeStreamCaptureMode(_mode: *mut c_uint) -> CUresult {
    0
}

/// # Safety
/// As in CUDA: `graph` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphCreate(graph: *mut Handle, _flags: c_uint) -> CUresult {
    with(|s| {
        let handle = s.handle();
        s.graphs.insert(handle, Vec::new());
        // SAFETY: the caller's.
        unsafe { put(graph, handle) }
    })
}

/// # Safety
/// As in CUDA: `executable` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut Handle,
    graph: Handle,
    _flags: u64,
) -> CUresult {
    with(|s| {
        let work = s.graphs.get(&graph).ok_or(E::InvalidHandle)?.clone();
        let handle = s.handle();
        s.executables.insert(handle, work);
        // SAFETY: the caller's.
        unsafe { put(executable, handle) }
    })
}

/// Nothing needs to be prepared.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(executable: Handle, _stream: Handle) -> CUresult {
    with(|s| {
        s.executables
            .get(&executable)
            .map(|_| ())
            .ok_or(E::InvalidHandle)
    })
}

/// Does all of a graph's work.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> CUresult {
    with(|s: &mut State| {
        let work = s
            .executables
            .get(&executable)
            .ok_or(E::InvalidHandle)?
            .clone();
        for item in work {
            s.submit(stream, item)?;
            if s.failed.is_some() {
                break;
            }
        }
        Ok(())
    })
}

/// Destroys a graph.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: Handle) -> CUresult {
    with(|s| s.graphs.remove(&graph).map(|_| ()).ok_or(E::InvalidHandle))
}

/// Destroys an instantiated graph.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: Handle) -> CUresult {
    with(|s| {
        s.executables
            .remove(&executable)
            .map(|_| ())
            .ok_or(E::InvalidHandle)
    })
}
