//! Runs one kernel of a PTX file on arrays from .npy files, with checks, without a GPU.

use clap::Parser;
use cuda_emulator::estimate::{A100, Estimate, H100, Registers};
use cuda_emulator::npy::Npy;
use cuda_emulator::{
    Arg, BlockOrder, Checks, Config, CopyAsync, Device, LaunchReport, MmaRounding, Schedule,
};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Runs one kernel of a PTX file on the CPU and reports errors and counters.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// PTX file.
    file: PathBuf,
    /// Kernel to run.
    #[arg(long)]
    entry: String,
    /// Blocks: X,Y,Z; missing ones are 1.
    #[arg(long, value_parser = dimensions)]
    grid: [u32; 3],
    /// Threads of a block: X,Y,Z.
    #[arg(long, value_parser = dimensions)]
    block: [u32; 3],
    /// Bytes of dynamic shared memory.
    #[arg(long, default_value_t = 0)]
    shared: u32,
    /// JSON list with one entry a parameter: {"i32": 5} (also u32, i64, u64, f32, f64) or
    /// {"buffer": "x.npy"}, a path relative to this file.
    #[arg(long)]
    args: PathBuf,
    /// Folder to which every buffer is written as `<parameter index>.npy`.
    #[arg(long)]
    out: Option<PathBuf>,
    /// all, none, or a list of uninitialised, shared-races, global-races.
    #[arg(long, default_value = "all", value_parser = checks)]
    checks: Checks,
    /// serial, reverse, lowest-pc or random:SEED.
    #[arg(long, default_value = "serial", value_parser = schedule)]
    schedule: Schedule,
    /// forward, reverse or random:SEED.
    #[arg(long, default_value = "forward", value_parser = block_order)]
    block_order: BlockOrder,
    /// late or early.
    #[arg(long, default_value = "late", value_parser = copy_async)]
    copy_async: CopyAsync,
    /// exact, ampere or hopper.
    #[arg(long, default_value = "exact", value_parser = mma)]
    mma: MmaRounding,
    /// Disturb approximate functions by this seed.
    #[arg(long)]
    noise: Option<u64>,
    /// Warp instructions after which the kernel is taken to hang.
    #[arg(long, default_value_t = Config::default().step_limit)]
    step_limit: u64,
    /// The program ptxas, asked for the kernel's registers: adds estimates for an A100 and an H100.
    #[arg(long, conflicts_with = "registers")]
    ptxas: Option<PathBuf>,
    /// Registers of a thread, if known without ptxas: adds the same estimates.
    #[arg(long)]
    registers: Option<u32>,
    /// Print the report as JSON.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print the counters as CSV.
    #[arg(long)]
    csv: bool,
}

fn dimensions(text: &str) -> Result<[u32; 3], String> {
    let mut out = [1; 3];
    let parts: Vec<_> = text.split(',').collect();
    if parts.len() > 3 {
        return Err("at most three numbers".to_string());
    }
    for (o, p) in out.iter_mut().zip(parts) {
        *o = p
            .trim()
            .parse()
            .map_err(|_| format!("`{p}` is not a number"))?;
    }
    Ok(out)
}

fn checks(text: &str) -> Result<Checks, String> {
    match text {
        "all" => return Ok(Checks::ALL),
        "none" => return Ok(Checks::NONE),
        _ => {}
    }
    let mut out = Checks::NONE;
    for name in text.split(',') {
        match name {
            "uninitialised" => out.uninitialised = true,
            "shared-races" => out.shared_races = true,
            "global-races" => out.global_races = true,
            _ => return Err(format!("`{name}` is not a check")),
        }
    }
    Ok(out)
}

fn seed(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix("random:").and_then(|n| n.parse().ok());
    number.ok_or_else(|| format!("`{text}` is not known here"))
}

fn schedule(text: &str) -> Result<Schedule, String> {
    Ok(match text {
        "serial" => Schedule::Serial,
        "reverse" => Schedule::Reverse,
        "lowest-pc" => Schedule::LowestPc,
        other => Schedule::Random(seed(other)?),
    })
}

fn block_order(text: &str) -> Result<BlockOrder, String> {
    Ok(match text {
        "forward" => BlockOrder::Forward,
        "reverse" => BlockOrder::Reverse,
        other => BlockOrder::Random(seed(other)?),
    })
}

fn copy_async(text: &str) -> Result<CopyAsync, String> {
    match text {
        "late" => Ok(CopyAsync::Late),
        "early" => Ok(CopyAsync::Early),
        other => Err(format!("`{other}` is not late or early")),
    }
}

fn mma(text: &str) -> Result<MmaRounding, String> {
    match text {
        "exact" => Ok(MmaRounding::Exact),
        "ampere" => Ok(MmaRounding::Ampere),
        "hopper" => Ok(MmaRounding::Hopper),
        other => Err(format!("`{other}` is not exact, ampere or hopper")),
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("emulate: {message}");
            ExitCode::from(2)
        }
    }
}

/// Runs; true if nothing was found.
fn run(o: &Options) -> Result<bool, String> {
    let read = |p: &Path| std::fs::read(p).map_err(|e| format!("{}: {e}", p.display()));
    let text = String::from_utf8(read(&o.file)?)
        .map_err(|_| format!("{}: not PTX text: compile with nvcc -ptx", o.file.display()))?;
    let mut device = Device::new(Config {
        checks: o.checks,
        schedule: o.schedule,
        block_order: o.block_order,
        copy_async: o.copy_async,
        mma: o.mma,
        noise: o.noise,
        step_limit: o.step_limit,
        ..Config::default()
    });
    let module = device
        .load(&text)
        .map_err(|e| format!("{}: {e}", o.file.display()))?;
    let registers = match (&o.ptxas, o.registers) {
        (Some(ptxas), _) => Some(ask(ptxas, &o.file, &text, &o.entry)?),
        (None, Some(registers)) => Some(Registers {
            registers,
            spill_stores: 0,
            spill_loads: 0,
        }),
        (None, None) => None,
    };
    let json: Value = serde_json::from_slice(&read(&o.args)?)
        .map_err(|e| format!("{}: {e}", o.args.display()))?;
    let bad = |i: usize, why: &str| format!("{}: parameter {i}: {why}", o.args.display());
    let Value::Array(list) = json else {
        return Err(format!(
            "{}: must be a list with one entry a parameter",
            o.args.display()
        ));
    };
    let mut args = Vec::new();
    let mut buffers: Vec<(usize, u64, Npy)> = Vec::new();
    for (i, entry) in list.iter().enumerate() {
        let one = entry
            .as_object()
            .filter(|m| m.len() == 1)
            .and_then(|m| m.iter().next());
        let (kind, value) = one.ok_or_else(|| bad(i, "must be like {\"i32\": 5}"))?;
        let arg = match kind.as_str() {
            "i32" => value
                .as_i64()
                .and_then(|v| i32::try_from(v).ok())
                .map(Arg::I32),
            "u32" => value
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
                .map(Arg::U32),
            "i64" => value.as_i64().map(Arg::I64),
            "u64" => value.as_u64().map(Arg::U64),
            "f32" => value.as_f64().map(|v| Arg::F32(v as f32)),
            "f64" => value.as_f64().map(Arg::F64),
            "buffer" => {
                let name = value
                    .as_str()
                    .ok_or_else(|| bad(i, "the buffer must be a path"))?;
                let path = o.args.parent().unwrap_or(Path::new("")).join(name);
                let npy =
                    Npy::parse(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))?;
                let address = device.alloc_with(&npy.data).map_err(|e| e.to_string())?;
                buffers.push((i, address, npy));
                Some(Arg::U64(address))
            }
            other => {
                return Err(bad(
                    i,
                    &format!("`{other}` is not i32, u32, i64, u64, f32, f64 or buffer"),
                ));
            }
        };
        args.push(arg.ok_or_else(|| bad(i, &format!("{value} is not an {kind}")))?);
    }
    let report = device
        .launch(&module, &o.entry, o.grid, o.block, o.shared, &args)
        .map_err(|e| format!("{}: {e}", o.file.display()))?;
    if let Some(folder) = &o.out {
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        for (i, address, npy) in &mut buffers {
            device
                .read(*address, &mut npy.data)
                .map_err(|e| e.to_string())?;
            let path = folder.join(format!("{i}.npy"));
            std::fs::write(&path, npy.bytes()).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    print(o, &report, registers)?;
    Ok(report.findings.is_empty())
}

/// Asks ptxas what it makes of the kernel.
fn ask(ptxas: &Path, file: &Path, text: &str, entry: &str) -> Result<Registers, String> {
    let target = cuda_emulator::ptx::parse(text)
        .map(|module| module.target.to_string())
        .map_err(|e| format!("{}: {e}", file.display()))?;
    let output = Command::new(ptxas)
        .args(["-v", "-arch", &target, "-o", "/dev/null"])
        .arg(file)
        .output()
        .map_err(|e| format!("{}: {e}", ptxas.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("{}: {}", ptxas.display(), said.trim()));
    }
    Registers::parse(&said, entry)
        .ok_or_else(|| format!("{}: it says nothing of {entry}", ptxas.display()))
}

/// What is printed as JSON: the report and, if asked for, the estimates.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    report: &'a LaunchReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    registers: Option<Registers>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    estimates: Vec<Estimate>,
}

fn print(o: &Options, report: &LaunchReport, registers: Option<Registers>) -> Result<(), String> {
    let estimates: Vec<Estimate> = registers
        .iter()
        .flat_map(|r| [A100, H100].map(|gpu| Estimate::new(&gpu, report, r.registers)))
        .collect();
    if o.json {
        let printed = Printed {
            report,
            registers,
            estimates,
        };
        let text = serde_json::to_string_pretty(&printed).map_err(|e| e.to_string())?;
        println!("{text}");
        return Ok(());
    }
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    if o.csv {
        println!("{}\n{}", LaunchReport::csv_header(), report.csv_row());
        return Ok(());
    }
    print!("{}", report.table());
    if let Some(r) = registers {
        println!(
            "{} registers a thread, spilled bytes: {} stored, {} loaded",
            r.registers, r.spill_stores, r.spill_loads
        );
    }
    for estimate in estimates {
        println!("{estimate}");
    }
    Ok(())
}
