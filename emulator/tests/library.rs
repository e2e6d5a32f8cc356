//! What CUDA's own headers compile to: cub, cooperative groups, the mathematical functions.

mod common;

use common::*;
use cuda_emulator::{Arg, Config, Device, Schedule};
use half::bf16;

const LIBRARY: &str = include_str!("kernels/library.ptx");

fn run(name: &str, threads: u32, args: &[Arg], device: &mut Device) {
    let module = device.load(LIBRARY).unwrap();
    let report = device
        .launch(&module, name, [1, 1, 1], [threads, 1, 1], 0, args)
        .unwrap();
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
}

#[test]
fn cub_reduces_scans_and_sorts() {
    for schedule in [Schedule::Serial, Schedule::Reverse, Schedule::Random(5)] {
        let mut d = Device::new(Config {
            schedule,
            ..Config::default()
        });
        let x: Vec<i32> = (0..256).map(|i| (i * 7919 + 13) % 1009 - 500).collect();
        let p = upload(&mut d, &x);
        let (sum, scan, sorted) = (
            d.alloc(4).unwrap(),
            d.alloc(512).unwrap(),
            d.alloc(1024).unwrap(),
        );
        let args = [Arg::U64(p), Arg::U64(sum), Arg::U64(scan), Arg::U64(sorted)];
        run("block_wide", 128, &args, &mut d);
        assert_eq!(download::<i32>(&d, sum, 1), [x[..128].iter().sum::<i32>()]);
        let before: Vec<i32> = (0..128).map(|i| x[..i].iter().sum()).collect();
        assert_eq!(download::<i32>(&d, scan, 128), before);
        let mut want = x.clone();
        want.sort();
        assert_eq!(download::<i32>(&d, sorted, 256), want);
    }
}

#[test]
fn cooperative_groups_partition_a_block() {
    let mut d = device();
    let x: Vec<i32> = (0..64).collect();
    let (p, o) = (upload(&mut d, &x), d.alloc(256).unwrap());
    run("tiles", 64, &[Arg::U64(p), Arg::U64(o)], &mut d);
    let want: Vec<i32> = (0..64i32)
        .map(|i| {
            let tile: i32 = (0..8).map(|k| i / 8 * 8 + k).sum();
            let warp: Vec<i32> = (i / 32 * 32..i / 32 * 32 + 32)
                .filter(|k| k % 3 == 0)
                .collect();
            match warp.iter().position(|k| *k == i) {
                Some(rank) => tile + 1000 * warp.len() as i32 + 100_000 * rank as i32,
                None => tile,
            }
        })
        .collect();
    assert_eq!(download::<i32>(&d, o, 64), want);
}

#[test]
fn mathematical_functions_are_as_exact_as_cuda_says() {
    let mut d = device();
    let x: Vec<f64> = (0..100)
        .map(|i| (0.05 + i as f64 * 0.37) as f32 as f64)
        .collect();
    let x32: Vec<f32> = x.iter().map(|v| *v as f32).collect();
    let (p32, o32) = (upload(&mut d, &x32), d.alloc(3200).unwrap());
    let (p64, o64) = (upload(&mut d, &x), d.alloc(6400).unwrap());
    run("functions32", 100, &[Arg::U64(p32), Arg::U64(o32)], &mut d);
    run("functions64", 100, &[Arg::U64(p64), Arg::U64(o64)], &mut d);
    let (y32, y64) = (download::<f32>(&d, o32, 800), download::<f64>(&d, o64, 800));
    for (i, v) in x.iter().enumerate() {
        let want = [
            v.exp(),
            v.ln(),
            v.powf(1.5),
            v.sin(),
            v.cos(),
            v.tanh(),
            v.atan(),
            v.cbrt(),
        ];
        for (k, w) in want.into_iter().enumerate() {
            let got = y64[8 * i + k];
            assert!(
                (got - w).abs() <= 4.0 * f64::EPSILON * w.abs().max(1e-3),
                "{k} {v} {got} {w}"
            );
            // The f32 row has erf where the f64 row has atan.
            let got = y32[8 * i + k] as f64;
            let ulps = 5.0 * f32::EPSILON as f64;
            assert!(
                k == 6 || (got - w).abs() <= ulps * w.abs().max(1e-2),
                "{k} {v} {got} {w}"
            );
        }
    }
}

#[test]
fn packed_bf16_rounds_each_step() {
    let mut d = device();
    let mut r = random(11);
    let x: Vec<u16> = (0..4 * 64)
        .map(|_| bf16::from_f64(r() * 4.0 - 2.0).to_bits())
        .collect();
    let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (p, o) = (upload(&mut d, &bytes), d.alloc(256).unwrap());
    run("halves", 64, &[Arg::U64(p), Arg::U64(o)], &mut d);
    let y = download::<u16>(&d, o, 128);
    let value = |i: usize| bf16::from_bits(x[i]).to_f64();
    for i in 0..64 {
        for h in 0..2 {
            let (a, b) = (value(4 * i + h), value(4 * i + 2 + h));
            let sum = bf16::from_f64(a + b).to_f64();
            let fma = bf16::from_f64(a * b + sum).to_f64();
            let square = bf16::from_f64(a * a).to_f64();
            assert_eq!(bf16::from_bits(y[2 * i + h]).to_f64(), fma.max(square));
        }
    }
}
