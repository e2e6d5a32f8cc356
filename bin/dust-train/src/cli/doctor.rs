//! `doctor`: what this machine has of what is needed.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::sandbox::{Sandbox, SandboxConfig};
use anyhow::Result;
use dust_kernels::Cpu;

/// Say what this machine has, what runs where, and what is missing.
///
/// The last line is the verdict; the exit status is 0 if nothing is missing and 1 otherwise.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dust-train doctor")]
pub(super) struct Args {}

pub(super) fn run(_: &Args, threads: Option<u16>) -> Result<ExitCode> {
    let cpu = threads.map_or_else(Cpu::new, |n| Cpu::with_threads(n.into()));
    let mut missing: Vec<String> = Vec::new();
    let mut out = io::stdout();
    let mut say = |name: &str, value: &str| writeln!(out, "{name:<14} {value}");
    say("dust-train", env!("CARGO_PKG_VERSION"))?;
    say(
        "system",
        &format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    )?;
    say(
        "processor",
        &processor().unwrap_or_else(|| "unknown".to_owned()),
    )?;
    say("features", &features().join(" "))?;
    say("SIMD in use", &cpu.level().to_string())?;
    let available = std::thread::available_parallelism().map_or(1, |n| n.get());
    say(
        "threads",
        &format!("{} in use, {available} available", cpu.threads()),
    )?;
    say("GPU", &gpu())?;
    let memory =
        |field| memory_gib(field).map_or("unknown".to_owned(), |gib| format!("{gib:.1} GiB"));
    say(
        "memory",
        &format!("{} free of {}", memory("MemAvailable"), memory("MemTotal")),
    )?;
    match landlock_abi() {
        Ok(abi) => say("Landlock", &format!("ABI {abi}"))?,
        Err(problem) => {
            say("Landlock", &problem)?;
            missing.push("Landlock: use Linux 5.13 or newer with `landlock` among the kernel's active security modules".into());
        }
    }
    match python() {
        Some(python) => say("python3", &python)?,
        None => {
            say("python3", "not found")?;
            missing.push("python3: install it and put it on PATH".into());
        }
    }
    // The sandbox runs its own self-test when it starts.
    match Sandbox::new(SandboxConfig::default()) {
        Ok(sandbox) => say(
            "sandbox",
            &sandbox.effective().to_string().replace('\n', "; "),
        )?,
        Err(problem) => {
            say("sandbox", "not as strict as asked for")?;
            missing.push(format!("{problem:#}"));
        }
    }
    say(
        "back ends",
        "cpu (kernels, rollout, training); no GPU back end is built in",
    )?;
    match model_cache() {
        Some(folder) => {
            let state = if folder.is_dir() {
                ""
            } else {
                " (made by the first download)"
            };
            say("model cache", &format!("{}{state}", folder.display()))?;
        }
        None => {
            say("model cache", "none")?;
            missing
                .push("model cache: set HF_HOME to a folder, or name models by their path".into());
        }
    }
    let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|v| !v.is_empty());
    say(
        "model hub",
        endpoint.as_deref().unwrap_or("https://huggingface.co"),
    )?;
    writeln!(out)?;
    if missing.is_empty() {
        writeln!(
            out,
            "Ready: models run and train on the CPU, and programs run in the sandbox."
        )?;
        Ok(ExitCode::SUCCESS)
    } else {
        writeln!(out, "Not ready: {}.", missing.join("; "))?;
        Ok(ExitCode::from(1))
    }
}

/// The first CUDA device, or why there is none.
#[cfg(feature = "cuda")]
fn gpu() -> String {
    use dust_kernels::{Cuda, Device};
    match Cuda::new(0) {
        Ok(cuda) => format!("{}, for --device cuda", cuda.name()),
        Err(error) => format!("none: {error}"),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> String {
    "this program was built without CUDA".into()
}

fn processor() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

fn memory_gib(name: &str) -> Option<f64> {
    let kib: f64 = field("/proc/meminfo", name)?
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()?;
    Some(kib / f64::from(1 << 20))
}

/// The first `name : value` in one of the kernel's files.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The features that the kernels can use.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ]
    .into_iter()
    .filter_map(|(name, has)| has.then_some(name))
    .collect()
}

/// The features that the kernels can use.
#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    if cfg!(target_feature = "neon") {
        vec!["neon"]
    } else {
        Vec::new()
    }
}

#[cfg(target_os = "linux")]
fn landlock_abi() -> Result<i64, String> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with no attributes, size 0 and the version flag, the call reads and writes no memory;
    // it only returns a number.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            VERSION,
        )
    };
    if abi > 0 {
        return Ok(abi);
    }
    Err(format!(
        "not available: {}",
        std::io::Error::last_os_error()
    ))
}

#[cfg(not(target_os = "linux"))]
fn landlock_abi() -> Result<i64, String> {
    Err("not available: this is not Linux".to_owned())
}

fn python() -> Option<String> {
    let code = "import sys; print(sys.version.split()[0], 'at', sys.executable)";
    let output = Command::new("python3")
        .args(["-I", "-c", code])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

fn model_cache() -> Option<PathBuf> {
    let home = std::env::var_os("HF_HOME")
        .filter(|v| !v.is_empty())
        .map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))?;
    Some(home.join("hub"))
}
