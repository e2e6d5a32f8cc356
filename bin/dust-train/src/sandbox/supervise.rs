//! Watches running boxes: collects what they write, holds them to their limits, and kills.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Limits;
use super::zygote::Zygote;

/// Where to look again at the clocks: often enough for a limit, rarely enough to cost nothing.
const LONGEST_NAP: Duration = Duration::from_millis(200);
const SHORTEST_NAP: Duration = Duration::from_millis(5);
/// Where no cgroup holds the memory down, it is looked at this often.
const MEMORY_NAP: Duration = Duration::from_millis(20);
/// A killed box that is not gone by then means that the host is in trouble.
const DEATH_TIMEOUT: Duration = Duration::from_secs(20);
/// On a host so loaded that this many times the wall limit has passed, nothing can be said.
const WALL_PATIENCE: u32 = 5;

/// What a pipe delivered, never more than `cap` bytes of it.
pub(super) struct Capture {
    pipe: Option<File>,
    pub bytes: Vec<u8>,
    cap: usize,
    /// Drop what is beyond the cap, instead of calling it an overflow.
    lossy: bool,
    pub overflowed: bool,
}

impl Capture {
    pub fn new(pipe: OwnedFd, cap: u64, lossy: bool) -> Result<Self> {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let cap = usize::try_from(cap).unwrap_or(usize::MAX);
        Ok(Self {
            pipe: Some(pipe.into()),
            bytes: Vec::new(),
            cap,
            lossy,
            overflowed: false,
        })
    }

    /// Reads what is there, a bounded amount at a time so that one writer cannot hold us.
    fn drain(&mut self) {
        let mut chunk = [0u8; 1 << 16];
        for _ in 0..16 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut chunk) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    let room = self.cap.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&chunk[..count.min(room)]);
                    self.overflowed |= count > room && !self.lossy;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

/// How a box ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Exit {
    pub status: i32,
    pub cpu_s: f64,
    pub maxrss_kb: u64,
}

/// Why we ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// It had given its answer.
    Answered,
    Timeout,
    Memory,
    OutputLimit,
    /// The host gave it no chance to run.
    Starved,
}

/// A box at work.
pub(super) struct Running<'a> {
    pub zygote: &'a Zygote,
    pub stdout: Capture,
    pub stderr: Capture,
    /// The mark that the program has started, then frames of JSON.
    pub result: Capture,
    /// It answers in frames. Nothing that happens after the last answer counts.
    pub answers: bool,
    pub exit: Option<Exit>,
    pid: Option<u32>,
    pidfd: Option<OwnedFd>,
    cpu_before: f64,
    lap: Lap,
    peak_kb: u64,
}

/// Where the clocks stood when the test began that the limits are for: the box's first, or where one
/// box does them all, the one after the last answer.
struct Lap {
    began: Instant,
    cpu_s: f64,
    waited: Duration,
}

impl<'a> Running<'a> {
    pub fn new(
        zygote: &'a Zygote,
        stdout: Capture,
        stderr: Capture,
        result: Capture,
        answers: bool,
    ) -> Self {
        Self {
            zygote,
            stdout,
            stderr,
            result,
            answers,
            exit: None,
            pid: None,
            pidfd: None,
            cpu_before: zygote.cgroup.as_ref().map_or(0.0, |c| c.cpu_s()),
            lap: Lap {
                began: Instant::now(),
                cpu_s: 0.0,
                waited: Duration::ZERO,
            },
            peak_kb: 0,
        }
    }

    /// Whether the last restriction was in force and the program's turn came.
    pub fn started(&self) -> bool {
        !self.result.bytes.is_empty()
    }

    /// The first whole frame after the mark.
    pub fn answer(&self) -> Option<&[u8]> {
        let frame = self.result.bytes.get(1..)?;
        let (length, body) = frame.split_first_chunk::<4>()?;
        body.get(..u32::from_ne_bytes(*length) as usize)
    }

    /// Drops the first frame and starts the clocks anew.
    fn next_lap(&mut self) {
        let length = self.answer().map_or(0, |body| 4 + body.len());
        self.result.bytes.drain(1..=length);
        self.lap = Lap {
            began: Instant::now(),
            cpu_s: self.cpu_s(),
            waited: self.waited_for_cpu(),
        };
    }

    /// CPU time since the last answer.
    pub fn lap_cpu_s(&self) -> f64 {
        self.cpu_s() - self.lap.cpu_s
    }

    /// Time by the clock since the last answer.
    pub fn lap_wall(&self) -> Duration {
        self.lap.began.elapsed()
    }

    /// CPU time of the whole box so far.
    fn cpu_s(&self) -> f64 {
        let accounted = self.exit.as_ref().map_or(0.0, |exit| exit.cpu_s);
        let grouped = match &self.zygote.cgroup {
            Some(cgroup) => cgroup.cpu_s() - self.cpu_before,
            None if self.exit.is_some() => 0.0,
            None => self.processes().iter().map(|p| p.cpu_s).sum(),
        };
        accounted.max(grouped)
    }

    /// The most memory that the box was seen to hold.
    pub fn peak_kb(&self) -> u64 {
        match &self.zygote.cgroup {
            Some(cgroup) => cgroup.peak_kb(),
            None => self
                .peak_kb
                .max(self.exit.as_ref().map_or(0, |exit| exit.maxrss_kb)),
        }
    }

    fn note_memory(&mut self) -> u64 {
        let now = self.processes().iter().map(|p| p.rss_kb).sum();
        self.peak_kb = self.peak_kb.max(now);
        now
    }

    /// The box is one session: setsid is denied to it.
    fn processes(&self) -> Vec<Process> {
        let Some(session) = self.pid else {
            return Vec::new();
        };
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(Process::read)
            .filter(|process| process.session == session)
            .collect()
    }

    /// How long the first process has been ready to run and not been let.
    fn waited_for_cpu(&self) -> Duration {
        let read = || {
            let text = fs::read_to_string(format!("/proc/{}/schedstat", self.pid?)).ok()?;
            text.split_whitespace().nth(1)?.parse().ok()
        };
        Duration::from_nanos(read().unwrap_or(0))
    }

    fn kill(&self) -> Result<()> {
        if self.exit.is_some() {
            return Ok(());
        }
        #[derive(serde::Serialize)]
        struct Kill {
            kill: bool,
        }
        self.zygote.send(&Kill { kill: true }, &[])
    }

    fn take_report(&mut self) -> Result<()> {
        let (report, fd) = self.zygote.receive()?;
        match report.stage.as_str() {
            "started" => {
                let fd = fd.context("sandbox: no handle of the started box")?;
                self.pid = pid_of(&fd);
                self.pidfd = Some(fd);
            }
            "exited" => {
                for capture in [&mut self.stdout, &mut self.stderr, &mut self.result] {
                    capture.drain();
                }
                self.exit = Some(Exit {
                    status: report.status,
                    cpu_s: report.cpu_s,
                    maxrss_kb: report.maxrss_kb,
                });
            }
            _ => anyhow::bail!("sandbox: {}", report.error),
        }
        Ok(())
    }
}

/// The process that a pidfd stands for, numbered as we see it.
fn pid_of(fd: &OwnedFd) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:"))?
        .trim()
        .parse()
        .ok()
}

/// Processes and threads of a user, the whole machine over.
pub(super) fn tasks_of(uid: u32) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (entry.metadata().ok()?.uid() == uid).then(|| Process::read(pid))?
        })
        .map(|process| process.threads)
        .sum()
}

struct Process {
    session: u32,
    threads: u64,
    cpu_s: f64,
    rss_kb: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything, so count from behind its bracket.
        let fields: Vec<&str> = text[text.rfind(')')? + 2..].split(' ').collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        let ticks = number(11)? + number(12)? + number(13)? + number(14)?;
        Some(Self {
            session: number(3)? as u32,
            threads: number(17)?,
            cpu_s: ticks as f64 / 100.0, // USER_HZ is 100 on every architecture that we support
            rss_kb: number(21)? * 4,
        })
    }
}

/// Runs until the first box is done, then ends the others. Returns why we stepped in, if we did.
/// `on_answer` sees each frame of the first box as its [`Running::answer`], and says whether it is the
/// last that matters.
pub(super) fn supervise(
    boxes: &mut [Running],
    limits: &Limits,
    on_answer: &mut dyn FnMut(&Running) -> bool,
) -> Result<Option<Stop>> {
    let mut stop = None;
    let mut killed_at = None;
    let wall = Duration::from_secs_f64(limits.wall_s);
    let mut check_at = Instant::now() + nap(limits, 0.0, wall);
    loop {
        let first_done = boxes[0].exit.is_some();
        stop = stop.or_else(|| overflow(boxes));
        while stop.is_none() && boxes[0].answers && boxes[0].answer().is_some() {
            if on_answer(&boxes[0]) {
                stop = Some(Stop::Answered);
            } else {
                boxes[0].next_lap();
            }
        }
        if boxes.iter().all(|b| b.exit.is_some()) {
            return Ok(stop);
        }
        let now = Instant::now();
        if stop.is_none() && !first_done && now >= check_at {
            stop = exhausted(boxes, limits)?;
            let spent = boxes.iter().map(Running::lap_cpu_s).fold(0.0, f64::max);
            check_at = now + nap(limits, spent, wall.saturating_sub(boxes[0].lap_wall()));
        }
        if (stop.is_some() || first_done) && killed_at.is_none() {
            for running in boxes.iter() {
                running.kill()?;
            }
            killed_at = Some(now);
        }
        if let Some(since) = killed_at {
            ensure!(
                now - since < DEATH_TIMEOUT,
                "sandbox: a killed box does not go away"
            );
        }
        let sleep = if killed_at.is_some() {
            LONGEST_NAP
        } else {
            check_at.saturating_duration_since(now)
        };
        wait(boxes, sleep)?;
    }
}

fn overflow(boxes: &[Running]) -> Option<Stop> {
    let over = |b: &Running| b.stdout.overflowed || b.stderr.overflowed || b.result.overflowed;
    boxes.iter().any(over).then_some(Stop::OutputLimit)
}

/// No box can spend CPU time faster than all cores together, so sleep as long as that leaves.
fn nap(limits: &Limits, spent: f64, wall_left: Duration) -> Duration {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let left = Duration::from_secs_f64(((limits.cpu_s - spent) / cores).max(0.0));
    left.min(wall_left).clamp(SHORTEST_NAP, LONGEST_NAP)
}

fn exhausted(boxes: &mut [Running], limits: &Limits) -> Result<Option<Stop>> {
    let wall = Duration::from_secs_f64(limits.wall_s);
    let elapsed = boxes[0].lap_wall();
    if boxes.iter().any(|b| b.lap_cpu_s() > limits.cpu_s) {
        return Ok(Some(Stop::Timeout));
    }
    for running in boxes.iter_mut().filter(|b| b.zygote.cgroup.is_none()) {
        if running.note_memory() > limits.memory_mb << 10 {
            return Ok(Some(Stop::Memory));
        }
    }
    if elapsed > wall {
        // Time spent waiting for a core is the host's, not the program's.
        let waited = boxes
            .iter()
            .map(|b| b.waited_for_cpu().saturating_sub(b.lap.waited))
            .max()
            .unwrap_or_default();
        if elapsed.saturating_sub(waited) > wall {
            return Ok(Some(Stop::Timeout));
        }
        if elapsed > wall * WALL_PATIENCE {
            return Ok(Some(Stop::Starved));
        }
    }
    Ok(None)
}

fn wait(boxes: &mut [Running], mut sleep: Duration) -> Result<()> {
    if boxes.iter().any(|b| b.zygote.cgroup.is_none()) {
        sleep = sleep.min(MEMORY_NAP);
    }
    let mut fds = Vec::new();
    for running in boxes.iter() {
        if running.exit.is_none() {
            fds.push(PollFd::new(running.zygote.control(), PollFlags::POLLIN));
        }
        for capture in [&running.stdout, &running.stderr, &running.result] {
            if let Some(pipe) = &capture.pipe {
                fds.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
            }
        }
    }
    // Rounded up, or the last millisecond would be spent spinning.
    let millis = i32::try_from(sleep.as_millis() + 1).unwrap_or(i32::MAX);
    match poll(
        &mut fds,
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
    ) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error).context("sandbox: poll"),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
    drop(fds);
    let mut ready = ready.into_iter();
    for running in boxes.iter_mut() {
        let reported = running.exit.is_none() && ready.next() == Some(true);
        for capture in [
            &mut running.stdout,
            &mut running.stderr,
            &mut running.result,
        ] {
            if capture.pipe.is_some() && ready.next() == Some(true) {
                capture.drain();
            }
        }
        if reported {
            running.take_report()?;
        }
    }
    Ok(())
}
