//! Thread instructions a second for plain kernels, checks off and on, and for matrix products.
//!
//! `cargo bench -p cuda-emulator` prints a CSV row a case: the median of several launches by the
//! wall clock, and all of them by processor time. `-- saxpy,none` runs the rows that begin so.

use cuda_emulator::{Arg, Checks, Config, Device};
use std::hint::black_box;

const BASIC: &str = include_str!("../tests/kernels/basic.ptx");
const GEMM: &str = include_str!("../tests/kernels/gemm.ptx");
const SPEED: &str = include_str!("../tests/kernels/speed.ptx");

/// Seconds that this process has computed, all threads together.
fn cpu_seconds() -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + 1e-9 * t.tv_nsec as f64
}

/// A launch on memory that no kernel has touched.
struct Case {
    text: &'static str,
    kernel: &'static str,
    grid: [u32; 2],
    threads: u32,
    /// Scalar arguments before the buffers.
    scalars: Vec<Arg<'static>>,
    /// Bytes of the buffers that are inputs, then of those that are results.
    inputs: Vec<i32>,
    results: Vec<i32>,
}

impl Case {
    /// Thread instructions of a launch, its seconds, and those of all threads together.
    fn run(&self, config: &Config) -> (u64, f64, f64) {
        let mut d = Device::new(config.clone());
        let m = d.load(self.text).expect("the kernels load");
        let mut args = self.scalars.clone();
        for len in &self.inputs {
            let zeros = vec![0; *len as usize];
            args.push(Arg::U64(d.alloc_with(&zeros).expect("memory")));
        }
        for len in &self.results {
            args.push(Arg::U64(d.alloc(*len as u64).expect("memory")));
        }
        let [x, y] = self.grid;
        let before = cpu_seconds();
        let r = d.launch(&m, self.kernel, [x, y, 1], [self.threads, 1, 1], 0, &args);
        let cpu = cpu_seconds() - before;
        let r = black_box(r.expect("the kernel runs"));
        assert!(r.findings.is_empty());
        (r.counters.total_threads(), r.seconds, cpu)
    }
}

fn cases(scale: i32) -> [Case; 4] {
    let n = 65536 * scale;
    let (rows, columns) = (32 * scale, 2048);
    let (side, depth) = (64 * scale.min(4), 256);
    [
        Case {
            text: SPEED,
            kernel: "polynomial",
            grid: [n as u32 / 256, 1],
            threads: 256,
            scalars: vec![Arg::I32(n)],
            inputs: vec![4 * n],
            results: vec![],
        },
        Case {
            text: BASIC,
            kernel: "saxpy",
            grid: [n as u32 / 256, 1],
            threads: 256,
            scalars: vec![Arg::I32(n), Arg::F32(2.0)],
            inputs: vec![4 * n, 4 * n],
            results: vec![],
        },
        Case {
            text: BASIC,
            kernel: "row_sum",
            grid: [rows as u32, 1],
            threads: 256,
            scalars: vec![Arg::I32(columns)],
            inputs: vec![4 * rows * columns],
            results: vec![4 * rows],
        },
        Case {
            text: GEMM,
            kernel: "gemm",
            grid: [side as u32 / 64; 2],
            threads: 128,
            scalars: vec![Arg::I32(side), Arg::I32(side), Arg::I32(depth)],
            inputs: vec![2 * side * depth, 2 * side * depth],
            results: vec![4 * side * side],
        },
    ]
}

fn main() {
    // `cargo test` runs benchmarks without --bench: once, small.
    let smoke = !std::env::args().any(|a| a == "--bench");
    let only = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let (runs, scale) = if smoke { (1, 1) } else { (9, 16) };
    println!(
        "kernel,checks,thread_instructions,seconds,thread_instructions_per_second,per_cpu_second"
    );
    for (label, checks) in [("none", Checks::NONE), ("all", Checks::ALL)] {
        let config = Config {
            checks,
            counters: true,
            ..Config::default()
        };
        for case in cases(scale) {
            let name = format!("{},{label}", case.kernel);
            if only.as_ref().is_some_and(|o| !name.starts_with(o.as_str())) {
                continue;
            }
            let mut all: Vec<_> = (0..runs).map(|_| case.run(&config)).collect();
            all.sort_by(|a, b| a.1.total_cmp(&b.1));
            let (instructions, seconds, _) = all[runs / 2];
            // On a busy machine the wall clock says little: processor time says more.
            let cpu: f64 = all.iter().map(|r| r.2).sum();
            let (rate, by_cpu) = (
                instructions as f64 / seconds,
                (instructions * runs as u64) as f64 / cpu,
            );
            println!("{name},{instructions},{seconds:.4},{rate:.3e},{by_cpu:.3e}");
        }
    }
}
