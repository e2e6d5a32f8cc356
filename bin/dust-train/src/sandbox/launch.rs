//! Starting a box: its descriptors, its limits, and the files that it reads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;

use super::supervise::{Capture, Running, tasks_of};
use super::zygote::{Facts, Job, Zygote};
use super::{Limits, Program};

const STDERR_BYTES: u64 = 64 << 10;
/// Files and folders in a scratch folder.
const FILES: u64 = 4096;
/// Open descriptors of a process.
const DESCRIPTORS: u64 = 256;

pub(super) struct Launched<'a> {
    pub running: Running<'a>,
    pub scratch: Option<String>,
}

pub(super) fn launch<'a>(
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
pub(super) fn launch_answering<'a>(
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
    // The limit on CPU time is for a test, the kernel's is for a process.
    let tests = match role {
        "lcb-function" | "lcb-script" => program.tests.len() as f64,
        _ => 1.0,
    };
    let cpu_s = limits.cpu_s * tests;
    let job = Job {
        role,
        entry_point: program.entry_point.as_deref(),
        files_bytes: (limits.files_mb << 20).max(4096),
        files_count: FILES,
        rlimits: rlimits(limits, cpu_s, &zygote.facts),
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
        matches!(role, "function" | "test" | "lcb-function" | "lcb-script"),
    );
    zygote.send(&job, &fds)?;
    Ok(Launched { running, scratch })
}

/// The limits that the kernel keeps for each process. They back the box-wide ones up.
fn rlimits(limits: &Limits, cpu_s: f64, facts: &Facts) -> BTreeMap<&'static str, (u64, u64)> {
    let cpu = cpu_s.ceil() as u64 + 1;
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
    // Counted by user namespace; where there is none, with everything else of that user. Two more
    // for the interpreter itself and the process that waits for it.
    let others = if facts.isolated {
        0
    } else {
        tasks_of(facts.uid)
    };
    let processes = others + u64::from(limits.processes) + 2;
    all.insert("RLIMIT_NPROC", (processes, processes));
    all
}

pub(super) fn null() -> Result<OwnedFd> {
    Ok(File::open("/dev/null")
        .context("sandbox: /dev/null")?
        .into())
}

/// A file that is nowhere, sealed: a box can read it and cannot change it.
pub(super) fn memory_file(text: &str) -> Result<OwnedFd> {
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

pub(super) fn clear(scratch: Option<String>) {
    if let Some(path) = scratch {
        let _ = fs::remove_dir_all(path);
    }
}
