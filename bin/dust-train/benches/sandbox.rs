//! Programs a second: the sandbox with every layer on, against a bare interpreter process and,
//! where it is installed, bubblewrap. All on as many threads as there are cores, interleaved.
//!
//! `cargo bench -p dust-train --bench sandbox`; `-- 10000` for so many programs a round.
//! Without `--bench` (that is, from the tests) every line runs a few times, untimed.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dust_train::sandbox::{Limits, Mode, Program, Sandbox, SandboxConfig, Test, Verdict};

const ROUNDS: usize = 5;

/// A name and the work of one round.
type Line<'a> = (&'static str, Box<dyn Fn() + 'a>);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let timed = arguments.iter().any(|a| a == "--bench");
    let asked = arguments.iter().find_map(|a| a.parse().ok());
    let count = if timed { asked.unwrap_or(300) } else { 4 };
    let sandbox = Sandbox::new(SandboxConfig::default())?;
    println!("{}\n", sandbox.effective());

    let python = sandbox
        .effective()
        .python
        .split(' ')
        .next()
        .map(PathBuf::from)
        .unwrap_or_default();
    let script = vec![program("print(1)", Mode::Stdin); count];
    let function = vec![program("def f():\n    return 1", Mode::Function); count];
    let bare = |folder: Option<&str>| match folder {
        None => Command::new(&python),
        Some(bwrap) => {
            let mut command = Command::new(bwrap);
            command
                .args(["--unshare-all", "--ro-bind", "/", "/", "--tmpfs", "/tmp"])
                .arg(&python);
            command
        }
    };
    let has_bwrap = Command::new("bwrap")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok();
    let mut lines: Vec<Line> = vec![
        ("sandbox, script", Box::new(|| run(&sandbox, &script))),
        ("sandbox, function", Box::new(|| run(&sandbox, &function))),
        (
            "python3 -I -S -B",
            Box::new(|| processes(count / 4, || bare(None))),
        ),
    ];
    if has_bwrap {
        lines.push((
            "bubblewrap + it",
            Box::new(|| processes(count / 4, || bare(Some("bwrap")))),
        ));
    }
    let mut speeds = vec![Vec::new(); lines.len()];
    for _ in 0..if timed { ROUNDS } else { 1 } {
        for ((name, work), speeds) in lines.iter().zip(&mut speeds) {
            let start = Instant::now();
            work();
            let done = if name.starts_with("sandbox") {
                count
            } else {
                count / 4
            };
            speeds.push(done as f64 / start.elapsed().as_secs_f64());
        }
    }
    for ((name, _), mut speeds) in lines.iter().zip(speeds).filter(|_| timed) {
        speeds.sort_by(f64::total_cmp);
        let all: Vec<String> = speeds.iter().map(|s| format!("{s:.0}")).collect();
        println!(
            "{name:<20}{:>6.0} programs/s   (rounds: {})",
            speeds[speeds.len() / 2],
            all.join(" ")
        );
    }
    Ok(())
}

fn program(source: &str, mode: Mode) -> Program {
    let test = match mode {
        Mode::Stdin => Test::stdin("", "1"),
        _ => Test::function(&[], &serde_json::json!(1)),
    };
    Program {
        source: source.into(),
        mode,
        entry_point: Some("f".into()),
        tests: vec![test],
        test_code: None,
    }
}

fn run(sandbox: &Sandbox, programs: &[Program]) {
    sandbox.run_all(programs, &Limits::default(), |_, outcome| {
        assert_eq!(outcome.verdict, Verdict::Passed, "{outcome:#?}");
    });
}

fn processes(count: usize, command: impl Fn() -> Command + Sync) {
    let left = AtomicUsize::new(count);
    let take = || {
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while take() {
                    let output = command()
                        .args(["-I", "-S", "-B", "-c", "print(1)"])
                        .output();
                    assert_eq!(output.expect("python").stdout, b"1\n");
                }
            });
        }
    });
}
