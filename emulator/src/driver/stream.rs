//! Streams and events.

use super::{CUresult, E, Event, Handle, State, Stream, Work, error, put, with, within};

use std::ffi::{c_int, c_uint, c_void};
use std::time::Instant;

/// CUDA's flag of records and waits: in a capture they are nodes of the graph.
const EXTERNAL: c_uint = 1;

impl State {
    pub fn add_stream(
        &mut self,
        context: Handle,
        flags: c_uint,
        priority: c_int,
        legacy: bool,
    ) -> Handle {
        let handle = self.handle();
        let stream = Stream {
            context,
            flags,
            priority,
            legacy,
            capture: None,
        };
        self.streams.insert(handle, stream);
        handle
    }
}

/// # Safety
/// As in CUDA: `stream` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    flags: c_uint,
    priority: c_int,
) -> CUresult {
    within(|s, context| {
        let handle = s.add_stream(context, flags, priority, false);
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
    within(|s, _| {
        if s.stream(stream)?.capture.is_some() {
            s.stream_is_idle(stream)?;
        }
        s.streams.remove(&stream);
        Ok(())
    })
}

fn idle(stream: Handle) -> CUresult {
    within(|s, _| {
        let stream = s.use_stream(stream)?;
        s.stream_is_idle(stream)
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

/// Work runs in order of submission, so that only captures have to be told.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) -> CUresult {
    within(|s, _| {
        let stream = s.use_stream(stream)?;
        if flags & EXTERNAL == 0 {
            return s.wait(stream, event);
        }
        let known = s.events.contains_key(&event);
        known.then_some(()).ok_or(E::InvalidHandle)?;
        s.capture_of(stream)?.map(|_| ()).ok_or(E::InvalidValue)
    })
}

/// # Safety
/// As in CUDA: `flags` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) -> CUresult {
    // SAFETY: the caller's.
    within(|s, _| unsafe {
        let stream = s.resolve(stream)?;
        put(flags, s.stream(stream)?.flags)
    })
}

/// # Safety
/// As in CUDA: `priority` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) -> CUresult {
    // SAFETY: the caller's.
    within(|s, _| unsafe {
        let stream = s.resolve(stream)?;
        put(priority, s.stream(stream)?.priority)
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
    within(|s, _| {
        let stream = s.use_stream(stream)?;
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
    within(|s, context| {
        let handle = s.handle();
        s.events.insert(
            handle,
            Event {
                context,
                recorded: None,
                captured: None,
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
    within(|s, _| s.events.remove(&event).map(|_| ()).ok_or(E::InvalidHandle))
}

/// Notes the time, or what a capture has come to.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> CUresult {
    cuEventRecordWithFlags(event, stream, 0)
}

/// As [`cuEventRecord`]; a graph that captures an external record notes the time when it runs.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) -> CUresult {
    within(|s, _| {
        let stream = s.use_stream(stream)?;
        let context = s.stream(stream)?.context;
        let it = s.events.get(&event).ok_or(E::InvalidHandle)?;
        if it.context != context {
            let why = "an event is recorded in a stream of another context";
            return Err(error::refuse(E::InvalidHandle, why));
        }
        if flags & EXTERNAL != 0 {
            let capture = s.capture_of(stream)?.ok_or(E::InvalidValue)?;
            capture.push(stream, Work::Record(event));
            return Ok(());
        }
        let captured = s.captured(stream)?;
        let it = s.events.get_mut(&event).ok_or(E::InvalidHandle)?;
        it.recorded = captured.is_none().then(Instant::now);
        it.captured = captured;
        Ok(())
    })
}

/// Asks whether an event has come: it always has.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> CUresult {
    with(|s| s.event_is_idle(event))
}

/// Waits for an event: gives the error that a kernel left.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> CUresult {
    within(|s, _| s.event_is_idle(event))
}

/// # Safety
/// As in CUDA: `ms` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) -> CUresult {
    within(|s, _| {
        let mut time = |e| -> Result<(Handle, Instant), E> {
            s.event_is_idle(e)?;
            let event = s.events.get(&e).ok_or(E::InvalidHandle)?;
            if !event.timing {
                return Err(E::InvalidHandle);
            }
            let at = event.recorded.ok_or(E::InvalidHandle)?;
            Ok((event.context, at))
        };
        let ((of, a), (also_of, b)) = (time(start)?, time(end)?);
        if of != also_of {
            return Err(E::InvalidHandle);
        }
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
