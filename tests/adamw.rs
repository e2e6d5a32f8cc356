//! AdamW over 50 steps of f64, the norm, and what a bad gradient may not do.

use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::{Cpu, Device, Error};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Parameters, moments and the copy after `steps` steps.
fn train(threads: usize, len: usize, steps: u32) -> (Vec<f32>, Vec<f32>, Vec<f32>, Vec<bf16>) {
    let cpu = Cpu::with_threads(threads);
    let mut param = cpu.upload(&random(0, len)).unwrap();
    let (mut m, mut v) = (cpu.zeros(len).unwrap(), cpu.zeros(len).unwrap());
    let mut copy = cpu.zeros::<bf16>(len).unwrap();
    let scale = cpu.upload(&[0.5f32]).unwrap();
    for step in 1..=steps {
        let config = AdamWConfig {
            learning_rate: 1e-3,
            step,
            ..Default::default()
        };
        let grad = cpu.upload(&random(u64::from(step), len)).unwrap();
        let copy = Some(&mut copy);
        cpu.adamw(
            &config, len, &scale, &grad, &mut param, &mut m, &mut v, copy,
        )
        .unwrap();
    }
    (param.to_vec(), m.to_vec(), v.to_vec(), copy.to_vec())
}

#[test]
fn fifty_steps_match_f64() {
    for len in [1, 7, 111, 989, 40_000] {
        let (param, m, v, copy) = train(2, len, 50);
        let start = random(0, len);
        let c = AdamWConfig::default();
        let (b1, b2) = (f64::from(c.beta1), f64::from(c.beta2));
        let mut want: Vec<[f64; 3]> = start.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
        for step in 1..=50 {
            let grad = random(step as u64, len);
            for ([p, m, v], g) in want.iter_mut().zip(grad) {
                let g = 0.5 * f64::from(g);
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                let hat = *m / (1.0 - b1.powi(step));
                let root = (*v / (1.0 - b2.powi(step))).sqrt() + f64::from(c.eps);
                *p -= f64::from(1e-3f32) * (hat / root + f64::from(c.weight_decay) * *p);
            }
        }
        for i in 0..len {
            for (got, want, tolerance) in [
                (param[i], want[i][0], 2e-6),
                (m[i], want[i][1], 1e-6),
                (v[i], want[i][2], 1e-6),
            ] {
                assert!((f64::from(got) - want).abs() < tolerance, "{got} {want}");
            }
            assert_eq!(copy[i], bf16::from_f32(param[i]));
        }
    }
}

#[test]
fn steps_have_the_same_bits_on_any_number_of_threads() {
    let want = train(1, 100_001, 3);
    for threads in [1, 2, 5] {
        assert!(train(threads, 100_001, 3) == want);
    }
}

#[test]
fn the_copy_rounds_to_nearest_even_and_keeps_nan() {
    let cpu = Cpu::with_threads(1);
    // Halfway between two bf16 with an even and an odd lower neighbour, just above, the
    // largest f32 (which rounds to infinity), NaN.
    let start = [
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_8001,
        0x7f7f_ffff,
        0x7f80_0001,
    ]
    .map(f32::from_bits);
    let mut param = cpu.upload(&start).unwrap();
    let (mut m, mut v) = (cpu.zeros(5).unwrap(), cpu.zeros(5).unwrap());
    let mut copy = cpu.zeros::<bf16>(5).unwrap();
    let scale = cpu.upload(&[1.0f32]).unwrap();
    let grad = cpu.zeros(5).unwrap();
    let config = AdamWConfig {
        weight_decay: 0.0,
        ..Default::default()
    };
    cpu.adamw(
        &config,
        5,
        &scale,
        &grad,
        &mut param,
        &mut m,
        &mut v,
        Some(&mut copy),
    )
    .unwrap();
    let bits: Vec<u16> = copy.iter().map(|c| c.to_bits()).collect();
    assert_eq!(bits[..4], [0x3f80, 0x3f82, 0x3f81, 0x7f80]);
    assert!(copy[4].is_nan());
}

#[test]
fn scale_zero_skips_the_step_whatever_the_gradient() {
    let cpu = Cpu::with_threads(1);
    let grad = cpu.upload(&[f32::NAN, f32::INFINITY, 1.0]).unwrap();
    let mut squares = cpu.zeros(1).unwrap();
    let (mut norm, mut scale) = (cpu.zeros(1).unwrap(), cpu.upload(&[1.0f32]).unwrap());
    cpu.sum_of_squares(3, &grad, &mut squares, 0).unwrap();
    cpu.clip_scale(1, 1.0, &squares, &mut norm, &mut scale)
        .unwrap();
    assert!(norm[0].is_nan());
    assert_eq!(scale[0], 0.0);
    let mut param = cpu.upload(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut m = cpu.upload(&[0.1f32, 0.2, 0.3]).unwrap();
    let mut v = cpu.upload(&[0.4f32, 0.5, 0.6]).unwrap();
    let mut copy = cpu.upload(&[bf16::ONE; 3]).unwrap();
    let config = AdamWConfig::default();
    cpu.adamw(
        &config,
        3,
        &scale,
        &grad,
        &mut param,
        &mut m,
        &mut v,
        Some(&mut copy),
    )
    .unwrap();
    assert_eq!(param[..], [1.0, 2.0, 3.0]);
    assert_eq!(m[..], [0.1, 0.2, 0.3]);
    assert_eq!(v[..], [0.4, 0.5, 0.6]);
    assert_eq!(copy[..], [bf16::ONE; 3]);
}

#[test]
fn ten_million_squares_are_summed_to_the_last_bit_of_f32() {
    let len = 10_000_003;
    let x = random(9, len);
    // Kahan's sum in f64 of products that are exact in f64.
    let (mut want, mut lost) = (0.0f64, 0.0f64);
    for &x in &x {
        let y = f64::from(x) * f64::from(x) - lost;
        let sum = want + y;
        lost = (sum - want) - y;
        want = sum;
    }
    for threads in [1, 2, 5] {
        let cpu = Cpu::with_threads(threads);
        let mut out = cpu.zeros(3).unwrap();
        cpu.sum_of_squares(len, &cpu.upload(&x).unwrap(), &mut out, 1)
            .unwrap();
        assert_eq!(out[..], [0.0, want as f32, 0.0], "{threads} threads");
    }
}

#[test]
fn norms_are_clipped_from_above_only() {
    let cpu = Cpu::with_threads(1);
    for (squares, max_norm, norm, scale) in [
        (vec![9.0f32, 16.0], 1.0, 5.0, 0.2),
        (vec![9.0, 16.0], 5.0, 5.0, 1.0),
        (vec![0.09, 0.16], 1.0, 0.5, 1.0),
        (vec![9.0, 16.0], f32::INFINITY, 5.0, 1.0),
        (vec![0.0], 1.0, 0.0, 1.0),
        (vec![], 1.0, 0.0, 1.0),
        (vec![1.0, f32::INFINITY], 1.0, f32::INFINITY, 0.0),
        // The sum needs more than f32, its root does not.
        (
            vec![3e38, 3e38],
            1.0,
            6e38f64.sqrt() as f32,
            (1.0 / 6e38f64.sqrt()) as f32,
        ),
    ] {
        let (mut n, mut s) = (cpu.zeros::<f32>(1).unwrap(), cpu.zeros::<f32>(1).unwrap());
        let sums = squares.len();
        cpu.clip_scale(
            sums,
            max_norm,
            &cpu.upload(&squares).unwrap(),
            &mut n,
            &mut s,
        )
        .unwrap();
        assert!(
            n[0] == norm || (n[0] - norm).abs() < 1e-6 * norm,
            "{squares:?}: {}",
            n[0]
        );
        assert!(
            (s[0] - scale).abs() <= 1e-6 * scale,
            "{squares:?}: {}",
            s[0]
        );
    }
}

#[test]
fn bad_arguments_are_refused() {
    let cpu = Cpu::with_threads(1);
    let one = cpu.upload(&[1.0f32]).unwrap();
    let (mut p, mut m, mut v) = (
        cpu.zeros(1).unwrap(),
        cpu.zeros(1).unwrap(),
        cpu.zeros(1).unwrap(),
    );
    for config in [
        AdamWConfig {
            step: 0,
            ..Default::default()
        },
        AdamWConfig {
            beta1: 1.0,
            ..Default::default()
        },
        AdamWConfig {
            beta2: f32::NAN,
            ..Default::default()
        },
    ] {
        let error = cpu
            .adamw(&config, 1, &one, &one, &mut p, &mut m, &mut v, None)
            .unwrap_err();
        assert!(
            matches!(error, Error::Invalid { op: "adamw", .. }),
            "{error}"
        );
    }
    let config = AdamWConfig::default();
    let error = cpu
        .adamw(&config, 2, &one, &one, &mut p, &mut m, &mut v, None)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "grad",
                len: 1,
                needed: 2,
                ..
            }
        ),
        "{error}"
    );
    let error = cpu.sum_of_squares(1, &one, &mut p, 1).unwrap_err();
    assert!(
        matches!(error, Error::TooShort { name: "out", .. }),
        "{error}"
    );
    for max_norm in [0.0, -1.0, f32::NAN] {
        let error = cpu
            .clip_scale(1, max_norm, &one, &mut p, &mut m)
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Invalid {
                    op: "clip_scale",
                    ..
                }
            ),
            "{error}"
        );
    }
}
