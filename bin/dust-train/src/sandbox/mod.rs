//! Runs programs that nobody has read, and says whether they are right.
//!
//! ```no_run
//! use dust_train::sandbox::{Limits, Mode, Program, Sandbox, SandboxConfig, Test, Verdict};
//!
//! let sandbox = Sandbox::new(SandboxConfig::default())?;
//! let program = Program {
//!     source: "print(int(input()) * 2)".into(),
//!     mode: Mode::Stdin,
//!     entry_point: None,
//!     tests: vec![Test::stdin("21\n", "42\n")],
//!     test_code: None,
//! };
//! assert_eq!(sandbox.run(&program, &Limits::default()).verdict, Verdict::Passed);
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! A worker keeps a warm interpreter that forks a fresh, fully restricted child for each test.
//! Expected values never enter the child: it gets arguments and returns plain data, and the
//! comparison is made here. Trouble of the host is [`Verdict::InfraError`], retried, never a label.
//! `docs/sandbox.md` has the threat model and what each layer is for.

mod cgroup;
mod data;
mod effective;
mod exec;
mod janitor;
mod landlock;
mod launch;
mod program;
mod seccomp;
mod stdout;
mod supervise;
mod verdict;
mod worker;
mod zygote;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use data::{Data, Tuples};
pub use effective::{Effective, Layer};
pub use exec::{exec, serve};
pub use program::{Limits, Mode, Outcome, Program, Test, TestOutcome, Verdict};
pub use stdout::same_output;

/// For the fuzz targets (`fuzz/`): what reads hostile bytes.
#[doc(hidden)]
pub mod fuzz {
    use super::{Data, Tuples, Verdict, exec::Work, same_output, verdict::answered};

    /// A request of `exec`; whether it is one.
    pub fn request(text: &str) -> bool {
        Work::parse(text).is_ok()
    }

    /// A frame of a box, against an expected value.
    pub fn answer(frame: &[u8], expected: &str) -> Option<Verdict> {
        let expected = Data::from_json(expected).ok()?;
        Some(answered(frame, &expected, Tuples::Anywhere))
    }

    /// Printed text against expected text.
    pub fn printed(printed: &str, expected: &str) -> bool {
        same_output(printed, expected)
    }
}

use cgroup::Cgroup;
use worker::Worker;
use zygote::{Facts, Zygote};

/// Whose rules decide.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grading {
    /// Every test is a process; a program passes as it would from the command line.
    #[default]
    Process,
    /// LiveCodeBench's evaluator: one process for all tests, the program as a function in it, and all
    /// that follows from this (`docs/benchmarks.md`). Always stops at the first failure.
    LcbStrict,
}

/// How to set the sandbox up. The default is strict.
#[derive(Debug, Clone, Default)]
pub struct SandboxConfig {
    /// Layers that may be missing. Whatever else is missing is an error.
    pub allow_weak: Vec<Layer>,
    /// Programs that run at a time; one for each core if `None`.
    pub workers: Option<usize>,
    /// Whose rules decide.
    pub grading: Grading,
    /// Run the tests that come after the first failure, too.
    pub all_tests: bool,
    /// The interpreter; `python3` of the path, and what stands behind it, if `None`.
    pub python: Option<PathBuf>,
}

/// What every worker needs to know.
struct Setup {
    python: PathBuf,
}

/// How a program is judged.
#[derive(Clone, Copy)]
struct Rules {
    grading: Grading,
    all_tests: bool,
}

impl Setup {
    fn start_zygote(&self) -> Result<Zygote> {
        let cgroup = Cgroup::create();
        let adopt = |pid| cgroup.as_ref().map_or(Ok(()), |c| c.adopt(pid));
        let scratch_root = std::env::temp_dir();
        let groups = cgroup.iter().flat_map(Cgroup::parents);
        janitor::start(groups.chain([scratch_root.as_path()]));
        let mut zygote = Zygote::start(&self.python, &scratch_root, adopt)?;
        match cgroup {
            Ok(cgroup) => {
                cgroup.settle();
                zygote.cgroup = Some(cgroup);
            }
            Err(error) => zygote.why_no_cgroup = Some(format!("{error:#}")),
        }
        Ok(zygote)
    }
}

/// Runs programs. Share it freely: it hands out as many workers as it has.
pub struct Sandbox {
    setup: Arc<Setup>,
    rules: Rules,
    effective: Effective,
    idle: Mutex<Vec<Worker>>,
}

impl Sandbox {
    /// Starts the first worker, tests it from inside, and refuses if a layer is missing.
    pub fn new(config: SandboxConfig) -> Result<Self> {
        let workers = config
            .workers
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1)
            .max(1);
        let setup = Arc::new(Setup {
            python: python(config.python)?,
        });
        let zygote = setup.start_zygote()?;
        let mut effective = effective(&setup, &zygote, workers);
        for (layer, why) in &effective.missing {
            ensure!(
                config.allow_weak.contains(layer),
                "sandbox: layer {layer} is missing ({why}); \
                 to go without it, say --sandbox allow-weak={layer}"
            );
        }
        let mut worker = Worker::with(setup.clone(), zygote);
        self_test(&mut worker, &mut effective)?;
        let idle = Mutex::new(vec![worker]);
        let rules = Rules {
            grading: config.grading,
            all_tests: config.all_tests,
        };
        Ok(Self {
            setup,
            rules,
            effective,
            idle,
        })
    }

    /// What is in force.
    pub fn effective(&self) -> &Effective {
        &self.effective
    }

    /// Runs one program.
    pub fn run(&self, program: &Program, limits: &Limits) -> Outcome {
        self.run_with(program, limits, self.rules.grading, self.rules.all_tests)
    }

    /// Runs one program by other rules than the configured ones.
    pub fn run_with(
        &self,
        program: &Program,
        limits: &Limits,
        grading: Grading,
        all_tests: bool,
    ) -> Outcome {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut worker = idle()
            .pop()
            .unwrap_or_else(|| Worker::new(self.setup.clone()));
        let outcome = worker.run(program, limits, Rules { grading, all_tests });
        idle().push(worker);
        outcome
    }

    /// Runs many on all workers and hands each outcome over, with its index, as it is ready.
    /// `on_done` is called from the workers' threads, by one at a time.
    pub fn run_all(
        &self,
        programs: &[Program],
        limits: &Limits,
        on_done: impl FnMut(usize, Outcome) + Send,
    ) {
        let next = AtomicUsize::new(0);
        let on_done = Mutex::new(on_done);
        std::thread::scope(|scope| {
            for _ in 0..self.effective.workers.min(programs.len()) {
                scope.spawn(|| {
                    while let Some((index, program)) = {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        programs.get(index).map(|program| (index, program))
                    } {
                        let outcome = self.run(program, limits);
                        on_done.lock().unwrap_or_else(PoisonError::into_inner)(index, outcome);
                    }
                });
            }
        });
    }
}

/// The interpreter itself: a version manager's stand-in would cost more than most programs.
fn python(chosen: Option<PathBuf>) -> Result<PathBuf> {
    let name = chosen.unwrap_or_else(|| "python3".into());
    let output = std::process::Command::new(&name)
        .args(["-I", "-S", "-B", "-c", "import sys; print(sys.executable)"])
        .output()
        .with_context(|| {
            format!(
                "sandbox: cannot run {}; install Python 3.9 or newer",
                name.display()
            )
        })?;
    ensure!(
        output.status.success(),
        "sandbox: {} does not run",
        name.display()
    );
    let path = String::from_utf8(output.stdout).context("sandbox: path of the interpreter")?;
    Ok(std::fs::canonicalize(path.trim())?)
}

fn effective(setup: &Setup, zygote: &Zygote, workers: usize) -> Effective {
    let Facts {
        landlock_abi,
        isolated,
        why_not_isolated,
        uid,
        version,
        ..
    } = zygote.facts.clone();
    let mut effective = Effective {
        layers: Default::default(),
        missing: Default::default(),
        self_test: Vec::new(),
        gaps: Vec::new(),
        python: format!("{} {version}", setup.python.display()),
        workers,
    };
    let mut note = |layer, state: Result<String, String>| {
        match state {
            Ok(how) => effective.layers.insert(layer, how),
            Err(why) => effective.missing.insert(layer, why),
        };
    };
    note(
        Layer::Landlock,
        match landlock_abi {
            1.. => Ok(format!("ABI {landlock_abi}")),
            _ => Err("the kernel has no Landlock, or it is off".into()),
        },
    );
    note(Layer::Seccomp, Ok("allow-list".into()));
    note(
        Layer::Namespaces,
        match isolated {
            true => Ok("user, pid, mount, net, ipc, uts, cgroup; own root, tmpfs scratch".into()),
            false => Err(why_not_isolated.unwrap_or_default()),
        },
    );
    note(
        Layer::Cgroup,
        match (&zygote.cgroup, &zygote.why_no_cgroup) {
            (Some(cgroup), _) => Ok(format!(
                "version {}: memory, pids, cpu time",
                cgroup.version()
            )),
            (None, why) => Err(why.clone().unwrap_or_default()),
        },
    );
    note(
        Layer::Uid,
        match uid {
            0 => Err("programs would run as root".into()),
            _ if nix::unistd::geteuid().is_root() => {
                Ok("unprivileged user, no capabilities".into())
            }
            _ => Ok("our own user, no capabilities".into()),
        },
    );
    effective
}

/// From inside, attempts what must fail. What succeeds is an error, unless a layer is missing.
fn self_test(worker: &mut Worker, effective: &mut Effective) -> Result<()> {
    let canary = tempfile::NamedTempFile::new().context("sandbox: no temporary file")?;
    let arguments = [
        serde_json::json!(canary.path().to_string_lossy()),
        serde_json::json!(std::process::id()),
    ];
    let program = Program {
        source: include_str!("self_test.py").into(),
        mode: Mode::Function,
        entry_point: Some("probe".into()),
        tests: vec![Test::function(&arguments, &serde_json::json!([]))],
        test_code: None,
    };
    let rules = Rules {
        grading: Grading::Process,
        all_tests: false,
    };
    let outcome = worker.run(&program, &Limits::default(), rules);
    let test = outcome
        .tests
        .into_iter()
        .next()
        .context("sandbox: the self-test did not run")?;
    let lines = |key: &str| -> Vec<String> {
        let words = test.stdout.lines().find_map(|line| line.strip_prefix(key));
        words
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    effective.self_test = lines("tried");
    effective.gaps = lines("succeeded");
    match test.verdict {
        Verdict::Passed => Ok(()),
        Verdict::WrongAnswer if effective.missing.is_empty() => bail!(
            "sandbox: the self-test could do from inside what must be impossible: {}",
            effective.gaps.join(", ")
        ),
        Verdict::WrongAnswer => Ok(()),
        verdict => bail!(
            "sandbox: the self-test did not run: {verdict:?} {} {}",
            test.stderr.trim(),
            test.trouble.unwrap_or_default()
        ),
    }
}
