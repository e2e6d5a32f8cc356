//! A cgroup for each warm interpreter and the boxes forked from it: memory, number of processes,
//! and the CPU time of everything that ever ran in it. Both layouts are known: version 2, and
//! version 1 with a hierarchy for each controller.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};

use super::janitor;

const ROOT: &str = "/sys/fs/cgroup";
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A cgroup of our own; gone when dropped.
#[derive(Debug)]
pub(super) struct Cgroup {
    version: u8,
    /// One folder for version 2, one for each controller for version 1.
    folders: Vec<PathBuf>,
    memory: PathBuf,
    pids: PathBuf,
    cpu: PathBuf,
    /// What the warm interpreter itself holds.
    baseline: AtomicU64,
}

impl Cgroup {
    /// Makes one below our own, or says why it cannot.
    pub fn create() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("cgroup: /proc/self/cgroup")?;
        let name = format!(
            "{}{}",
            janitor::prefix(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        v2(&own, &name)
            .or_else(|two| v1(&own, &name).map_err(|one| anyhow::anyhow!("{two:#}; {one:#}")))
    }

    /// The folders that it lies in.
    pub fn parents(&self) -> impl Iterator<Item = &Path> {
        self.folders.iter().filter_map(|folder| folder.parent())
    }

    pub fn version(&self) -> u8 {
        self.version
    }

    /// Puts a process, and so all its future children, into it.
    pub fn adopt(&self, pid: u32) -> Result<()> {
        for folder in &self.folders {
            write(folder, "cgroup.procs", pid)?;
        }
        Ok(())
    }

    /// Notes what the interpreter uses now, as not the program's.
    pub fn settle(&self) {
        let file = if self.version == 2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        self.baseline
            .store(read(&self.memory, file).unwrap_or(0), Ordering::Relaxed);
    }

    /// Limits for the next run, and a fresh peak.
    pub fn limit(&self, memory_bytes: u64, processes: u64) -> Result<()> {
        let memory = memory_bytes + self.baseline.load(Ordering::Relaxed);
        if self.version == 2 {
            write(&self.memory, "memory.max", memory)?;
            let _ = write(&self.memory, "memory.swap.max", 0);
            let _ = write(&self.memory, "memory.peak", "reset");
        } else {
            // Memory and swap together may never be less than memory alone.
            let both = "memory.memsw.limit_in_bytes";
            let has_swap = self.memory.join(both).exists();
            if has_swap && write(&self.memory, both, memory).is_err() {
                write(&self.memory, "memory.limit_in_bytes", memory)?;
                write(&self.memory, both, memory)?;
            }
            write(&self.memory, "memory.limit_in_bytes", memory)?;
            if has_swap {
                write(&self.memory, both, memory)?;
            }
            let _ = write(&self.memory, "memory.max_usage_in_bytes", 0);
        }
        write(&self.pids, "pids.max", processes)
    }

    /// CPU time of everything that ever ran in it, in seconds.
    pub fn cpu_s(&self) -> f64 {
        if self.version == 2 {
            let text = fs::read_to_string(self.cpu.join("cpu.stat")).unwrap_or_default();
            keyed(&text, "usage_usec").unwrap_or(0) as f64 / 1e6
        } else {
            read(&self.cpu, "cpuacct.usage").unwrap_or(0) as f64 / 1e9
        }
    }

    /// The most memory held since the last `limit`, without the interpreter's own.
    pub fn peak_kb(&self) -> u64 {
        let file = if self.version == 2 {
            "memory.peak"
        } else {
            "memory.max_usage_in_bytes"
        };
        let peak = read(&self.memory, file).unwrap_or(0);
        peak.saturating_sub(self.baseline.load(Ordering::Relaxed)) >> 10
    }

    /// How many processes have been killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.version == 2 {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let text = fs::read_to_string(self.memory.join(file)).unwrap_or_default();
        keyed(&text, "oom_kill").unwrap_or(0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            // The kernel takes a moment to let go of processes that have just died.
            for _ in 0..200 {
                if fs::remove_dir(folder).is_ok() || !folder.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}

/// Below the nearest ancestor that we may write to and that passes the controllers on. A cgroup
/// with processes in it cannot, so it is usually the parent of our own.
fn v2(own: &str, name: &str) -> Result<Cgroup> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        bail!("cgroup v2: not mounted");
    };
    let root = [ROOT, "/sys/fs/cgroup/unified"]
        .map(Path::new)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .context("cgroup v2: not mounted")?;
    let start = root.join(path.trim_start_matches('/'));
    for parent in start.ancestors().take_while(|p| p.starts_with(root)) {
        let passed = fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap_or_default();
        let has = |controller| passed.split_whitespace().any(|c| c == controller);
        if !has("memory") || !has("pids") {
            continue;
        }
        let folder = parent.join(name);
        if fs::create_dir(&folder).is_ok() {
            return Ok(Cgroup {
                version: 2,
                memory: folder.clone(),
                pids: folder.clone(),
                cpu: folder.clone(),
                folders: vec![folder],
                baseline: AtomicU64::new(0),
            });
        }
    }
    bail!("cgroup v2: no writable parent passes on memory and pids")
}

fn v1(own: &str, name: &str) -> Result<Cgroup> {
    let mut folders = Vec::new();
    let made = ["memory", "pids", "cpuacct"].map(|controller| -> Result<PathBuf> {
        let path = own
            .lines()
            .filter_map(|line| line.split_once(':')?.1.split_once(':'))
            .find(|(controllers, _)| controllers.split(',').any(|c| c == controller))
            .map(|(_, path)| path.trim_start_matches('/'))
            .with_context(|| format!("cgroup v1: no controller {controller}"))?;
        let folder = Path::new(ROOT).join(controller).join(path).join(name);
        match fs::create_dir(&folder) {
            Ok(()) => folders.push(folder.clone()),
            // Two controllers mounted together share the folder.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cgroup v1: {}", folder.display()));
            }
        }
        Ok(folder)
    });
    match made {
        [Ok(memory), Ok(pids), Ok(cpu)] => Ok(Cgroup {
            version: 1,
            folders,
            memory,
            pids,
            cpu,
            baseline: AtomicU64::new(0),
        }),
        made => {
            for folder in folders {
                let _ = fs::remove_dir(folder);
            }
            Err(made
                .into_iter()
                .find_map(Result::err)
                .unwrap_or_else(|| anyhow::anyhow!("cgroup v1")))
        }
    }
}

fn write(folder: &Path, file: &str, value: impl std::fmt::Display) -> Result<()> {
    let path = folder.join(file);
    fs::write(&path, value.to_string()).with_context(|| format!("cgroup: {}", path.display()))
}

fn read(folder: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(folder.join(file))
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}
