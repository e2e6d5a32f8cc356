//! Kernels that nvcc compiled, against plain Rust.

mod common;

use common::*;
use cuda_emulator::{
    Arg, BlockOrder, Config, CopyAsync, Device, LaunchReport, MmaRounding, Schedule,
};
use half::bf16;

/// Every way to order warps, blocks and copies.
fn configs() -> Vec<Config> {
    let base = Config::default();
    vec![
        base.clone(),
        Config {
            schedule: Schedule::Reverse,
            block_order: BlockOrder::Reverse,
            ..base.clone()
        },
        Config {
            schedule: Schedule::LowestPc,
            copy_async: CopyAsync::Early,
            ..base.clone()
        },
        Config {
            schedule: Schedule::Random(7),
            block_order: BlockOrder::Random(3),
            ..base.clone()
        },
        Config {
            schedule: Schedule::Reverse,
            copy_async: CopyAsync::Early,
            threads: 1,
            ..base
        },
    ]
}

fn run(
    device: &mut Device,
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    args: &[Arg],
) -> LaunchReport {
    let module = device.load(BASIC).unwrap();
    let report = device
        .launch(&module, name, grid, block, shared, args)
        .unwrap();
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    report
}

#[test]
fn saxpy_reaches_the_last_element_and_no_further() {
    for config in configs() {
        let mut d = Device::new(config);
        let n = 1000;
        let x: Vec<f32> = (0..n).map(|i| i as f32 * 0.5).collect();
        let y: Vec<f32> = (0..n).map(|i| 1000.0 - i as f32).collect();
        let (px, py) = (upload(&mut d, &x), upload(&mut d, &y));
        let args = [Arg::I32(n), Arg::F32(3.0), Arg::U64(px), Arg::U64(py)];
        let report = run(&mut d, "saxpy", [8, 1, 1], [128, 1, 1], 0, &args);
        for (i, v) in download::<f32>(&d, py, n as usize).into_iter().enumerate() {
            assert_eq!(v, 3f32.mul_add(x[i], y[i]));
        }
        assert_eq!(report.counters.global_load_bytes, 8000);
        assert_eq!(report.counters.global_store_bytes, 4000);
        assert_eq!(report.counters.global_store_sectors, 125);
        assert_eq!(report.counters.sector_use(), 1.0);
        assert_eq!(report.counters.flops, 2000);
    }
}

#[test]
fn sums_of_rows_by_shuffles_and_shared_memory() {
    for config in configs() {
        let mut d = Device::new(config);
        let (rows, n) = (5, 777);
        let x: Vec<f32> = (0..rows * n).map(|i| (i % 13) as f32 - 6.0).collect();
        let (px, out) = (upload(&mut d, &x), d.alloc(4 * rows as u64).unwrap());
        let args = [Arg::I32(n), Arg::U64(px), Arg::U64(out)];
        run(
            &mut d,
            "row_sum",
            [rows as u32, 1, 1],
            [256, 1, 1],
            0,
            &args,
        );
        let sums: Vec<f32> = x.chunks(n as usize).map(|r| r.iter().sum()).collect();
        assert_eq!(download::<f32>(&d, out, rows as usize), sums);
    }
}

#[test]
fn transposes_without_bank_conflicts_and_with() {
    for config in configs() {
        let mut d = Device::new(config);
        let (rows, cols) = (70usize, 45usize);
        let x: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        let (px, py) = (
            upload(&mut d, &x),
            d.alloc(4 * (rows * cols) as u64).unwrap(),
        );
        let args = [
            Arg::I32(rows as i32),
            Arg::I32(cols as i32),
            Arg::U64(px),
            Arg::U64(py),
        ];
        let report = run(&mut d, "transpose", [2, 3, 1], [32, 8, 1], 0, &args);
        let y = download::<f32>(&d, py, rows * cols);
        for r in 0..rows {
            for c in 0..cols {
                assert_eq!(y[c * rows + r], x[r * cols + c]);
            }
        }
        assert_eq!(report.counters.bank_conflicts, 0);
        let x: Vec<f32> = (0..64 * 64).map(|i| i as f32).collect();
        let (px, py) = (upload(&mut d, &x), d.alloc(4 * 64 * 64).unwrap());
        let args = [Arg::I32(64), Arg::U64(px), Arg::U64(py)];
        let report = run(
            &mut d,
            "transpose_conflicts",
            [2, 2, 1],
            [32, 32, 1],
            0,
            &args,
        );
        // Each of the 128 warps reads a column of one bank: 31 wavefronts too many.
        assert_eq!(report.counters.bank_conflicts, 128 * 31);
    }
}

#[test]
fn softmax_is_close_to_f64() {
    for config in configs() {
        let mut d = Device::new(Config {
            noise: Some(1),
            ..config
        });
        let (rows, n) = (3usize, 301usize);
        let mut r = random(1);
        let x: Vec<f32> = (0..rows * n).map(|_| (r() * 8.0) as f32).collect();
        let (px, py) = (upload(&mut d, &x), d.alloc(4 * (rows * n) as u64).unwrap());
        let args = [Arg::I32(n as i32), Arg::U64(px), Arg::U64(py)];
        run(
            &mut d,
            "softmax",
            [rows as u32, 1, 1],
            [128, 1, 1],
            4 * n as u32,
            &args,
        );
        let y = download::<f32>(&d, py, rows * n);
        for (x, y) in x.chunks(n).zip(y.chunks(n)) {
            let sum: f64 = x.iter().map(|v| (*v as f64).exp()).sum();
            for (x, y) in x.iter().zip(y) {
                let exact = (*x as f64).exp() / sum;
                assert!((*y as f64 - exact).abs() < 1e-5 * exact, "{y} {exact}");
            }
        }
    }
}

#[test]
fn histogram_by_atomics() {
    for config in configs() {
        let mut d = Device::new(config);
        let x: Vec<u8> = (0..5000u32).map(|i| (i * i / 7) as u8).collect();
        let mut bins = vec![0u32; 256];
        x.iter().for_each(|v| bins[*v as usize] += 1);
        let (px, pb) = (upload(&mut d, &x), upload(&mut d, &vec![0u32; 256]));
        let args = [Arg::I32(5000), Arg::U64(px), Arg::U64(pb)];
        run(&mut d, "histogram", [4, 1, 1], [256, 1, 1], 0, &args);
        assert_eq!(download::<u32>(&d, pb, 256), bins);
    }
}

#[test]
fn functions_are_called_and_recurse() {
    fn collatz(mut n: i64) -> i32 {
        let mut steps = 0;
        while n != 1 {
            n = if n & 1 == 1 { 3 * n + 1 } else { n / 2 };
            steps += 1;
        }
        steps
    }
    let fib = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89];
    for config in configs() {
        let mut d = Device::new(config);
        let n = 50;
        let (a, b) = (d.alloc(200).unwrap(), d.alloc(200).unwrap());
        run(
            &mut d,
            "functions",
            [1, 1, 1],
            [64, 1, 1],
            0,
            &[Arg::I32(n), Arg::U64(a), Arg::U64(b)],
        );
        let want: Vec<i32> = (1..=n as i64).map(collatz).collect();
        assert_eq!(download::<i32>(&d, a, n as usize), want);
        let want: Vec<u32> = (0..n as usize).map(|i| fib[i % 12]).collect();
        assert_eq!(download::<u32>(&d, b, n as usize), want);
    }
}

#[test]
fn local_arrays_are_private() {
    for config in configs() {
        let mut d = Device::new(config);
        let mut r = random(3);
        let x: Vec<i32> = (0..40 * 16).map(|_| (r() * 1000.0) as i32).collect();
        let (px, py) = (upload(&mut d, &x), d.alloc(4 * 640).unwrap());
        let args = [Arg::I32(40), Arg::U64(px), Arg::U64(py)];
        let report = run(&mut d, "local_sort", [1, 1, 1], [64, 1, 1], 0, &args);
        let mut want = x.clone();
        want.chunks_mut(16).for_each(<[i32]>::sort);
        assert_eq!(download::<i32>(&d, py, 640), want);
        assert!(report.counters.local_bytes > 0);
    }
}

#[test]
fn votes_compact_a_list() {
    for config in configs() {
        let mut d = Device::new(config);
        let x: Vec<i32> = (0..300).map(|i| (i * 37 % 11) - 5).collect();
        let (px, out) = (upload(&mut d, &x), d.alloc(1200).unwrap());
        let count = upload(&mut d, &[0i32]);
        let args = [Arg::I32(300), Arg::U64(px), Arg::U64(out), Arg::U64(count)];
        run(&mut d, "compact", [3, 1, 1], [128, 1, 1], 0, &args);
        let want: Vec<i32> = (0..300).filter(|i| x[*i as usize] > 0).collect();
        assert_eq!(download::<i32>(&d, count, 1), [want.len() as i32]);
        let mut got = download::<i32>(&d, out, want.len());
        got.sort();
        assert_eq!(got, want);
    }
}

#[test]
fn switches_constants_matches_and_reductions() {
    let table = [3, 1, 4, 1, 5, 9, 2, 6];
    for config in configs() {
        let mut d = Device::new(config);
        let x: Vec<i32> = (0..32).map(|i| i * 7 % 9).collect();
        let (px, out) = (upload(&mut d, &x), d.alloc(128).unwrap());
        run(
            &mut d,
            "mixed",
            [1, 1, 1],
            [32, 1, 1],
            0,
            &[Arg::U64(px), Arg::U64(out)],
        );
        let sum: i32 = x.iter().sum();
        let want: Vec<i32> = (0..32i32)
            .map(|i| {
                let v = x[i as usize];
                let r = match v {
                    0 => 11 * i,
                    1 => i - 7,
                    2 => i * i,
                    3 => !i,
                    4 => i << 3,
                    5 => i % 5,
                    6 => i.reverse_bits(),
                    _ => table[i as usize & 7],
                };
                let same = x.iter().filter(|w| **w == v).count() as i32;
                r.wrapping_add(same + sum + 5)
            })
            .collect();
        assert_eq!(download::<i32>(&d, out, 32), want);
    }
}

#[test]
fn structures_by_value_and_f64_functions() {
    let mut d = device();
    let out = d.alloc(8 * 40).unwrap();
    let mut point = 2.5f64.to_le_bytes().to_vec();
    point.extend(0.5f32.to_le_bytes());
    point.extend(3i32.to_le_bytes());
    run(
        &mut d,
        "by_value",
        [1, 1, 1],
        [40, 1, 1],
        0,
        &[Arg::Bytes(&point), Arg::U64(out)],
    );
    for (i, v) in download::<f64>(&d, out, 40).into_iter().enumerate() {
        let want = (2.5 * i as f64).sqrt() / 1.5 + (3.0 * i as f64).sin();
        assert!((v - want).abs() < 1e-12, "{v} {want}");
    }
}

#[test]
fn sixty_four_bit_arithmetic() {
    let mut d = device();
    let x: Vec<f64> = (0..1000).map(|i| i as f64 / 8.0).collect();
    let k: Vec<i64> = (0..1000).map(|i| i * 1_000_003 + 1).collect();
    let (px, pk) = (upload(&mut d, &x), upload(&mut d, &k));
    let (sum, mul) = (d.alloc(8).unwrap(), d.alloc(8 * 128).unwrap());
    let args = [
        Arg::I32(1000),
        Arg::U64(px),
        Arg::U64(pk),
        Arg::U64(sum),
        Arg::U64(mul),
    ];
    run(&mut d, "wide", [1, 1, 1], [128, 1, 1], 0, &args);
    assert_eq!(download::<f64>(&d, sum, 1), [x.iter().sum::<f64>()]);
    let want: Vec<u64> = (0..128)
        .map(|t| {
            let p = k
                .iter()
                .skip(t)
                .step_by(128)
                .fold(1u64, |p, v| p.wrapping_mul(*v as u64));
            let high = (p as u128 * 0x0123_4567_89ab_cdef_u128) >> 64;
            (p / 3).wrapping_add(high as u64 % 1000)
        })
        .collect();
    assert_eq!(download::<u64>(&d, mul, 128), want);
}

#[test]
fn fence_and_atomic_order_the_last_block() {
    for config in configs() {
        let mut d = Device::new(config);
        let x: Vec<i32> = (0..500).collect();
        let (px, part) = (upload(&mut d, &x), d.alloc(64).unwrap());
        let (done, out) = (upload(&mut d, &[0u32]), d.alloc(4).unwrap());
        let args = [
            Arg::I32(500),
            Arg::U64(px),
            Arg::U64(part),
            Arg::U64(done),
            Arg::U64(out),
        ];
        run(&mut d, "last_block", [16, 1, 1], [32, 1, 1], 0, &args);
        assert_eq!(download::<i32>(&d, out, 1), [x.iter().sum::<i32>()]);
    }
}

#[test]
fn matrix_product_in_every_order_and_rounding() {
    let (m, n, k) = (128usize, 64usize, 96usize);
    let mut r = random(5);
    let a: Vec<u16> = (0..m * k)
        .map(|_| bf16::from_f64(r() - 0.5).to_bits())
        .collect();
    let b: Vec<u16> = (0..n * k)
        .map(|_| bf16::from_f64(r() - 0.5).to_bits())
        .collect();
    for config in configs() {
        for mma in [MmaRounding::Exact, MmaRounding::Ampere, MmaRounding::Hopper] {
            let mut d = Device::new(Config {
                mma,
                ..config.clone()
            });
            let module = d.load(GEMM).unwrap();
            let (pa, pb) = (upload(&mut d, &a), upload(&mut d, &b));
            let pc = d.alloc(4 * (m * n) as u64).unwrap();
            let args = [
                Arg::I32(m as i32),
                Arg::I32(n as i32),
                Arg::I32(k as i32),
                Arg::U64(pa),
                Arg::U64(pb),
                Arg::U64(pc),
            ];
            let grid = [n as u32 / 64, m as u32 / 64, 1];
            let report = d
                .launch(&module, "gemm", grid, [128, 1, 1], 0, &args)
                .unwrap();
            assert!(report.findings.is_empty(), "{}", report.findings[0]);
            let c = download::<f32>(&d, pc, m * n);
            let value = |bits: u16| bf16::from_bits(bits).to_f64();
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|p| value(a[i * k + p]) * value(b[j * k + p]))
                        .sum();
                    assert!((c[i * n + j] as f64 - exact).abs() < 2e-5, "{i} {j}");
                }
            }
            assert_eq!(report.counters.mma_flops, 2 * (m * n * k) as u64);
            assert_eq!(report.counters.bank_conflicts, 0);
        }
    }
}
