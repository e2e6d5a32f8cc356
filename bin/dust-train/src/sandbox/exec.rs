//! `dust-train exec`: the sandbox for people and for other tools, as JSON.

use std::io::{BufRead, Read, Write};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Effective, Grading, Limits, Mode, Program, Sandbox, Test, TestOutcome, Verdict};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request<'a> {
    /// Comes back with the answer.
    id: Option<Value>,
    source: String,
    mode: Mode,
    entry_point: Option<String>,
    #[serde(borrow, default)]
    tests: Vec<RequestTest<'a>>,
    test_code: Option<String>,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    grading: Grading,
    stop_at_first_failure: Option<bool>,
}

/// The values stay text, so that integers of any size survive.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestTest<'a> {
    #[serde(borrow)]
    input: &'a RawValue,
    #[serde(borrow)]
    output: &'a RawValue,
}

#[derive(Serialize)]
struct Reply<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    verdict: Verdict,
    failed_test: Option<usize>,
    tests: Vec<TestOutcome>,
    effective: &'a Effective,
}

#[derive(Serialize)]
struct Refusal {
    error: String,
}

/// Reads one request, writes one reply. An error means that there is no verdict.
pub fn exec(sandbox: &Sandbox, mut input: impl Read, mut output: impl Write) -> Result<()> {
    let mut text = String::new();
    input
        .read_to_string(&mut text)
        .context("exec: stdin is not UTF-8 text")?;
    let reply = answer(sandbox, &text)?;
    writeln!(output, "{reply}").context("exec: cannot write the reply")
}

/// Reads requests, one a line, and writes replies, one a line, as they are ready: many at a time,
/// so give each request an `id`. A line that is no request is answered with `{"error": …}`.
pub fn serve(
    sandbox: &Sandbox,
    input: impl BufRead + Send,
    output: impl Write + Send,
) -> Result<()> {
    let lines = Mutex::new(input.lines());
    let output = Mutex::new(output);
    let next = || lines.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<()> {
        while let Some(line) = next() {
            let line = line.context("exec: stdin is not UTF-8 text")?;
            if line.trim().is_empty() {
                continue;
            }
            let reply = match answer(sandbox, &line) {
                Ok(reply) => reply,
                Err(error) => serde_json::to_string(&Refusal {
                    error: format!("{error:#}"),
                })?,
            };
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            writeln!(output, "{reply}").context("exec: cannot write the reply")?;
            output.flush().context("exec: cannot write the reply")?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..sandbox.effective().workers)
            .map(|_| scope.spawn(work))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| anyhow::bail!("exec: a worker broke down"))
        })
    })
}

/// A request that makes sense.
#[derive(Debug)]
pub(super) struct Work {
    id: Option<Value>,
    program: Program,
    limits: Limits,
    grading: Grading,
    all_tests: bool,
}

impl Work {
    pub fn parse(text: &str) -> Result<Self> {
        let request: Request = serde_json::from_str(text).context("exec: not a request")?;
        request.limits.check().context("exec")?;
        let tests = request.tests.iter().enumerate().map(|(index, test)| {
            Ok(match request.mode {
                Mode::Stdin => {
                    let text = |value: &RawValue, field: &str| {
                        serde_json::from_str::<String>(value.get()).with_context(|| {
                            format!("exec: tests[{index}].{field}: stdin mode wants a string")
                        })
                    };
                    Test {
                        input: text(test.input, "input")?,
                        output: text(test.output, "output")?,
                    }
                }
                _ => Test {
                    input: test.input.get().into(),
                    output: test.output.get().into(),
                },
            })
        });
        Ok(Self {
            program: Program {
                tests: tests.collect::<Result<_>>()?,
                source: request.source,
                mode: request.mode,
                entry_point: request.entry_point,
                test_code: request.test_code,
            },
            id: request.id,
            limits: request.limits,
            grading: request.grading,
            all_tests: !request.stop_at_first_failure.unwrap_or(true),
        })
    }
}

fn answer(sandbox: &Sandbox, text: &str) -> Result<String> {
    let work = Work::parse(text)?;
    let outcome = sandbox.run_with(&work.program, &work.limits, work.grading, work.all_tests);
    let reply = Reply {
        id: work.id,
        verdict: outcome.verdict,
        failed_test: outcome.failed_test,
        tests: outcome.tests,
        effective: sandbox.effective(),
    };
    Ok(serde_json::to_string(&reply)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"id": 1, "source": "x", "mode": "function", "entry_point": "f", "tests": [{"input": [1], "output": 123456789012345678901234567890}], "limits": {"cpu_s": 1}, "grading": "lcb-strict"}"#;

    #[test]
    fn numbers_keep_every_digit() {
        let work = Work::parse(GOOD).unwrap();
        assert_eq!(
            work.program.tests[0].output,
            "123456789012345678901234567890"
        );
        assert_eq!(work.grading, Grading::LcbStrict);
        assert!(!work.all_tests);
    }

    #[test]
    fn limits_that_no_machine_has_are_refused() {
        for (limit, value) in [
            ("cpu_s", "0"),
            ("cpu_s", "-1"),
            ("wall_s", "1e300"),
            ("memory_mb", "0"),
            ("memory_mb", "18446744073709551615"),
            ("output_bytes", "18446744073709551615"),
            ("processes", "4294967295"),
            ("files_mb", "18446744073709551615"),
        ] {
            let text = GOOD.replace("\"cpu_s\": 1", &format!("\"{limit}\": {value}"));
            let error = format!("{:#}", Work::parse(&text).unwrap_err());
            assert!(error.contains(limit), "{error} should name {limit}");
        }
    }

    proptest! {
        #[test]
        fn no_mutation_panics(at in 0..GOOD.len(), bytes in "\\PC{0,3}", cut in any::<bool>()) {
            let end = if cut { GOOD.len() } else { at + 1 };
            let _ = Work::parse(&format!("{}{bytes}{}", &GOOD[..at], &GOOD[end..]));
        }

        #[test]
        fn any_program_comes_through(source in ".{0,80}", input in ".{0,40}", output in ".{0,40}") {
            let request = serde_json::json!({
                "source": source, "mode": "stdin", "tests": [{"input": input, "output": output}],
            });
            let work = Work::parse(&request.to_string()).unwrap();
            prop_assert_eq!(work.program.source, source);
            prop_assert_eq!(&work.program.tests[0], &Test::stdin(input, output));
        }
    }
}
