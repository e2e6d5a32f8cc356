//! Honest and hostile programs, mixed, for long: every verdict as it must be, and memory, descriptors,
//! processes, cgroups and scratch folders as many at the end as after the first round.

mod sandbox_support;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use dust_train::sandbox::{Layer, Limits, Mode, Program, Sandbox, SandboxConfig, Test, Verdict};
use sandbox_support::{assert_program, stdin_program};
use serde_json::json;

fn limits() -> Limits {
    Limits {
        cpu_s: 0.25,
        wall_s: 120.0,
        memory_mb: 64,
        output_bytes: 1 << 16,
        processes: 16,
        files_mb: 8,
    }
}

fn function(source: &str) -> Program {
    Program {
        source: source.into(),
        mode: Mode::Function,
        entry_point: Some("f".into()),
        tests: vec![Test::function(&[json!([3, 1, 2])], &json!([1, 2, 3]))],
        test_code: None,
    }
}

/// A program and what it must come to.
type Case = (Program, Verdict);

/// The cheap ones and the dear ones. The dear ones, which use up their time, come last.
fn mix() -> (Vec<Case>, Vec<Case>) {
    use Verdict::*;
    let check = "def check(candidate):\n    assert candidate([3, 1]) == [1, 3]";
    let cheap = vec![
        (stdin_program("print(int(input()) * 2)", "21", "42"), Passed),
        (function("def f(a): return sorted(a)"), Passed),
        (
            assert_program("def f(a): return sorted(a)", Some("f"), check),
            Passed,
        ),
        (
            stdin_program(
                "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()",
                "",
                "1",
            ),
            Passed,
        ),
        (
            stdin_program(
                "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x' * 1000000)\nprint(1)",
                "",
                "1",
            ),
            Passed,
        ),
        (
            stdin_program(
                "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\nprint(1)",
                "",
                "1",
            ),
            Passed,
        ),
        (function("def f(a): return a"), WrongAnswer),
        (stdin_program("print(2)", "", "1"), WrongAnswer),
        (stdin_program("1 / 0", "", "1"), RuntimeError),
        (stdin_program("def f(:", "", "1"), RuntimeError),
        // daemons, orphans and litter
        (
            stdin_program(
                "import os, time\nprint(1, flush=True)\nif os.fork() == 0: time.sleep(60)",
                "",
                "1",
            ),
            Passed,
        ),
        (
            stdin_program(
                "import os\nfor i in range(8):\n  if os.fork() == 0: os._exit(0)\nprint(1)",
                "",
                "1",
            ),
            Passed,
        ),
        (
            stdin_program(
                "import os\nos.makedirs('a/' * 50)\nos.symlink('/', 'trap')\nopen('b', 'w').write('x' * 100000)\nprint(1)",
                "",
                "1",
            ),
            Passed,
        ),
        (
            stdin_program("kept = [open('/dev/null') for _ in range(10000)]", "", "1"),
            RuntimeError,
        ),
        (
            stdin_program(
                "for i in range(100): open(f'f{i}', 'w').write('x' * 1000000)",
                "",
                "1",
            ),
            RuntimeError,
        ),
        // forgeries
        (function("import os\ndef f(a): os._exit(0)"), RuntimeError),
        (
            function("class E(list):\n  def __eq__(s, o): return True\ndef f(a): return E()"),
            WrongAnswer,
        ),
        (
            function(
                "import os, struct\ndef f(a):\n  m = b'{\"v\": true}'\n  os.write(3, struct.pack('=I', len(m)) + m)\n  os._exit(0)",
            ),
            WrongAnswer,
        ),
        (
            function("import os\ndef f(a):\n  os.write(3, b'\\xff' * 64)\n  os._exit(0)"),
            RuntimeError,
        ),
        (
            assert_program("import os\nos._exit(0)", Some("f"), check),
            RuntimeError,
        ),
        (
            assert_program(
                "class E:\n  def __eq__(s, o): return True\ndef f(a): return E()",
                Some("f"),
                check,
            ),
            RuntimeError,
        ),
        // too much
        (stdin_program("x = bytearray(1 << 30)", "", "1"), Memory),
        (
            stdin_program("while True: print('x' * 10000)", "", "1"),
            OutputLimit,
        ),
        // what is forbidden
        (
            stdin_program("import socket\nsocket.socket()", "", "1"),
            Denied,
        ),
        (
            stdin_program("import os\nos.chmod('/usr', 0)", "", "1"),
            Denied,
        ),
    ];
    let dear = vec![
        (stdin_program("while True: pass", "", "1"), Timeout),
        (
            stdin_program(
                "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\nwhile True: pass",
                "",
                "1",
            ),
            Timeout,
        ),
        (
            stdin_program(
                "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
                "",
                "1",
            ),
            Timeout,
        ),
    ];
    (cheap, dear)
}

/// One of fifty is dear.
fn programs(count: usize) -> Vec<Case> {
    let (cheap, dear) = mix();
    (0..count)
        .map(|i| match i % 50 {
            49 => dear[i / 50 % dear.len()].clone(),
            _ => cheap[i % cheap.len()].clone(),
        })
        .collect()
}

/// What must not grow.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Held {
    own_kb: u64,
    interpreters_kb: u64,
    processes: usize,
    descriptors: usize,
    folders: usize,
    mounts: usize,
}

impl Held {
    fn now() -> Self {
        let own = std::process::id();
        let below = descendants(own);
        let mark = format!("dust-sandbox-{own}-");
        Self {
            own_kb: resident_kb(own),
            interpreters_kb: below.iter().map(|&pid| resident_kb(pid)).sum(),
            processes: below.len(),
            descriptors: entries("/proc/self/fd").len(),
            folders: [
                "/sys/fs/cgroup",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/pids",
            ]
            .map(Into::into)
            .into_iter()
            .chain([std::env::temp_dir()])
            .map(|folder: std::path::PathBuf| {
                let names = entries(&folder.to_string_lossy());
                names.iter().filter(|name| name.starts_with(&mark)).count()
            })
            .sum(),
            mounts: fs::read_to_string("/proc/self/mounts").map_or(0, |text| text.lines().count()),
        }
    }
}

fn entries(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

fn descendants(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in entries("/proc").iter().filter_map(|name| name.parse().ok()) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut found: Vec<u32> = children.remove(&root).unwrap_or_default();
    let mut next = 0;
    while next < found.len() {
        found.extend(children.remove(&found[next]).unwrap_or_default());
        next += 1;
    }
    found
}

fn resident_kb(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Runs `count` programs a round and returns the time of each round.
fn soak(rounds: usize, count: usize) -> Vec<Duration> {
    let sandbox = Sandbox::new(SandboxConfig {
        allow_weak: Layer::ALL.to_vec(),
        ..Default::default()
    })
    .expect("sandbox");
    let (programs, verdicts): (Vec<_>, Vec<_>) = programs(count).into_iter().unzip();
    let mut times = Vec::new();
    let mut settled: Option<Held> = None;
    for round in 0..rounds {
        let start = Instant::now();
        sandbox.run_all(&programs, &limits(), |i, outcome| {
            // A fork bomb may also run out of memory first.
            let as_well = verdicts[i] == Verdict::Timeout && outcome.verdict == Verdict::Memory;
            assert!(
                outcome.verdict == verdicts[i] || as_well,
                "round {round}: {:#?}\n{outcome:#?}",
                programs[i]
            );
        });
        times.push(start.elapsed());
        let held = Held::now();
        eprintln!(
            "round {round}: {:.1} s, {held:?}",
            times[round].as_secs_f64()
        );
        let first = *settled.get_or_insert(held);
        assert_eq!(
            (held.processes, held.descriptors, held.folders, held.mounts),
            (
                first.processes,
                first.descriptors,
                first.folders,
                first.mounts
            )
        );
        assert!(held.own_kb < first.own_kb + (8 << 10), "{first:?} {held:?}");
        let interpreters = first.interpreters_kb + (8 << 10);
        assert!(held.interpreters_kb < interpreters, "{first:?} {held:?}");
    }
    times
}

#[test]
fn hundreds_of_programs_leave_nothing() {
    soak(3, 100);
}

/// `make test-long`. Of ten rounds the last five may not be slower than the first five by more than
/// what a busy host brings.
#[test]
#[ignore = "minutes; make test-long"]
fn ten_thousand_programs_leave_nothing_and_slow_nothing() {
    let times = soak(10, 1000);
    let total = |times: &[Duration]| times.iter().sum::<Duration>().as_secs_f64();
    let (first, last) = (total(&times[..5]), total(&times[5..]));
    eprintln!("first half {first:.1} s, second half {last:.1} s");
    assert!(last < 1.5 * first, "{times:?}");
}
