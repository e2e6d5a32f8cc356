//! The committed tables of the kernels hold what this build makes, and its PTX suits old drivers.
//!
//! `DUST_WRITE_TABLES=1 cargo test --package dust-kernels --test cuda_tables` writes the tables
//! anew. They are made with the compiler that `make toolchain` fetches; another one's differ.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
    pub mod workloads;
}

use common::cuda::with_emulator;
use common::workloads::{Workload, all};
use cuda_emulator::Counters;
use cuda_emulator::estimate::{A100, Gpu, H100, occupancy, roofline};
use dust_kernels::cuda::{Entry, MODULES, Module};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// What a ptxas of `.toolchain` prints for a module.
fn assemble(ptxas: &str, module: &Module, arch: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ptx = folder.join(format!("{}.{arch}.ptx", module.op));
    std::fs::write(&ptx, module.ptx()).unwrap();
    let ptxas = root(".toolchain/nvidia").join(ptxas);
    assert!(ptxas.is_file(), "{}: run make toolchain", ptxas.display());
    let mut command = Command::new(ptxas);
    command.args(["-v", "--warn-on-spills", "--warning-as-error"]);
    command.arg(format!("-arch=sm_{arch}")).arg(&ptx);
    command.arg("-o").arg(ptx.with_extension("cubin"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{} for sm_{arch}: {text}",
        module.op
    );
    text.into_owned()
}

fn baseline() -> impl Iterator<Item = &'static Module> {
    MODULES.iter().filter(|module| module.arch == "80")
}

#[test]
fn the_ptxas_of_cuda_12_0_accepts_every_kernel() {
    for module in MODULES {
        assemble("cuda_nvcc/bin/ptxas", module, module.arch);
    }
}

/// The registers of an entry in a report of `ptxas -v`.
fn registers(report: &str, entry: &Entry) -> u32 {
    let (_, after) = report
        .split_once(&format!("entry function '{}'", entry.name))
        .unwrap();
    let (before, _) = after.split_once(" registers").unwrap();
    before.split_whitespace().last().unwrap().parse().unwrap()
}

fn resources(workloads: &[Workload]) -> String {
    let mut shared = BTreeMap::new();
    for report in workloads.iter().flat_map(|w| &w.reports) {
        let most: &mut (u32, u32) = shared.entry(report.kernel.as_str()).or_default();
        *most = (*most).max((report.shared, report.block.iter().product()));
    }
    let mut text = String::from(
        "# What each kernel takes\n\n\
         Written by `DUST_WRITE_TABLES=1 cargo test --test cuda_tables`; `make test` compares it. Registers\n\
         of a thread are ptxas' (CUDA 13.0), for sm_80 and sm_90. Threads and shared memory (static and\n\
         dynamic, bytes) are those of a block in the calls of [docs/counters.md](../docs/counters.md).\n\
         Occupancy, the share of a multiprocessor's 64 warps that fit, follows from them and from data\n\
         sheets; none of it is measured. No kernel spills: a spill fails the build.\n\n\
         | kernel | threads | registers A100 | H100 | shared | occupancy A100 | H100 |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    for module in baseline() {
        let hopper = assemble("cu13/bin/ptxas", module, "90");
        for entry in module.entries {
            let (shared, threads) = *shared
                .get(entry.name)
                .unwrap_or_else(|| panic!("{}: no call in tests/common/workloads.rs", entry.name));
            let (ampere, hopper) = (entry.registers as u32, registers(&hopper, entry));
            let share =
                |gpu: &Gpu, registers| 100.0 * occupancy(gpu, threads, registers, shared).share;
            let _ = writeln!(
                text,
                "| `{}` | {threads} | {ampere} | {hopper} | {shared} | {:.0} % | {:.0} % |",
                entry.name,
                share(&A100, ampere),
                share(&H100, hopper),
            );
        }
    }
    text
}

fn counters(workloads: &[Workload]) -> String {
    let mut text = String::from(
        "# What each kernel does\n\n\
         Written by `DUST_WRITE_TABLES=1 cargo test --test cuda_tables`; `make test` compares it. Each line\n\
         is one call, executed by [`cuda-emulator`](../emulator) and counted there:\n\n\
         - **bytes**: what warps load and store, over the least that any implementation must (each input\n  \
           read once, each output written once). Matrix products and attention read a tile's operands\n  \
           again for every tile; a GPU's caches serve most of that;\n\
         - **sectors**: the share of the touched 32-byte sectors that is used;\n\
         - **conflicts**: wavefronts of shared memory that bank conflicts add;\n\
         - **mma**: the share of floating-point operations that tensor cores do, and the warp\n  \
           instructions for each `mma`;\n\
         - **bound**: the longest of the times that a data sheet (A100 80 GB, 2.04 TB/s, 312 TFLOP/s) allows\n  \
           for the sectors and the arithmetic. An estimate: nothing here has run on a GPU.\n\n\
         | call | bytes | sectors | conflicts | mma | instructions per mma | bound A100 |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    for workload in workloads {
        let mut sum = Counters::default();
        for report in &workload.reports {
            assert_eq!(report.findings, [], "{}", workload.name);
            sum.add(&report.counters);
        }
        let bytes = sum.global_load_unique_bytes + sum.global_store_unique_bytes;
        let mma = sum.mma;
        let (share, each) = match mma {
            0 => ("-".into(), "-".into()),
            _ => (
                format!(
                    "{:.1} %",
                    100.0 * sum.mma_flops as f64 / (sum.mma_flops + sum.flops) as f64
                ),
                format!("{:.1}", sum.total_warps() as f64 / mma as f64),
            ),
        };
        let conflicts = match sum.shared_wavefronts {
            0 => "-".into(),
            n => format!("{:.1} %", 100.0 * sum.bank_conflicts as f64 / n as f64),
        };
        let _ = writeln!(
            text,
            "| {} | {:.2} x | {:.1} % | {conflicts} | {share} | {each} | {:.1} us |",
            workload.name,
            bytes as f64 / workload.least_bytes as f64,
            100.0 * sum.sector_use(),
            1e6 * roofline(&A100, &sum).seconds(),
        );
    }
    text
}

fn compare(path: &str, text: &str) {
    let file = root(path);
    if std::env::var_os("DUST_WRITE_TABLES").is_some() {
        std::fs::write(&file, text).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&file).unwrap();
    for (line, (is, was)) in text.lines().zip(committed.lines()).enumerate() {
        let remedy = "set DUST_WRITE_TABLES=1 to write it anew";
        assert_eq!(is, was, "{path}, line {}: {remedy}", line + 1);
    }
    assert_eq!(text.lines().count(), committed.lines().count(), "{path}");
}

#[test]
fn the_tables_are_up_to_date() {
    with_emulator(|cuda, emulator| {
        let workloads = all(cuda, emulator);
        compare("kernels/TABLE.md", &resources(&workloads));
        compare("docs/counters.md", &counters(&workloads));
    });
}

#[test]
fn the_readme_quotes_the_table() {
    let read = |path| std::fs::read_to_string(root(path)).unwrap();
    let (readme, table) = (read("README.md"), read("docs/counters.md"));
    let quoted: Vec<&str> = readme.lines().filter(|l| l.ends_with(" us |")).collect();
    assert!(quoted.len() > 10, "{quoted:?}");
    for line in quoted {
        assert!(
            table.contains(line),
            "README.md: `{line}` is not in docs/counters.md"
        );
    }
}
