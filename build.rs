//! Compiles `kernels/*.cu` to PTX and embeds it, as `$OUT_DIR/modules.rs`.
//!
//! Never asks a GPU: `DUST_CUDA_ARCHS` names the targets (default `80`; a comma list such as
//! `80,90a`). ptxas checks every file and prints what it takes; a register spill is a warning, or
//! an error if `DUST_DENY_SPILLS` is set.

#[path = "build/targets.rs"]
mod targets;

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::{env, fs};

use targets::TARGETS;

type Result<T> = std::result::Result<T, String>;

/// What the result depends on, beside files. `PATH` is another, where it decides.
const VARIABLES: [&str; 7] = [
    "DUST_NVCC",
    "CUDA_HOME",
    "DUST_CUDA_ARCHS",
    "DUST_DENY_SPILLS",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=kernels");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Cargo shows the lines that start so without the noise around them.
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run cargo")?);
    let root = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
    let root = PathBuf::from(root);
    if env::var_os("DOCS_RS").is_some() {
        return write_modules(&out, &[]); // documentation is built without a compiler for CUDA
    }
    let archs = env::var("DUST_CUDA_ARCHS").unwrap_or_else(|_| "80".into());
    let archs: Vec<(&str, &str)> = archs.split(',').map(target).collect::<Result<_>>()?;
    let ops = stems(&root.join("kernels"))?;
    let nvcc = find_nvcc(&root)?;
    let ptxas = nvcc.with_file_name("ptxas");
    println!("cargo::rerun-if-changed={}", nvcc.display());
    let mut fingerprint = DefaultHasher::new();
    include_str!("build.rs").hash(&mut fingerprint);
    header_text(&root.join("kernels/include"))?.hash(&mut fingerprint);
    // The compiler may be another one tomorrow, in the same place.
    run(Command::new(&nvcc).arg("--version"))?.hash(&mut fingerprint);
    run(Command::new(&ptxas).arg("--version"))?.hash(&mut fingerprint);
    for variable in VARIABLES.iter().filter(|name| name.starts_with("NVCC")) {
        env::var_os(variable).hash(&mut fingerprint);
    }
    let jobs: Vec<Job> = ops
        .iter()
        .flat_map(|op| archs.iter().map(move |arch| (op, arch)))
        .map(|(op, (arch, version))| Job {
            op: op.clone(),
            arch: arch.to_string(),
            version: version.to_string(),
            ptx: out.join(format!("{op}.{arch}.ptx")),
        })
        .collect();

    let next = Mutex::new(jobs.iter());
    let failures = Mutex::new(Vec::new());
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok());
    std::thread::scope(|scope| {
        for _ in 0..workers.unwrap_or(2).min(jobs.len()) {
            scope.spawn(|| {
                loop {
                    let Some(job) = next.lock().ok().and_then(|mut jobs| jobs.next()) else {
                        return;
                    };
                    if let Err(message) = job.run(&root, &nvcc, &ptxas, fingerprint.clone())
                        && let Ok(mut failures) = failures.lock()
                    {
                        failures.push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_default();
    if !failures.is_empty() {
        return Err(failures.join("\n"));
    }
    report_spills(&jobs)?;
    write_modules(&out, &jobs)
}

/// A target of the table, and the PTX ISA that it needs.
fn target(arch: &str) -> Result<(&str, &'static str)> {
    let arch = arch.trim();
    let known = TARGETS.iter().find(|(name, _)| *name == arch);
    known.map(|(_, version)| (arch, *version)).ok_or_else(|| {
        let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        format!(
            "DUST_CUDA_ARCHS: `{arch}` is no target of these kernels, but {} are; give a comma list",
            names.join(", ")
        )
    })
}

/// A spill makes a kernel slow, not wrong, and depends on the ptxas at hand: whoever only uses the
/// kernels is told.
fn report_spills(jobs: &[Job]) -> Result<()> {
    for job in jobs {
        let report = read(&job.resources())?;
        let spills =
            |line: &&str| line.contains(" spill stores") && !line.contains(" 0 bytes spill stores");
        if let Some(line) = report.lines().find(spills) {
            let message = format!("kernels/{}.cu, sm_{}: {}", job.op, job.arch, line.trim());
            if env::var_os("DUST_DENY_SPILLS").is_some() {
                return Err(message);
            }
            println!("cargo::warning={message}");
        }
    }
    Ok(())
}

/// Names of the operations that have a kernel file, sorted.
fn stems(folder: &Path) -> Result<Vec<String>> {
    let mut stems: Vec<String> = files(folder)?
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    stems.sort();
    Ok(stems)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

fn header_text(folder: &Path) -> Result<String> {
    files(folder)?.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn find_nvcc(root: &Path) -> Result<PathBuf> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(path) = env::var_os("DUST_NVCC") {
        let path = PathBuf::from(path);
        return match path.is_file() {
            true => Ok(path),
            false => Err(format!("DUST_NVCC: {} is no file", path.display())),
        };
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    if let Some(nvcc) = home
        .map(|bin| bin.join(&name))
        .filter(|nvcc| nvcc.is_file())
    {
        return Ok(nvcc);
    }
    println!("cargo::rerun-if-env-changed=PATH");
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([root.join(".toolchain/nvidia/cu13/bin")])
        .map(|folder| folder.join(&name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let checkout = match root.join("scripts/fetch_toolchain.py").is_file() {
                true => "run `make toolchain` (fetches it to .toolchain), or ",
                false => "",
            };
            format!(
                "the CUDA kernels need nvcc: {checkout}set DUST_NVCC to it or CUDA_HOME to a CUDA \
                 toolkit. Without one: `pip install --target cuda --no-deps {}`, then \
                 DUST_NVCC=$PWD/cuda/nvidia/cu13/bin/nvcc. Or build with --no-default-features \
                 (default-features = false in Cargo.toml): the CPU alone",
                WHEELS.join(" ")
            )
        })
}

/// nvcc and what it needs, as Python wheels.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// One kernel file for one target.
struct Job {
    op: String,
    arch: String,
    /// The PTX ISA that it is declared as.
    version: String,
    ptx: PathBuf,
}

impl Job {
    /// Where ptxas' report of registers and shared memory goes.
    fn resources(&self) -> PathBuf {
        self.ptx.with_extension("resources")
    }

    fn run(
        &self,
        root: &Path,
        nvcc: &Path,
        ptxas: &Path,
        mut fingerprint: DefaultHasher,
    ) -> Result<()> {
        let source = format!("kernels/{}.cu", self.op);
        (read(&root.join(&source))?, &self.version, nvcc).hash(&mut fingerprint);
        let fingerprint = fingerprint.finish().to_string();
        let stamp = self.ptx.with_extension("stamp");
        if fs::read_to_string(&stamp).is_ok_and(|old| old == fingerprint) {
            return Ok(());
        }
        let mut compile = Command::new(nvcc);
        compile.current_dir(root);
        compile.args(["-ptx", "-O3", "-std=c++17", "--generate-line-info"]);
        compile
            .args(["-I", "kernels/include", &source, "-o"])
            .arg(&self.ptx);
        compile.arg(format!("-arch=compute_{}", self.arch));
        run(&mut compile)?;

        // Drivers refuse PTX that is newer than they are. Nothing in the kernels needs more than
        // the first version that has the target (80 to 90a: what CUDA 12.0's drivers know), and
        // ptxas below confirms it for this very text.
        let version = &self.version;
        let here = format!("\"{}/", root.display());
        let text: String = read(&self.ptx)?
            .lines()
            // A hint for tools that check memory, unknown to that version.
            .filter(|line| !line.trim_start().starts_with(".pragma \"used_bytes_mask"))
            .map(|line| match line.strip_prefix(".version ") {
                Some(_) => format!(".version {version}\n"),
                // Absolute paths would make the text differ from machine to machine.
                None => format!("{}\n", line.replace(&here, "\"")),
            })
            .collect();
        fs::write(&self.ptx, text).map_err(|e| format!("{}: {e}", self.ptx.display()))?;

        let mut assemble = Command::new(ptxas);
        assemble.args(["-v", "--warning-as-error"]);
        assemble
            .arg(format!("-arch=sm_{}", self.arch))
            .arg(&self.ptx);
        assemble.arg("-o").arg(self.ptx.with_extension("cubin"));
        let report = run(&mut assemble)?;
        fs::write(self.resources(), report).map_err(|e| format!("ptxas' report: {e}"))?;
        fs::write(&stamp, fingerprint).map_err(|e| format!("{}: {e}", stamp.display()))
    }
}

/// Standard output and error of a command, which must succeed.
fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{program}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(text.into_owned()),
        false => Err(format!("{program}: {}\n{text}", output.status)),
    }
}

/// Writes the table that `src/cuda/launch.rs` includes: each file's text, and of each entry its
/// parameters' sizes and what ptxas says that it takes.
fn write_modules(out: &Path, jobs: &[Job]) -> Result<()> {
    let mut text = String::from("&[\n");
    for job in jobs {
        let (op, arch) = (&job.op, &job.arch);
        let (ptx, report) = (read(&job.ptx)?, read(&job.resources())?);
        let mut entries = String::new();
        for (name, params) in parameters(&ptx) {
            let (registers, shared) = resources(&report, &name)
                .ok_or_else(|| format!("{op}: ptxas reports nothing of {name}"))?;
            let threads = max_threads(&ptx, &name)
                .ok_or_else(|| format!("kernels/{op}.cu: {name} lacks __launch_bounds__"))?;
            let _ = write!(
                entries,
                "\n        Entry {{ name: {name:?}, params: &{params:?}, threads: {threads}, registers: {registers}, shared: {shared} }},"
            );
        }
        let file = job.ptx.display().to_string();
        let _ = writeln!(
            text,
            "    Module {{ op: {op:?}, arch: {arch:?}, text: concat!(include_str!({file:?}), \"\\0\"), entries: &[{entries}\n    ] }},"
        );
    }
    text.push(']');
    let path = out.join("modules.rs");
    fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Names of the entries and the sizes of their parameters, in bytes.
fn parameters(ptx: &str) -> Vec<(String, Vec<usize>)> {
    let mut entries: Vec<(String, Vec<usize>)> = Vec::new();
    let mut inside = false;
    for line in ptx.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            let name = rest.trim_end_matches(['(', ')']);
            entries.push((name.to_string(), Vec::new()));
            inside = rest.ends_with('(');
        } else if line.starts_with(')') {
            inside = false;
        } else if let (true, Some((_, params))) = (inside, entries.last_mut()) {
            params.extend(parameter_size(line));
        }
    }
    entries
}

/// Of `.param .u64 x` or `.param .align 8 .b8 x[16],`.
fn parameter_size(line: &str) -> Option<usize> {
    let rest = line.strip_prefix(".param ")?.trim_end_matches(',');
    if let Some((_, array)) = rest.split_once('[') {
        return array.trim_end_matches(']').parse().ok();
    }
    let kind = rest
        .split_whitespace()
        .find(|word| word.starts_with('.') && !word.starts_with(".align"))?;
    let bits: usize = kind
        .trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .ok()?;
    Some(bits / 8)
}

/// The block size that the entry's `.maxntid` declares.
fn max_threads(ptx: &str, name: &str) -> Option<usize> {
    let at = ptx.find(&format!(".entry {name}("))?;
    let head = ptx[at..].split('{').next()?;
    let sizes = head.split(".maxntid").nth(1)?.lines().next()?;
    sizes
        .split(',')
        .map(|n| n.trim().parse::<usize>().ok())
        .product()
}

/// Registers of a thread and bytes of static shared memory, from `ptxas -v`.
fn resources(report: &str, name: &str) -> Option<(usize, usize)> {
    let at = report.find(&format!("entry function '{name}'"))?;
    let line = report[at..]
        .lines()
        .find(|line| line.contains(" registers"))?;
    let before = |what: &str| {
        let head = line
            .split(what)
            .next()
            .filter(|head| head.len() < line.len())?;
        head.split_whitespace().last()?.parse().ok()
    };
    Some((before(" registers")?, before(" bytes smem").unwrap_or(0)))
}
