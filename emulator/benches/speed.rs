//! Thread instructions a second for plain kernels, checks off and on, and for matrix products.
//!
//! `cargo bench -p cuda-emulator` prints a CSV row a case: the median of several runs.
//! Processor time includes making the device and filling its memory.

use cuda_emulator::{Arg, Checks, Config, Device};
use std::hint::black_box;

const BASIC: &str = include_str!("../tests/kernels/basic.ptx");
const GEMM: &str = include_str!("../tests/kernels/gemm.ptx");
const SPEED: &str = include_str!("../tests/kernels/speed.ptx");

/// Seconds that this process has computed, all threads together.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses: state is field 3, user time field 14, in hundredths.
    let after = stat.rsplit(')').next().unwrap_or_default();
    after
        .split_whitespace()
        .nth(11)
        .and_then(|t| t.parse::<f64>().ok())
        .unwrap_or(0.0)
        / 100.0
}

fn report(name: &str, checks: &str, runs: usize, mut run: impl FnMut() -> (u64, f64)) {
    let before = cpu_seconds();
    let mut rates: Vec<(f64, u64, f64)> = (0..runs)
        .map(|_| {
            let (instructions, seconds) = run();
            (instructions as f64 / seconds, instructions, seconds)
        })
        .collect();
    // On a busy machine the wall clock says little: all runs by processor time.
    let by_cpu = rates.iter().map(|r| r.1).sum::<u64>() as f64 / (cpu_seconds() - before);
    rates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (rate, instructions, seconds) = rates[runs / 2];
    println!("{name},{checks},{instructions},{seconds:.4},{rate:.3e},{by_cpu:.3e}");
}

fn main() {
    // `cargo test` runs benchmarks with --test: once, small.
    let smoke = !std::env::args().any(|a| a == "--bench");
    let runs = if smoke { 1 } else { 5 };
    let scale = if smoke { 1 } else { 16 };
    println!(
        "kernel,checks,thread_instructions,seconds,thread_instructions_per_second,per_cpu_second"
    );
    for (label, checks) in [("none", Checks::NONE), ("all", Checks::ALL)] {
        let config = Config {
            checks,
            counters: true,
            ..Config::default()
        };
        report("polynomial", label, runs, || {
            let mut d = Device::new(config.clone());
            let m = d.load(SPEED).expect("the kernel loads");
            let n = 65536 * scale;
            let x = d.alloc_with(&vec![0; 4 * n as usize]).expect("memory");
            let args = [Arg::I32(n), Arg::U64(x)];
            let r = d.launch(
                &m,
                "polynomial",
                [n as u32 / 256, 1, 1],
                [256, 1, 1],
                0,
                &args,
            );
            let r = black_box(r.expect("the kernel runs"));
            assert!(r.findings.is_empty());
            (r.counters.total_threads(), r.seconds)
        });
        report("saxpy", label, runs, || {
            let mut d = Device::new(config.clone());
            let m = d.load(BASIC).expect("the kernel loads");
            let n = 65536 * scale;
            let x = d.alloc_with(&vec![0; 4 * n as usize]).expect("memory");
            let y = d.alloc_with(&vec![0; 4 * n as usize]).expect("memory");
            let args = [Arg::I32(n), Arg::F32(2.0), Arg::U64(x), Arg::U64(y)];
            let r = d.launch(&m, "saxpy", [n as u32 / 256, 1, 1], [256, 1, 1], 0, &args);
            let r = black_box(r.expect("the kernel runs"));
            assert!(r.findings.is_empty());
            (r.counters.total_threads(), r.seconds)
        });
        report("row_sum", label, runs, || {
            let mut d = Device::new(config.clone());
            let m = d.load(BASIC).expect("the kernel loads");
            let (rows, n) = (32 * scale, 2048);
            let x = d
                .alloc_with(&vec![0; (4 * rows * n) as usize])
                .expect("memory");
            let out = d.alloc(4 * rows as u64).expect("memory");
            let args = [Arg::I32(n), Arg::U64(x), Arg::U64(out)];
            let r = d.launch(&m, "row_sum", [rows as u32, 1, 1], [256, 1, 1], 0, &args);
            let r = black_box(r.expect("the kernel runs"));
            assert!(r.findings.is_empty());
            (r.counters.total_threads(), r.seconds)
        });
        report("gemm", label, runs, || {
            let mut d = Device::new(config.clone());
            let m = d.load(GEMM).expect("the kernel loads");
            let (rows, k) = (64 * scale.min(4), 256);
            let a = d
                .alloc_with(&vec![0; (2 * rows * k) as usize])
                .expect("memory");
            let c = d.alloc((4 * rows * rows) as u64).expect("memory");
            let args = [
                Arg::I32(rows),
                Arg::I32(rows),
                Arg::I32(k),
                Arg::U64(a),
                Arg::U64(a),
                Arg::U64(c),
            ];
            let grid = [rows as u32 / 64, rows as u32 / 64, 1];
            let r = d
                .launch(&m, "gemm", grid, [128, 1, 1], 0, &args)
                .expect("the kernel runs");
            assert!(r.findings.is_empty());
            (r.counters.total_threads(), r.seconds)
        });
    }
}
