//! `dust-train exec`: the sandbox for people and for other tools, as JSON.

use std::io::{BufRead, Read, Write};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
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

fn answer(sandbox: &Sandbox, text: &str) -> Result<String> {
    let request: Request = serde_json::from_str(text).context("exec: not a request")?;
    let limits = request.limits;
    for (name, value) in [("cpu_s", limits.cpu_s), ("wall_s", limits.wall_s)] {
        ensure!(
            value > 0.0 && value <= 86_400.0,
            "exec: limits.{name} is {value}: give seconds, up to a day"
        );
    }
    ensure!(
        (1..=1 << 20).contains(&limits.memory_mb) && limits.files_mb <= 1 << 20,
        "exec: limits.memory_mb and limits.files_mb go up to {}",
        1 << 20
    );
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
    let program = Program {
        tests: tests.collect::<Result<_>>()?,
        source: request.source,
        mode: request.mode,
        entry_point: request.entry_point,
        test_code: request.test_code,
    };
    let all_tests = !request.stop_at_first_failure.unwrap_or(true);
    let outcome = sandbox.run_with(&program, &limits, request.grading, all_tests);
    let reply = Reply {
        id: request.id,
        verdict: outcome.verdict,
        failed_test: outcome.failed_test,
        tests: outcome.tests,
        effective: sandbox.effective(),
    };
    Ok(serde_json::to_string(&reply)?)
}
