//! What a sandbox leaves behind, however it ends, and how it fares without root.

mod sandbox_support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dust_train::sandbox::{Layer, Limits, Sandbox, SandboxConfig, Verdict};
use sandbox_support::*;

/// A test of this binary that is only ever started by another, as a process of its own.
fn helper(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("path"));
    command
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env("TMPDIR", std::env::temp_dir());
    command
}

/// The processes and cgroups that bear the number of `pid`, and those below it.
fn traces_of(pid: u32) -> Vec<String> {
    let mut traces = Vec::new();
    let mark = format!("dust-sandbox-{pid}-");
    let mut folders = vec![
        std::path::PathBuf::from("/sys/fs/cgroup"),
        std::env::temp_dir(),
    ];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&mark) {
                traces.push(entry.path().display().to_string());
            } else if entry.path().starts_with("/sys")
                && entry.file_type().is_ok_and(|t| t.is_dir())
            {
                folders.push(entry.path());
            }
        }
    }
    traces
}

fn interpreters_below(pid: u32) -> Vec<u32> {
    let mut found: Vec<u32> = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok())
            else {
                continue;
            };
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let after = stat.rsplit(") ").next().unwrap_or_default();
            if after.split(' ').nth(1) == Some(&parent.to_string()) {
                found.push(pid);
                parents.push(pid);
            }
        }
    }
    found
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program that sleeps, until it is killed.
#[test]
#[ignore = "started by killed_parent_leaves_nothing"]
fn sleeper() {
    let sandbox = Sandbox::new(SandboxConfig {
        allow_weak: Layer::ALL.to_vec(),
        ..Default::default()
    });
    let limits = Limits {
        wall_s: 60.0,
        ..Default::default()
    };
    let source = "import os, time\nos.fork()\nopen('kept', 'w').write('x')\ntime.sleep(50)";
    sandbox
        .expect("sandbox")
        .run(&stdin_program(source, "", ""), &limits);
}

fn start_sleeper() -> (Child, Vec<u32>) {
    let child = helper("sleeper")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("helper");
    let mut below = Vec::new();
    // The janitor, the interpreter, its second half, the program and its child.
    wait_until("the program does not start", || {
        below = interpreters_below(child.id());
        below.len() >= 5 || (below.len() >= 4 && traces_of(child.id()).is_empty())
    });
    (child, below)
}

#[test]
fn killed_parent_leaves_nothing() {
    let (mut child, below) = start_sleeper();
    let pid = child.id();
    child.kill().expect("kill");
    child.wait().expect("wait");
    wait_until("processes are left", || {
        below
            .iter()
            .all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    });
    wait_until("cgroups or folders are left", || traces_of(pid).is_empty());
}

#[test]
fn nothing_is_left_and_nothing_grows() {
    let sandbox = Sandbox::new(SandboxConfig {
        allow_weak: Layer::ALL.to_vec(),
        workers: Some(2),
        ..Default::default()
    })
    .expect("sandbox");
    let sources = [
        "print(1)",
        "1/0",
        "import os\nif os.fork(): print(1)",
        "print(2)",
        "open('x', 'w').write('x' * 10000)\nprint(1)",
    ];
    let programs: Vec<_> = (0..200)
        .map(|i| stdin_program(sources[i % 5], "", "1"))
        .collect();
    let expected = |i: usize| match i % 5 {
        1 => Verdict::RuntimeError,
        3 => Verdict::WrongAnswer,
        _ => Verdict::Passed,
    };
    let mut settled = None;
    for _ in 0..3 {
        let mut done = 0;
        sandbox.run_all(&programs, &limits(), |index, outcome| {
            assert_eq!(outcome.verdict, expected(index), "{outcome:#?}");
            done += 1;
        });
        assert_eq!(done, programs.len());
        let mounts = fs::read_to_string("/proc/self/mounts")
            .expect("mounts")
            .lines()
            .count();
        let descriptors = sandbox_descriptors();
        assert_eq!(
            *settled.get_or_insert((mounts, descriptors)),
            (mounts, descriptors)
        );
    }
}

/// Our memory files and pipes; other tests of this binary open files of their own.
fn sandbox_descriptors() -> usize {
    fs::read_dir("/proc/self/fd")
        .expect("descriptors")
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|target| target.to_string_lossy().contains("memfd:dust"))
        .count()
}

#[test]
fn a_missing_interpreter_is_one_clear_line() {
    let config = SandboxConfig {
        python: Some("/nowhere/python3".into()),
        ..Default::default()
    };
    let error = Sandbox::new(config).err().expect("an error");
    assert!(
        format!("{error:#}").contains("cannot run /nowhere/python3"),
        "{error:#}"
    );
}

/// Everything that a user without privileges has.
#[test]
#[ignore = "started by works_without_root"]
fn as_a_user() {
    let strict = Sandbox::new(SandboxConfig {
        python: Some("/usr/bin/python3".into()),
        ..Default::default()
    });
    let config = SandboxConfig {
        allow_weak: Layer::ALL.to_vec(),
        python: Some("/usr/bin/python3".into()),
        ..Default::default()
    };
    let sandbox = Sandbox::new(config).expect("sandbox");
    eprintln!("{}", sandbox.effective());
    match strict {
        Ok(_) => assert!(sandbox.effective().missing.is_empty()),
        Err(error) => {
            let error = format!("{error:#}");
            let layer = sandbox
                .effective()
                .missing
                .keys()
                .next()
                .expect("a missing layer");
            assert!(
                error.contains(&format!("--sandbox allow-weak={layer}")),
                "{error}"
            );
        }
    }
    assert!(sandbox.effective().has(Layer::Uid));
    let run = |source: &str| {
        sandbox
            .run(&stdin_program(source, "", "1"), &limits())
            .verdict
    };
    assert_eq!(run("print(1)"), Verdict::Passed);
    assert_eq!(
        run("open('x', 'w').write('1')\nprint(open('x').read())"),
        Verdict::Passed
    );
    assert_eq!(
        run("open('/etc/shadow').read()"),
        if sandbox.effective().has(Layer::Namespaces) {
            Verdict::RuntimeError
        } else {
            Verdict::Denied
        }
    );
    assert_eq!(run("import socket\nsocket.socket()"), Verdict::Denied);
    assert_eq!(
        run("a = []\nwhile True: a.append('x' * 1000000)"),
        Verdict::Memory
    );
    assert_eq!(run("while True: pass"), Verdict::Timeout);
    let bomb = run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass");
    assert!(
        matches!(bomb, Verdict::Timeout | Verdict::Memory),
        "{bomb:?}"
    );
}

#[test]
fn works_without_root() {
    let folder = tempfile::tempdir().expect("folder");
    let copy = folder.path().join("test");
    fs::copy(std::env::current_exe().expect("path"), &copy).expect("copy");
    let mut command = Command::new(&copy);
    command.args(["as_a_user", "--exact", "--ignored", "--nocapture"]);
    if nix::unistd::geteuid().is_root() {
        let id = nix::unistd::Uid::from_raw(65533);
        nix::unistd::chown(folder.path(), Some(id), None).expect("chown");
        command.uid(65533).gid(65533);
    }
    let output = command
        .env("TMPDIR", folder.path())
        .output()
        .expect("helper");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
