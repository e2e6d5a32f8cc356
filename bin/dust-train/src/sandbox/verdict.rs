//! From what a box did to a verdict.

use serde::Deserialize;
use serde_json::Value;

use super::data::{Data, Tuples};
use super::stdout::same_output;
use super::supervise::{Running, Stop};
use super::{Limits, Verdict};

/// The frame that a box sends: a value or what it raised.
#[derive(Deserialize)]
struct Answer {
    #[serde(default, deserialize_with = "present")]
    v: Option<Value>,
    #[serde(default)]
    e: Option<(String, String)>,
}

/// `null` is an answer, too.
fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

/// How a run came out, before anything is compared.
pub(super) enum Ran {
    /// To its end.
    Cleanly,
    /// Not so.
    Badly(Verdict),
    /// Not so, and not through its own doing.
    Trouble(String),
}

/// Judges everything but the answer.
pub(super) fn ran(running: &Running, stop: Option<Stop>, limits: &Limits, oom_kills: u64) -> Ran {
    let exit = running.exit.clone().unwrap_or_default();
    if !running.started() {
        let text = String::from_utf8_lossy(&running.stderr.bytes);
        return Ran::Trouble(match text.trim() {
            "" => "the box ended before the program could start".into(),
            text => text.into(),
        });
    }
    let failed =
        oom_kills > 0 && !(libc::WIFEXITED(exit.status) && libc::WEXITSTATUS(exit.status) == 0);
    if failed && stop != Some(Stop::Answered) {
        return Ran::Badly(Verdict::Memory);
    }
    match stop {
        Some(Stop::Answered) if running.lap_cpu_s() > limits.cpu_s => Ran::Badly(Verdict::Timeout),
        Some(Stop::Answered) => Ran::Cleanly,
        Some(Stop::Timeout) => Ran::Badly(Verdict::Timeout),
        Some(Stop::Memory) => Ran::Badly(Verdict::Memory),
        Some(Stop::OutputLimit) => Ran::Badly(Verdict::OutputLimit),
        Some(Stop::Starved) => Ran::Trouble("the host is too loaded to run the program".into()),
        None if running.stdout.overflowed || running.result.overflowed => {
            Ran::Badly(Verdict::OutputLimit)
        }
        None if running.lap_cpu_s() > limits.cpu_s => Ran::Badly(Verdict::Timeout),
        None if libc::WIFSIGNALED(exit.status) => match libc::WTERMSIG(exit.status) {
            libc::SIGSYS => Ran::Badly(Verdict::Denied),
            libc::SIGXCPU => Ran::Badly(Verdict::Timeout),
            // Inside, nobody can send it to the first process: it is its namespace's init.
            libc::SIGKILL => Ran::Trouble("the box was killed from outside".into()),
            _ => Ran::Badly(Verdict::RuntimeError),
        },
        None if libc::WEXITSTATUS(exit.status) != 0 => Ran::Badly(match answer(running) {
            Some(Answer {
                e: Some((kind, _)), ..
            }) => raised(&kind),
            _ => Verdict::RuntimeError,
        }),
        None => Ran::Cleanly,
    }
}

fn answer(running: &Running) -> Option<Answer> {
    running.answer().and_then(parsed)
}

fn parsed(frame: &[u8]) -> Option<Answer> {
    serde_json::from_slice(frame).ok()
}

/// The verdict on an exception. The program names it, so this only ever chooses among failures.
fn raised(kind: &str) -> Verdict {
    match kind {
        "MemoryError" => Verdict::Memory,
        "PermissionError" => Verdict::Denied,
        "NotPlainData" => Verdict::WrongAnswer,
        _ => Verdict::RuntimeError,
    }
}

/// What a script printed.
pub(super) fn printed(running: &Running, expected: &str) -> Verdict {
    match std::str::from_utf8(&running.stdout.bytes) {
        Ok(printed) => compared(printed, expected),
        Err(_) => Verdict::WrongAnswer,
    }
}

/// Printed text against what is expected.
pub(super) fn compared(printed: &str, expected: &str) -> Verdict {
    if same_output(printed, expected) {
        Verdict::Passed
    } else {
        Verdict::WrongAnswer
    }
}

/// What a script printed, where it is the box that collects it.
pub(super) fn collected(running: &Running) -> Result<String, Verdict> {
    match answer(running) {
        Some(Answer {
            v: Some(value),
            e: None,
        }) => Data::from_answer(&value)
            .and_then(|data| data.text())
            .ok_or(Verdict::WrongAnswer),
        Some(Answer {
            e: Some((kind, _)), ..
        }) => Err(raised(&kind)),
        _ => Err(Verdict::RuntimeError),
    }
}

/// What a function returned.
pub(super) fn returned(running: &Running, expected: &Data, tuples: Tuples) -> Verdict {
    // It may have ended without an answer.
    running.answer().map_or(Verdict::RuntimeError, |frame| {
        answered(frame, expected, tuples)
    })
}

/// What a frame says, which may be anything at all.
pub(super) fn answered(frame: &[u8], expected: &Data, tuples: Tuples) -> Verdict {
    match parsed(frame) {
        Some(Answer {
            v: Some(value),
            e: None,
        }) => match Data::from_answer(&value) {
            Some(value) if value.equals(expected, tuples) => Verdict::Passed,
            _ => Verdict::WrongAnswer,
        },
        Some(Answer {
            e: Some((kind, _)), ..
        }) => raised(&kind),
        _ => Verdict::RuntimeError,
    }
}

/// What the trusted half of an assertion test says. `Err` is the test's own fault.
pub(super) fn asserted(tests: &Running) -> Result<Verdict, String> {
    match answer(tests) {
        Some(Answer {
            v: Some(Value::Bool(true)),
            e: None,
        }) => Ok(Verdict::Passed),
        Some(Answer {
            e: Some((kind, message)),
            ..
        }) => match kind.as_str() {
            "Unsupported" => Err(format!("the test cannot be run: {message}")),
            "AssertionError" => Ok(Verdict::WrongAnswer),
            "CandidateError" => Ok(raised(message.split(':').next().unwrap_or_default())),
            _ => Ok(Verdict::RuntimeError),
        },
        _ => Ok(Verdict::RuntimeError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &[u8] = br#"{"v": {"d": [["a", {"t": [1, {"f": 4607182418800017408}]}]]}}"#;

    fn judged(frame: &[u8]) -> Verdict {
        let expected = Data::from_json(r#"{"a": [1, 1.0]}"#).unwrap();
        answered(frame, &expected, Tuples::Anywhere)
    }

    #[test]
    fn frames_are_values_exceptions_or_rubbish() {
        assert_eq!(judged(GOOD), Verdict::Passed);
        for (frame, verdict) in [
            (&br#"{"v": 1}"#[..], Verdict::WrongAnswer),
            (br#"{"v": null}"#, Verdict::WrongAnswer),
            (br#"{"v": 1, "e": ["MemoryError", ""]}"#, Verdict::Memory),
            (br#"{"e": ["PermissionError", ""]}"#, Verdict::Denied),
            (br#"{"e": ["Passed", ""]}"#, Verdict::RuntimeError),
            (br#"{"e": "x"}"#, Verdict::RuntimeError),
            (b"{}", Verdict::RuntimeError),
            (b"", Verdict::RuntimeError),
            (b"\xff", Verdict::RuntimeError),
        ] {
            assert_eq!(judged(frame), verdict, "{}", String::from_utf8_lossy(frame));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_pass_or_panic(frame in proptest::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_ne!(judged(&frame), Verdict::Passed);
        }

        #[test]
        fn no_mutation_panics(at in 0..GOOD.len(), byte in any::<u8>()) {
            let mut frame = GOOD.to_vec();
            frame[at] = byte;
            let _ = judged(&frame);
        }
    }
}
