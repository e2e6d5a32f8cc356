//! One worker: a warm interpreter, and the running of one test at a time in it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde_json::value::RawValue;

use super::data::{Data, Tuples};
use super::launch::{Launched, clear, launch, launch_answering, memory_file, null};
use super::supervise::{Running, Stop, supervise};
use super::verdict::{self, Ran};
use super::zygote::Zygote;
use super::{Grading, Limits, Mode, Outcome, Program, Rules, Setup, TestOutcome, Verdict};

const ATTEMPTS: usize = 3;

/// Runs programs, one at a time.
pub(super) struct Worker {
    setup: Arc<Setup>,
    /// Where programs run.
    hostile: Option<Zygote>,
    /// Where the test code of assertion tests runs; started when one comes.
    trusted: Option<Zygote>,
}

impl Worker {
    pub fn new(setup: Arc<Setup>) -> Self {
        Self {
            setup,
            hostile: None,
            trusted: None,
        }
    }

    pub fn with(setup: Arc<Setup>, zygote: Zygote) -> Self {
        Self {
            setup,
            hostile: Some(zygote),
            trusted: None,
        }
    }

    /// Runs the tests in order.
    pub fn run(&mut self, program: &Program, limits: &Limits, rules: Rules) -> Outcome {
        let count = match program.mode {
            Mode::Assert => 1,
            _ => program.tests.len(),
        };
        if count == 0 {
            // Nothing to fail is not a pass.
            return Outcome::from_tests(vec![TestOutcome::trouble(
                "the program has no tests".into(),
            )]);
        }
        let mut tests = Vec::new();
        if rules.grading == Grading::LcbStrict && program.mode != Mode::Assert {
            tests = self.retrying(|worker| worker.run_together(program, limits));
        } else {
            for index in 0..count {
                tests.extend(self.retrying(|worker| {
                    let outcome = match program.mode {
                        Mode::Assert => worker.run_asserts(program, limits)?,
                        _ => worker.run_alone(program, index, limits)?,
                    };
                    Ok(vec![outcome])
                }));
                let passed = tests.last().is_some_and(|t| t.verdict == Verdict::Passed);
                if !passed && !rules.all_tests {
                    break;
                }
            }
        }
        Outcome::from_tests(tests)
    }

    /// Tries again with new interpreters where the host is at fault: the old may be what is broken.
    fn retrying(
        &mut self,
        run: impl Fn(&mut Self) -> Result<Vec<TestOutcome>>,
    ) -> Vec<TestOutcome> {
        let mut attempt = 1;
        loop {
            let outcomes =
                run(self).unwrap_or_else(|error| vec![TestOutcome::trouble(format!("{error:#}"))]);
            let trouble = outcomes.iter().any(|o| o.verdict == Verdict::InfraError);
            if !trouble || attempt == ATTEMPTS {
                return outcomes;
            }
            attempt += 1;
            self.hostile = None;
            self.trusted = None;
        }
    }

    fn hostile(&mut self) -> Result<&mut Zygote> {
        if self.hostile.is_none() {
            self.hostile = Some(self.setup.start_zygote()?);
        }
        self.hostile.as_mut().context("sandbox: no interpreter")
    }

    /// A box for one test.
    fn run_alone(
        &mut self,
        program: &Program,
        index: usize,
        limits: &Limits,
    ) -> Result<TestOutcome> {
        let test = &program.tests[index];
        let expected = match Expected::of(program, index) {
            Ok(expected) => expected,
            Err(trouble) => return Ok(TestOutcome::trouble(trouble)),
        };
        let (role, stdin, extra) = match expected {
            Expected::Printed(_) => ("script", memory_file(&test.input)?, null()?),
            Expected::Returned(_) => ("function", null()?, memory_file(&test.input)?),
        };
        let files = [stdin, memory_file(&program.source)?, extra];
        let zygote = self.hostile()?;
        let began = Instant::now();
        let Launched { running, scratch } = launch(zygote, role, program, &files, &[], limits)?;
        let mut boxes = [running];
        let ooms = oom_kills(&boxes[0]);
        let stop = supervise(&mut boxes, limits, &mut |_| true)?;
        let [running] = boxes;
        clear(scratch);
        let verdict = match verdict::ran(&running, stop, limits, oom_kills(&running) - ooms) {
            Ran::Badly(verdict) => verdict,
            Ran::Trouble(trouble) => return Ok(TestOutcome::trouble(trouble)),
            Ran::Cleanly => match &expected {
                Expected::Printed(text) => verdict::printed(&running, text),
                Expected::Returned(value) => verdict::returned(&running, value, Tuples::Anywhere),
            },
        };
        Ok(outcome(&running, verdict, began))
    }

    /// One box for all tests, as LiveCodeBench's evaluator has it: up to the first failure. The box
    /// answers test after test, and each answer is compared here.
    fn run_together(&mut self, program: &Program, limits: &Limits) -> Result<Vec<TestOutcome>> {
        let all: Result<Vec<_>, _> = (0..program.tests.len())
            .map(|index| Expected::of(program, index))
            .collect();
        let all = match all {
            Ok(all) => all,
            Err(trouble) => return Ok(vec![TestOutcome::trouble(trouble)]),
        };
        let inputs = program.tests.iter().map(|test| test.input.as_str());
        let (role, inputs) = match program.mode {
            Mode::Stdin => (
                "lcb-script",
                serde_json::to_string(&inputs.collect::<Vec<_>>())?,
            ),
            _ => (
                "lcb-function",
                format!("[{}]", inputs.collect::<Vec<_>>().join(",")),
            ),
        };
        let files = [
            null()?,
            memory_file(&program.source)?,
            memory_file(&inputs)?,
        ];
        let zygote = self.hostile()?;
        let Launched { running, scratch } = launch(zygote, role, program, &files, &[], limits)?;
        let mut boxes = [running];
        let ooms = oom_kills(&boxes[0]);
        let mut outcomes: Vec<TestOutcome> = Vec::new();
        let stop = supervise(&mut boxes, limits, &mut |running| {
            let mut stdout = String::new();
            let verdict = match &all[outcomes.len()] {
                _ if running.lap_cpu_s() > limits.cpu_s => Verdict::Timeout,
                Expected::Returned(value) => verdict::returned(running, value, Tuples::Top),
                Expected::Printed(text) => match verdict::collected(running) {
                    Ok(printed) => {
                        stdout = printed;
                        verdict::compared(&stdout, text)
                    }
                    Err(verdict) => verdict,
                },
            };
            outcomes.push(TestOutcome {
                stdout,
                ..lap(running, verdict)
            });
            verdict != Verdict::Passed || outcomes.len() == all.len()
        })?;
        let [running] = boxes;
        clear(scratch);
        if stop != Some(Stop::Answered) {
            let verdict = match verdict::ran(&running, stop, limits, oom_kills(&running) - ooms) {
                Ran::Badly(verdict) => verdict,
                Ran::Trouble(trouble) => return Ok(vec![TestOutcome::trouble(trouble)]),
                // It ended before it had answered everything.
                Ran::Cleanly => Verdict::RuntimeError,
            };
            outcomes.push(lap(&running, verdict));
        }
        if let Some(last) = outcomes.last_mut() {
            last.stderr = String::from_utf8_lossy(&running.stderr.bytes).into_owned();
            // What it wrote past the evaluator, which does not count.
            last.stdout += &String::from_utf8_lossy(&running.stdout.bytes);
        }
        Ok(outcomes)
    }

    /// Two boxes: the test code in one, which nothing hostile ever enters, calls the program in
    /// the other through pipes.
    fn run_asserts(&mut self, program: &Program, limits: &Limits) -> Result<TestOutcome> {
        let Some(test_code) = &program.test_code else {
            return Ok(TestOutcome::trouble("the program has no test_code".into()));
        };
        if self.trusted.is_none() {
            self.trusted = Some(self.setup.start_zygote()?);
        }
        self.hostile()?;
        let (Some(hostile), Some(trusted)) = (self.hostile.as_mut(), self.trusted.as_mut()) else {
            bail!("sandbox: no interpreter");
        };
        let began = Instant::now();
        let (calls_out, calls_in) = pipe2(OFlag::O_CLOEXEC)?;
        let (answers_out, answers_in) = pipe2(OFlag::O_CLOEXEC)?;
        let files = [null()?, memory_file(test_code)?, answers_out];
        let tester = launch(
            trusted,
            "test",
            program,
            &files,
            &[calls_in.as_fd()],
            limits,
        )?;
        let files = [null()?, memory_file(&program.source)?, calls_out];
        let candidate = launch_answering(hostile, program, &files, answers_in, limits)?;
        drop((files, calls_in));
        let mut boxes = [tester.running, candidate.running];
        let ooms = [oom_kills(&boxes[0]), oom_kills(&boxes[1])];
        let stop = supervise(&mut boxes, limits, &mut |_| true)?;
        let [tests, answering] = boxes;
        clear(tester.scratch);
        clear(candidate.scratch);
        let verdict = match verdict::asserted(&tests) {
            Ok(Verdict::Passed) => Verdict::Passed,
            asserted => {
                // What happened to the program's own process explains a failure better.
                let killed = oom_kills(&answering) - ooms[1];
                match (verdict::ran(&answering, stop, limits, killed), asserted) {
                    (Ran::Trouble(trouble), _) => return Ok(TestOutcome::trouble(trouble)),
                    (_, Err(trouble)) => return Ok(TestOutcome::trouble(trouble)),
                    (Ran::Badly(verdict), _) => verdict,
                    (Ran::Cleanly, Ok(verdict)) => {
                        match verdict::ran(&tests, stop, limits, oom_kills(&tests) - ooms[0]) {
                            Ran::Trouble(trouble) => return Ok(TestOutcome::trouble(trouble)),
                            Ran::Badly(verdict) => verdict,
                            Ran::Cleanly => verdict,
                        }
                    }
                }
            }
        };
        let mut outcome = outcome(&answering, verdict, began);
        outcome
            .stderr
            .push_str(&String::from_utf8_lossy(&tests.stderr.bytes));
        Ok(outcome)
    }
}

/// What a test wants, which never leaves this process.
enum Expected<'a> {
    Printed(&'a str),
    Returned(Data),
}

impl<'a> Expected<'a> {
    /// `Err` says what is wrong with the test.
    fn of(program: &'a Program, index: usize) -> Result<Self, String> {
        let test = &program.tests[index];
        if program.mode == Mode::Stdin {
            return Ok(Self::Printed(&test.output));
        }
        if program.entry_point.is_none() {
            return Err("the program has no entry_point".into());
        }
        if serde_json::from_str::<Vec<&RawValue>>(&test.input).is_err() {
            return Err(format!("test {index}: input is not a JSON array"));
        }
        Data::from_json(&test.output)
            .map(Self::Returned)
            .map_err(|error| format!("test {index}: output is not JSON: {error}"))
    }
}

fn outcome(running: &Running, verdict: Verdict, began: Instant) -> TestOutcome {
    TestOutcome {
        verdict,
        cpu_ms: running.exit.as_ref().map_or(0.0, |exit| exit.cpu_s * 1e3),
        wall_ms: began.elapsed().as_secs_f64() * 1e3,
        memory_kb: running.peak_kb(),
        stdout: String::from_utf8_lossy(&running.stdout.bytes).into_owned(),
        stderr: String::from_utf8_lossy(&running.stderr.bytes).into_owned(),
        trouble: None,
    }
}

/// The outcome of a test that was one of several in the box.
fn lap(running: &Running, verdict: Verdict) -> TestOutcome {
    TestOutcome {
        verdict,
        cpu_ms: running.lap_cpu_s() * 1e3,
        wall_ms: running.lap_wall().as_secs_f64() * 1e3,
        memory_kb: running.peak_kb(),
        stdout: String::new(),
        stderr: String::new(),
        trouble: None,
    }
}

fn oom_kills(running: &Running) -> u64 {
    running
        .zygote
        .cgroup
        .as_ref()
        .map_or(0, |cgroup| cgroup.oom_kills())
}
