//! One worker: a warm interpreter, and the running of one test at a time in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;

use super::data::{Data, Tuples};
use super::supervise::{Capture, Running, supervise};
use super::verdict::{self, Ran};
use super::zygote::{Job, Zygote};
use super::{Grading, Limits, Mode, Outcome, Program, Setup, TestOutcome, Verdict};

const STDERR_BYTES: u64 = 64 << 10;
const ATTEMPTS: usize = 3;
/// Files and folders in a scratch folder.
const FILES: u64 = 4096;
/// Open descriptors of a process.
const DESCRIPTORS: u64 = 256;

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
    pub fn run(&mut self, program: &Program, limits: &Limits) -> Outcome {
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
        for index in 0..count {
            let outcome = self.run_with_retries(program, index, limits);
            let passed = outcome.verdict == Verdict::Passed;
            tests.push(outcome);
            if !passed && self.setup.stop_at_first_failure {
                break;
            }
        }
        Outcome::from_tests(tests)
    }

    fn run_with_retries(
        &mut self,
        program: &Program,
        index: usize,
        limits: &Limits,
    ) -> TestOutcome {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.run_test(program, index, limits) {
                Ok(outcome) if outcome.verdict != Verdict::InfraError => return outcome,
                Ok(outcome) if attempt == ATTEMPTS => return outcome,
                Ok(_) => None,
                Err(error) => Some(error),
            };
            // Start over with new interpreters: the old may be what is broken.
            self.hostile = None;
            self.trusted = None;
            if let Some(error) = error
                && attempt == ATTEMPTS
            {
                return TestOutcome::trouble(format!("{error:#}"));
            }
        }
    }

    fn run_test(
        &mut self,
        program: &Program,
        index: usize,
        limits: &Limits,
    ) -> Result<TestOutcome> {
        if self.hostile.is_none() {
            self.hostile = Some(self.setup.start_zygote()?);
        }
        match program.mode {
            Mode::Assert => self.run_asserts(program, limits),
            _ => self.run_alone(program, index, limits),
        }
    }

    fn run_alone(
        &mut self,
        program: &Program,
        index: usize,
        limits: &Limits,
    ) -> Result<TestOutcome> {
        let zygote = self.hostile.as_mut().context("sandbox: no interpreter")?;
        let test = &program.tests[index];
        let (role, stdin, extra) = match program.mode {
            Mode::Stdin => ("script", memory_file(&test.input)?, null()?),
            _ => ("function", null()?, memory_file(&test.input)?),
        };
        let expected = match program.mode {
            Mode::Stdin => None,
            _ => match Data::from_json(&test.output) {
                Ok(expected) => Some(expected),
                Err(error) => {
                    return Ok(TestOutcome::trouble(format!(
                        "test {index}: output is not JSON: {error}"
                    )));
                }
            },
        };
        if expected.is_some() && program.entry_point.is_none() {
            return Ok(TestOutcome::trouble(
                "the program has no entry_point".into(),
            ));
        }
        if expected.is_some()
            && serde_json::from_str::<Vec<&serde_json::value::RawValue>>(&test.input).is_err()
        {
            return Ok(TestOutcome::trouble(format!(
                "test {index}: input is not a JSON array"
            )));
        }
        let files = [stdin, memory_file(&program.source)?, extra];
        let began = Instant::now();
        let Launched { running, scratch } = launch(zygote, role, program, &files, &[], limits)?;
        let mut boxes = [running];
        let ooms = oom_kills(&boxes[0]);
        let stop = supervise(&mut boxes, limits)?;
        let [running] = boxes;
        let verdict = match verdict::ran(&running, stop, limits, oom_kills(&running) - ooms) {
            Ran::Badly(verdict) => verdict,
            Ran::Trouble(trouble) => return Ok(TestOutcome::trouble(trouble)),
            Ran::Cleanly => match &expected {
                None => verdict::printed(&running, &test.output),
                Some(expected) => {
                    verdict::returned(&running, expected, self.setup.grading.tuples())
                }
            },
        };
        clear(scratch);
        Ok(outcome(&running, verdict, began))
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
        let stop = supervise(&mut boxes, limits)?;
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

struct Launched<'a> {
    running: Running<'a>,
    scratch: Option<String>,
}

fn launch<'a>(
    zygote: &'a mut Zygote,
    role: &'static str,
    program: &Program,
    files: &[OwnedFd; 3],
    extra: &[BorrowedFd],
    limits: &Limits,
) -> Result<Launched<'a>> {
    let (result_out, result_in) = pipe2(OFlag::O_CLOEXEC)?;
    let result = Capture::new(result_out, limits.output_bytes + 4096, false)?;
    start(
        zygote, role, program, files, result, result_in, extra, limits,
    )
}

/// Like `launch`, with the frames going to somebody else's pipe.
fn launch_answering<'a>(
    zygote: &'a mut Zygote,
    program: &Program,
    files: &[OwnedFd; 3],
    answers: OwnedFd,
    limits: &Limits,
) -> Result<Launched<'a>> {
    let (mark_out, mark_in) = pipe2(OFlag::O_CLOEXEC)?;
    let result = Capture::new(mark_out, 4096, true)?;
    start(
        zygote,
        "answer",
        program,
        files,
        result,
        mark_in,
        &[answers.as_fd()],
        limits,
    )
}

fn start<'a>(
    zygote: &'a mut Zygote,
    role: &'static str,
    program: &Program,
    [stdin, source, extra]: &[OwnedFd; 3],
    result: Capture,
    result_in: OwnedFd,
    more: &[BorrowedFd],
    limits: &Limits,
) -> Result<Launched<'a>> {
    let (stdout_out, stdout_in) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr_out, stderr_in) = pipe2(OFlag::O_CLOEXEC)?;
    let scratch = zygote.scratch_for_run()?;
    if let Some(cgroup) = &zygote.cgroup {
        // Two more, for the interpreter itself and the process that waits for it.
        cgroup.limit(limits.memory_mb << 20, u64::from(limits.processes) + 2)?;
    }
    let job = Job {
        role,
        entry_point: program.entry_point.as_deref(),
        files_bytes: (limits.files_mb << 20).max(4096),
        files_count: FILES,
        rlimits: rlimits(limits, zygote.facts.isolated),
        scratch: scratch.clone(),
    };
    let mut fds = vec![
        stdin.as_fd(),
        stdout_in.as_fd(),
        stderr_in.as_fd(),
        result_in.as_fd(),
        source.as_fd(),
        extra.as_fd(),
    ];
    fds.extend(more);
    let running = Running::new(
        zygote,
        Capture::new(stdout_out, limits.output_bytes, false)?,
        Capture::new(stderr_out, STDERR_BYTES, true)?,
        result,
        matches!(role, "function" | "test"),
    );
    zygote.send(&job, &fds)?;
    Ok(Launched { running, scratch })
}

/// The limits that the kernel keeps for each process. They back the box-wide ones up.
fn rlimits(limits: &Limits, isolated: bool) -> BTreeMap<&'static str, (u64, u64)> {
    let cpu = limits.cpu_s.ceil() as u64 + 1;
    let memory = limits.memory_mb << 20;
    let mut all = BTreeMap::from([
        ("RLIMIT_CPU", (cpu, cpu)),
        ("RLIMIT_DATA", (memory, memory)),
        (
            "RLIMIT_FSIZE",
            (limits.files_mb << 20, limits.files_mb << 20),
        ),
        ("RLIMIT_NOFILE", (DESCRIPTORS, DESCRIPTORS)),
        ("RLIMIT_CORE", (0, 0)),
        ("RLIMIT_MEMLOCK", (0, 0)),
        ("RLIMIT_MSGQUEUE", (0, 0)),
        ("RLIMIT_SIGPENDING", (1024, 1024)),
        ("RLIMIT_RTPRIO", (0, 0)),
        ("RLIMIT_NICE", (0, 0)),
    ]);
    if isolated {
        // Counted by user namespace. Elsewhere it would count everything else of that user.
        let processes = u64::from(limits.processes) + 2;
        all.insert("RLIMIT_NPROC", (processes, processes));
    }
    all
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

fn oom_kills(running: &Running) -> u64 {
    running
        .zygote
        .cgroup
        .as_ref()
        .map_or(0, |cgroup| cgroup.oom_kills())
}

fn null() -> Result<OwnedFd> {
    Ok(File::open("/dev/null")
        .context("sandbox: /dev/null")?
        .into())
}

/// A file that is nowhere, sealed: a box can read it and cannot change it.
fn memory_file(text: &str) -> Result<OwnedFd> {
    let fd = memfd_create(c"dust", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .context("sandbox: no memory for the input")?;
    let mut file = File::from(fd);
    file.write_all(text.as_bytes())
        .context("sandbox: no memory for the input")?;
    std::io::Seek::rewind(&mut file)?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).context("sandbox: seal")?;
    Ok(file.into())
}

fn clear(scratch: Option<String>) {
    if let Some(path) = scratch {
        let _ = fs::remove_dir_all(path);
    }
}

impl Grading {
    fn tuples(self) -> Tuples {
        match self {
            Grading::Process => Tuples::Anywhere,
            Grading::LcbStrict => Tuples::Top,
        }
    }
}
