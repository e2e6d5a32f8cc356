//! The parent's end of a warm interpreter (`zygote.py`, after `lcb.py`): start it, give it jobs, read its reports.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::cgroup::Cgroup;
use super::{janitor, landlock, seccomp};

const SCRIPT: &str = concat!(
    "# A warm interpreter of dust-train's sandbox.\n", // what `ps` shows
    include_str!("lcb.py"),
    include_str!("zygote.py"),
);
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);

/// The unprivileged user that boxes run as when we are root ("nobody").
const UNPRIVILEGED_ID: u32 = 65534;
/// What that user, or our own, is called inside the user namespace. `zygote.py` knows it too.
const INSIDE_ID: u32 = 1000;

/// What the box may read besides the interpreter; what does not exist is left out.
const SYSTEM_PATHS: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
];

/// A message from the warm interpreter.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Report {
    pub stage: String,
    #[serde(default)]
    pub landlock_abi: i64,
    #[serde(default)]
    pub prefixes: Vec<String>,
    #[serde(default)]
    pub version: String,
    #[serde(default)]
    pub namespaces: bool,
    #[serde(default)]
    pub missing: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub status: i32,
    #[serde(default)]
    pub cpu_s: f64,
    #[serde(default)]
    pub maxrss_kb: u64,
    #[serde(default)]
    pub error: String,
}

#[derive(Serialize)]
struct Config {
    namespaces: bool,
    uid: Option<u32>,
    paths: Vec<String>,
    scratch: Option<String>,
    scratch_access: u64,
    filters: Vec<String>,
    sys_pivot_root: i64,
}

/// A job: what to run in a fresh box. Descriptors go beside it.
#[derive(Serialize)]
pub(super) struct Job<'a> {
    pub role: &'static str,
    pub entry_point: Option<&'a str>,
    pub files_bytes: u64,
    pub files_count: u64,
    pub rlimits: std::collections::BTreeMap<&'static str, (u64, u64)>,
    /// Only where there is no mount namespace: the run's own folder.
    pub scratch: Option<String>,
}

/// What the layers of one warm interpreter turned out to be.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub landlock_abi: i64,
    pub isolated: bool,
    pub why_not_isolated: Option<String>,
    pub uid: u32,
    pub version: String,
}

/// A warm interpreter, one box at a time.
pub(super) struct Zygote {
    child: Child,
    control: OwnedFd,
    /// Scratch folders, where there is no mount namespace to hold them.
    scratch: Option<TempDir>,
    runs: u64,
    pub cgroup: Option<Cgroup>,
    pub why_no_cgroup: Option<String>,
    pub facts: Facts,
}

impl Zygote {
    pub fn start(
        python: &Path,
        scratch_root: &Path,
        adopt: impl FnOnce(u32) -> Result<()>,
    ) -> Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .context("sandbox: no socket pair")?;
        let child = Command::new(python)
            .args(["-s", "-S", "-B", "-c", SCRIPT])
            .env_clear()
            // Fixed, so that a program that depends on the order of a set gets the same label twice.
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONSAFEPATH", "1")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("sandbox: cannot start {}", python.display()))?;
        let mut zygote = Self {
            child,
            control: ours,
            scratch: None,
            runs: 0,
            cgroup: None,
            why_no_cgroup: None,
            facts: Facts {
                landlock_abi: 0,
                isolated: false,
                why_not_isolated: None,
                uid: 0,
                version: String::new(),
            },
        };
        adopt(zygote.child.id())?;
        zygote.boot(scratch_root)?;
        Ok(zygote)
    }

    fn boot(&mut self, scratch_root: &Path) -> Result<()> {
        let hello = self.expect("hello")?;
        let mut paths: Vec<String> = Vec::new();
        for path in SYSTEM_PATHS
            .iter()
            .map(|p| p.to_string())
            .chain(hello.prefixes.clone())
        {
            let covered = paths.iter().any(|p| Path::new(&path).starts_with(p));
            if Path::new(&path).exists() && path != "/" && !covered {
                paths.push(path);
            }
        }
        let root = nix::unistd::geteuid().is_root();
        let ruleset = if hello.landlock_abi > 0 {
            landlock::ruleset(&paths)?
        } else {
            None
        };
        let scratch = tempfile::Builder::new()
            .prefix(&janitor::prefix())
            .tempdir_in(scratch_root)
            .context("sandbox: no scratch folder")?;
        if root {
            nix::unistd::chown(
                scratch.path(),
                Some(UNPRIVILEGED_ID.into()),
                Some(UNPRIVILEGED_ID.into()),
            )
            .context("sandbox: scratch folder")?;
        }
        // A pid namespace or Landlock's scopes confine signals; the first is known only after the
        // filters are made, and every kernel with the second has the first unless it was denied.
        let confined = hello.landlock_abi >= landlock::ABI_WITH_SCOPES;
        let filters = seccomp::filters(confined)?;
        let config = Config {
            namespaces: true,
            uid: root.then_some(UNPRIVILEGED_ID),
            paths,
            scratch: Some(scratch.path().to_string_lossy().into_owned()),
            scratch_access: landlock::scratch_access(hello.landlock_abi),
            filters: filters.iter().map(|f| hex(f)).collect(),
            sys_pivot_root: libc::SYS_pivot_root,
        };
        let fds: Vec<BorrowedFd> = ruleset.iter().map(|fd| fd.as_fd()).collect();
        self.send(&config, &fds)?;
        let unshared = self.expect("unshared")?;
        let mut unmapped = None;
        if unshared.namespaces
            && let Err(error) = self.map_ids(root)
        {
            unmapped = Some(format!("{error:#}"));
        }
        ensure!(
            !(unshared.namespaces && unmapped.is_some()),
            "sandbox: cannot map user ids into the namespace: {}",
            unmapped.unwrap_or_default()
        );
        #[derive(Serialize)]
        struct Mapped {
            mapped: bool,
        }
        self.send(
            &Mapped {
                mapped: unshared.namespaces,
            },
            &[],
        )?;
        let ready = self.expect("ready")?;
        self.facts = Facts {
            landlock_abi: if ruleset.is_some() {
                hello.landlock_abi
            } else {
                0
            },
            isolated: unshared.namespaces,
            why_not_isolated: ready.missing.get("namespaces").cloned(),
            uid: ready.uid,
            version: hello.version,
        };
        if !unshared.namespaces {
            self.scratch = Some(scratch);
        }
        Ok(())
    }

    /// One user and one group exist inside: ours, or as root the unprivileged one.
    fn map_ids(&self, root: bool) -> Result<()> {
        let (uid, gid) = match root {
            true => (UNPRIVILEGED_ID, UNPRIVILEGED_ID),
            false => (
                nix::unistd::geteuid().as_raw(),
                nix::unistd::getegid().as_raw(),
            ),
        };
        let write = |name: &str, text: String| {
            let path = format!("/proc/{}/{name}", self.child.id());
            fs::write(&path, text).with_context(|| path)
        };
        write("setgroups", "deny".into())?;
        write("uid_map", format!("{INSIDE_ID} {uid} 1"))?;
        write("gid_map", format!("{INSIDE_ID} {gid} 1"))
    }

    /// A fresh scratch folder for a run, where the zygote cannot mount one.
    pub fn scratch_for_run(&mut self) -> Result<Option<String>> {
        let Some(base) = &self.scratch else {
            return Ok(None);
        };
        self.runs += 1;
        let path = base.path().join(self.runs.to_string());
        fs::create_dir(&path).context("sandbox: scratch folder")?;
        if nix::unistd::geteuid().is_root() {
            let id = UNPRIVILEGED_ID;
            nix::unistd::chown(&path, Some(id.into()), Some(id.into()))?;
        }
        Ok(Some(path.to_string_lossy().into_owned()))
    }

    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd]) -> Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let ancillary = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(
            self.control.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            ancillary,
            flags,
            None,
        )
        .context("sandbox: the warm interpreter is gone")?;
        Ok(())
    }

    /// The next report and the descriptor that came with it. Blocks: poll `control` first.
    pub fn receive(&self) -> Result<(Report, Option<OwnedFd>)> {
        let mut bytes = [0u8; 1 << 14];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(
            self.control.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            flags,
        )
        .context("sandbox: the warm interpreter is gone")?;
        let mut fd = None;
        for ancillary in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = ancillary {
                for raw in fds {
                    // SAFETY: the kernel has just installed this descriptor for us and nobody
                    // else knows its number.
                    fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
        }
        let length = message.bytes;
        ensure!(length > 0, "sandbox: the warm interpreter ended");
        let report: Report = serde_json::from_slice(&bytes[..length])?;
        Ok((report, fd))
    }

    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    fn expect(&self, stage: &str) -> Result<Report> {
        let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(BOOT_TIMEOUT).unwrap_or(PollTimeout::MAX);
        let ready = loop {
            match poll(&mut fds, timeout) {
                Err(nix::Error::EINTR) => continue,
                other => break other?,
            }
        };
        ensure!(ready > 0, "sandbox: the warm interpreter does not answer");
        let (report, _) = self.receive()?;
        if report.stage != stage {
            bail!("sandbox: set-up failed: {}", report.error);
        }
        Ok(report)
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // Killing the first process takes its children with it: each is told by the kernel when
        // its parent dies, and the second is the init of the namespace that holds the rest.
        if self.facts.isolated {
            let _ = self.child.kill();
        } else {
            // It kills its box and leaves when it reads the end of the control stream.
            let _ = nix::sys::socket::shutdown(
                self.control.as_raw_fd(),
                nix::sys::socket::Shutdown::Both,
            );
        }
        let _ = self.child.wait();
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
