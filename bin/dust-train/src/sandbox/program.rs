//! What goes into the sandbox and what comes out.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// How a program is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A script that reads stdin and prints.
    Stdin,
    /// A function (or a method of `class Solution`) that takes arguments and returns a value.
    Function,
    /// Test code that calls the program's functions and asserts.
    Assert,
}

/// A program and its tests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Python.
    pub source: String,
    /// How it is tested.
    pub mode: Mode,
    /// The function under test; needed for [`Mode::Function`] and for a `check(candidate)`.
    #[serde(default)]
    pub entry_point: Option<String>,
    /// The tests of [`Mode::Stdin`] and [`Mode::Function`].
    #[serde(default)]
    pub tests: Vec<Test>,
    /// The test of [`Mode::Assert`]: defines `check(candidate)`, or is a list of plain asserts.
    /// It runs in a process of its own, so helpers that it takes from the prompt must be in it.
    #[serde(default)]
    pub test_code: Option<String>,
}

/// One test, as text so that integers of any size survive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// The whole of stdin, or a JSON array of positional arguments.
    pub input: String,
    /// The whole of stdout, or one JSON value.
    pub output: String,
}

impl Test {
    /// A test of a script.
    pub fn stdin(input: impl Into<String>, output: impl Into<String>) -> Self {
        Self {
            input: input.into(),
            output: output.into(),
        }
    }

    /// A test of a function.
    pub fn function(arguments: &[serde_json::Value], output: &serde_json::Value) -> Self {
        Self {
            input: serde_json::Value::from(arguments).to_string(),
            output: output.to_string(),
        }
    }
}

/// What each test of a program may use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// CPU time of all its processes together, in seconds. This is what decides a timeout.
    pub cpu_s: f64,
    /// Time by the clock, without what the host made it wait for a core.
    pub wall_s: f64,
    /// Memory of all its processes together, files in its scratch folder included.
    pub memory_mb: u64,
    /// Bytes that it may print, and bytes that it may return.
    pub output_bytes: u64,
    /// Processes and threads.
    pub processes: u32,
    /// Size of its scratch folder.
    pub files_mb: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_s: 10.0,
            wall_s: 30.0,
            memory_mb: 512,
            output_bytes: 16 << 20,
            processes: 64,
            files_mb: 64,
        }
    }
}

impl Limits {
    /// Refuses what no program can be held to.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("cpu_s", self.cpu_s), ("wall_s", self.wall_s)] {
            ensure!(
                value > 0.0 && value <= 86_400.0,
                "limits.{name} is {value}: give seconds, up to a day"
            );
        }
        let mebibytes = 1..=1 << 20;
        ensure!(
            mebibytes.contains(&self.memory_mb),
            "limits.memory_mb is {}: give mebibytes, up to {}",
            self.memory_mb,
            mebibytes.end()
        );
        ensure!(
            self.files_mb <= *mebibytes.end(),
            "limits.files_mb is {}: give mebibytes, up to {}",
            self.files_mb,
            mebibytes.end()
        );
        ensure!(
            self.output_bytes <= 1 << 30,
            "limits.output_bytes is {}: give bytes, up to {}",
            self.output_bytes,
            1 << 30
        );
        ensure!(
            (1..=1 << 15).contains(&self.processes),
            "limits.processes is {}: give a number up to {}",
            self.processes,
            1 << 15
        );
        Ok(())
    }
}

/// What became of a program or a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every test passed.
    Passed,
    /// It answered, and the answer is not the expected one.
    WrongAnswer,
    /// It raised, crashed, exited with a failure or ended without an answer.
    RuntimeError,
    /// It used up its CPU time, or the clock ran out while it slept.
    Timeout,
    /// It wanted more memory than it may have.
    Memory,
    /// It printed or returned more than it may.
    OutputLimit,
    /// It tried something that the sandbox forbids, and died of it.
    Denied,
    /// The host or the test is at fault. Never a label.
    InfraError,
}

/// What became of one test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestOutcome {
    /// The verdict.
    pub verdict: Verdict,
    /// CPU time in milliseconds.
    pub cpu_ms: f64,
    /// Time by the clock in milliseconds.
    pub wall_ms: f64,
    /// Most memory held, in KiB.
    pub memory_kb: u64,
    /// What was printed, up to the limit.
    pub stdout: String,
    /// The first 64 KiB of what was written to stderr.
    pub stderr: String,
    /// What the infrastructure has to say, for [`Verdict::InfraError`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

impl TestOutcome {
    pub(super) fn trouble(trouble: String) -> Self {
        Self {
            verdict: Verdict::InfraError,
            cpu_ms: 0.0,
            wall_ms: 0.0,
            memory_kb: 0,
            stdout: String::new(),
            stderr: String::new(),
            trouble: Some(trouble),
        }
    }
}

/// What became of a program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// [`Verdict::Passed`] if every test passed, else that of the first test that did not.
    pub verdict: Verdict,
    /// Index of the first test that did not pass.
    pub failed_test: Option<usize>,
    /// The tests that ran, in order.
    pub tests: Vec<TestOutcome>,
    /// Most memory held by any test, in KiB.
    pub peak_memory_kb: u64,
}

impl Outcome {
    /// The label: `None` when nothing can be said about the program.
    pub fn label(&self) -> Option<bool> {
        (self.verdict != Verdict::InfraError).then_some(self.verdict == Verdict::Passed)
    }

    pub(super) fn from_tests(tests: Vec<TestOutcome>) -> Self {
        let failed_test = tests.iter().position(|t| t.verdict != Verdict::Passed);
        Self {
            verdict: failed_test.map_or(Verdict::Passed, |i| tests[i].verdict),
            failed_test,
            peak_memory_kb: tests.iter().map(|t| t.memory_kb).max().unwrap_or(0),
            tests,
        }
    }
}
