//! Stream capture: the work of one or more streams goes to a graph instead of being done.
//!
//! Streams join a capture by waiting for an event that was recorded in it, and must be waited for
//! by the stream where it began before it ends. What CUDA forbids meanwhile fails, and invalidates
//! the captures that it would have disturbed: they give no graph. Where CUDA's documentation is
//! silent on whether a call is safe, or whether its failure invalidates, the answer here is the
//! strict one.

use super::{CUresult, E, Handle, State, Stream, Work, error, put, within};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_uint;
use std::thread::ThreadId;

const GLOBAL: c_uint = 0;
const RELAXED: c_uint = 2;

/// How much a stream has seen of each stream of its capture.
pub type Seen = HashMap<Handle, usize>;

/// Work that is being captured.
pub struct Capture {
    /// The stream where it began and must end.
    origin: Handle,
    mode: c_uint,
    thread: ThreadId,
    invalidated: bool,
    work: Vec<Work>,
    streams: HashMap<Handle, Seen>,
}

/// What an event knows that was recorded in a capture.
pub struct Captured {
    capture: Handle,
    seen: Seen,
}

thread_local! {
    /// This thread's mode of interaction with captures.
    static MODE: Cell<c_uint> = const { Cell::new(GLOBAL) };
}

fn me() -> ThreadId {
    std::thread::current().id()
}

impl Capture {
    pub fn work(&self) -> &[Work] {
        &self.work
    }

    /// Whether potentially unsafe calls of this thread would disturb it.
    fn forbids_unsafe_calls(&self) -> bool {
        match (self.thread == me(), MODE.get()) {
            (_, RELAXED) => false,
            (true, _) => self.mode != RELAXED,
            (false, mode) => mode == GLOBAL && self.mode == GLOBAL,
        }
    }

    /// Adds work of a stream.
    pub fn push(&mut self, stream: Handle, work: Work) {
        self.work.push(work);
        self.step(stream);
    }

    /// A step of a stream, which what waits for the stream from now on has seen.
    fn step(&mut self, stream: Handle) {
        let seen = self.streams.entry(stream).or_default();
        *seen.entry(stream).or_default() += 1;
    }
}

impl State {
    /// Invalidates the captures that `disturbed` picks; whether there were any.
    fn invalidate(&mut self, disturbed: impl Fn(Handle, &Capture) -> bool) -> bool {
        let mut any = false;
        for (id, capture) in &mut self.captures {
            if disturbed(*id, capture) {
                capture.invalidated = true;
                any = true;
            }
        }
        any
    }

    /// Refuses a call that belongs to one capture, and invalidates it.
    pub fn spoil(&mut self, capture: Handle, error: E, why: &str) -> E {
        self.invalidate(|id, _| id == capture);
        error::refuse(error, format!("{why}; the capture is invalidated"))
    }

    /// Refuses what is not ordered by streams while a capture forbids it to this thread.
    pub fn unsafe_call(&mut self, what: &str) -> Result<(), E> {
        if self.invalidate(|_, c| c.forbids_unsafe_calls()) {
            let why = format!("{what} while a capture forbids it; the capture is invalidated");
            return Err(error::refuse(E::CaptureUnsupported, why));
        }
        Ok(())
    }

    /// Refuses use of a context's legacy stream while a blocking stream there is captured, on
    /// which it would depend.
    pub fn legacy_use(&mut self, context: Handle) -> Result<(), E> {
        let blocking: Vec<Handle> = self
            .streams
            .values()
            .filter(|s| s.context == context && !s.non_blocking())
            .filter_map(|s| s.capture)
            .collect();
        if self.invalidate(|id, _| blocking.contains(&id)) {
            let why = "the legacy stream is used while a blocking stream is captured; \
                       the capture is invalidated";
            return Err(error::refuse(E::CaptureImplicit, why));
        }
        Ok(())
    }

    /// Refuses to wait for a context, or ask about it, while a stream there is captured.
    pub fn context_is_idle(&mut self, context: Handle) -> Result<(), E> {
        let captured: Vec<Handle> = self
            .streams
            .values()
            .filter(|s| s.context == context)
            .filter_map(|s| s.capture)
            .collect();
        if self.invalidate(|id, _| captured.contains(&id)) {
            let why = "the context is waited for while a stream is captured; \
                       the capture is invalidated";
            return Err(error::refuse(E::CaptureUnsupported, why));
        }
        self.unsafe_call("waiting for a context")
    }

    /// Refuses to wait for a stream, or ask about it, while it is captured.
    pub fn stream_is_idle(&mut self, stream: Handle) -> Result<(), E> {
        let capture = self.stream(stream)?.capture;
        match capture {
            Some(id) if self.captures[&id].invalidated => Err(E::CaptureInvalidated),
            Some(id) => {
                let why = "a captured stream is waited for, asked about or destroyed";
                Err(self.spoil(id, E::CaptureUnsupported, why))
            }
            None => self.unsafe_call("waiting for a stream"),
        }
    }

    /// Refuses to wait for an event, or ask about it, that was recorded in a capture.
    pub fn event_is_idle(&mut self, event: Handle) -> Result<(), E> {
        let event = self.events.get(&event).ok_or(E::InvalidHandle)?;
        if let Some(captured) = &event.captured {
            let why = "an event that was recorded in a captured stream is waited for or asked";
            return Err(self.spoil(captured.capture, E::CapturedEvent, why));
        }
        self.unsafe_call("waiting for an event")
    }

    /// The capture that a stream's work goes to, if any, while it is good.
    pub fn capture_of(&mut self, stream: Handle) -> Result<Option<&mut Capture>, E> {
        let Some(id) = self.stream(stream)?.capture else {
            return Ok(None);
        };
        let capture = self.captures.get_mut(&id).ok_or(E::InvalidHandle)?;
        if capture.invalidated {
            return Err(E::CaptureInvalidated);
        }
        Ok(Some(capture))
    }

    /// Notes in an event what a stream's capture has come to; none if it is not captured.
    pub fn captured(&mut self, stream: Handle) -> Result<Option<Captured>, E> {
        let id = self.stream(stream)?.capture;
        let Some(capture) = self.capture_of(stream)? else {
            return Ok(None);
        };
        let seen = capture.streams.get(&stream).cloned().unwrap_or_default();
        Ok(id.map(|capture| Captured { capture, seen }))
    }

    /// Lets a stream wait for an event: streams of captures join, within a capture alone.
    pub fn wait(&mut self, stream: Handle, event: Handle) -> Result<(), E> {
        let event = self.events.get(&event).ok_or(E::InvalidHandle)?;
        let recorded = event.recorded.is_some();
        let there = event.captured.as_ref();
        let there = there.map(|c| (c.capture, c.seen.clone()));
        let Stream {
            capture, legacy, ..
        } = *self.stream(stream)?;
        match (capture, there) {
            // Work runs in order of submission, so that the event's has been done already.
            (None, None) => Ok(()),
            (Some(id), None) if recorded => {
                let why = "a captured stream waits for an event of outside of the capture";
                Err(self.spoil(id, E::CaptureIsolation, why))
            }
            (Some(_), None) => Ok(()),
            (None, Some((id, _))) if !self.captures.contains_key(&id) => {
                let why = "a stream waits for an event of a capture that has ended";
                Err(error::refuse(E::CapturedEvent, why))
            }
            (None, Some((id, _))) if legacy => {
                let why = "the legacy stream waits for an event of a capture";
                Err(self.spoil(id, E::CaptureImplicit, why))
            }
            (None, Some((id, seen))) => {
                let to = self.captures.get_mut(&id).ok_or(E::InvalidHandle)?;
                if to.invalidated {
                    return Err(E::CaptureInvalidated);
                }
                to.streams.insert(stream, seen);
                to.step(stream);
                self.stream(stream)?.capture = Some(id);
                Ok(())
            }
            (Some(here), Some((id, seen))) if here == id => {
                if let Some(capture) = self.capture_of(stream)? {
                    let own = capture.streams.entry(stream).or_default();
                    for (other, steps) in seen {
                        let known = own.entry(other).or_default();
                        *known = steps.max(*known);
                    }
                }
                Ok(())
            }
            (Some(here), Some((id, _))) => {
                let error = match self.captures.contains_key(&id) {
                    true => E::CaptureMerge,
                    false => E::CaptureIsolation,
                };
                self.invalidate(|c, _| c == id);
                let why = "a captured stream waits for an event of another capture";
                Err(self.spoil(here, error, why))
            }
        }
    }

    fn begin_capture(&mut self, stream: Handle, mode: c_uint) -> Result<(), E> {
        if mode > RELAXED {
            return Err(E::InvalidValue);
        }
        let Stream {
            capture, legacy, ..
        } = *self.stream(stream)?;
        if legacy {
            let why = "the legacy stream cannot be captured";
            return Err(error::refuse(E::CaptureUnsupported, why));
        }
        if let Some(id) = capture {
            return Err(self.spoil(id, E::IllegalState, "the stream is captured already"));
        }
        let id = self.handle();
        let capture = Capture {
            origin: stream,
            mode,
            thread: me(),
            invalidated: false,
            work: Vec::new(),
            streams: HashMap::from([(stream, Seen::new())]),
        };
        self.captures.insert(id, capture);
        self.stream(stream)?.capture = Some(id);
        Ok(())
    }

    fn end_capture(&mut self, stream: Handle) -> Result<Vec<Work>, E> {
        let id = self.stream(stream)?.capture.ok_or(E::IllegalState)?;
        let capture = self.captures.get(&id).ok_or(E::InvalidHandle)?;
        if capture.origin != stream {
            let why = "a capture is ended on another stream than it began on";
            return Err(self.spoil(id, E::CaptureUnmatched, why));
        }
        if capture.mode != RELAXED && capture.thread != me() {
            let why = "a capture is ended by another thread than began it";
            return Err(self.spoil(id, E::CaptureWrongThread, why));
        }
        let capture = self.captures.remove(&id).ok_or(E::InvalidHandle)?;
        for stream in self.streams.values_mut() {
            stream.capture = stream.capture.filter(|c| *c != id);
        }
        let known = &capture.streams[&stream];
        let unjoined = capture.streams.iter().any(|(other, seen)| {
            *other != stream && known.get(other).unwrap_or(&0) < seen.get(other).unwrap_or(&0)
        });
        if !capture.invalidated && !unjoined {
            return Ok(capture.work);
        }
        self.forget_frees(&capture.work);
        self.sweep_graph_memory();
        if capture.invalidated {
            return Err(E::CaptureInvalidated);
        }
        let why = "the capture ends before its first stream has waited for the others";
        Err(error::refuse(E::CaptureUnjoined, why))
    }
}

/// Starts recording a stream's work instead of doing it.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) -> CUresult {
    within(|s, _| {
        let stream = s.resolve(stream)?;
        s.begin_capture(stream, mode)
    })
}

/// # Safety
/// As in CUDA: `graph` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> CUresult {
    within(|s, context| {
        // SAFETY: the caller's.
        unsafe { put(graph, 0) }?;
        let stream = s.resolve(stream)?;
        let work = s.end_capture(stream)?;
        let handle = s.add_graph(context, work);
        // SAFETY: the caller's.
        unsafe { put(graph, handle) }
    })
}

/// # Safety
/// As in CUDA: `status` is valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) -> CUresult {
    within(|s, context| {
        let stream = s.resolve(stream)?;
        let Stream {
            capture, legacy, ..
        } = *s.stream(stream)?;
        // Alone of all uses of the legacy stream, the question does no harm.
        let implicit =
            |s: &Stream| legacy && s.context == context && !s.non_blocking() && s.capture.is_some();
        if s.streams.values().any(implicit) {
            return Err(E::CaptureImplicit);
        }
        let now = match capture.and_then(|id| s.captures.get(&id)) {
            None => 0,
            Some(capture) if capture.invalidated => 2,
            Some(_) => 1,
        };
        // SAFETY: the caller's.
        unsafe { put(status, now) }
    })
}

/// Sets how this thread minds captures, and gives how it did.
///
/// # Safety
/// As in CUDA: `mode` is valid for reading and writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) -> CUresult {
    super::with(|_| {
        // SAFETY: the caller's.
        let Some(mode) = (unsafe { mode.as_mut() }) else {
            return Err(E::InvalidValue);
        };
        if *mode > RELAXED {
            return Err(E::InvalidValue);
        }
        *mode = MODE.replace(*mode);
        Ok(())
    })
}
