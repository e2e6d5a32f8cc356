//! AdamW over 50 steps of f64, the norm, and what a bad gradient may not do.

#[path = "reference/adamw.rs"]
mod reference;

use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::{Cpu, Device, Error};
use reference::{check, check_copy, check_norms, check_skip, random, squares_f64, train};

#[test]
fn fifty_steps_match_f64() {
    for len in [1, 7, 111, 989, 40_000] {
        check(50, &train(&Cpu::with_threads(2), len, 50));
    }
}

#[test]
fn steps_have_the_same_bits_on_any_number_of_threads() {
    let want = train(&Cpu::with_threads(1), 100_001, 3);
    for threads in [1, 2, 5] {
        assert!(train(&Cpu::with_threads(threads), 100_001, 3) == want);
    }
}

#[test]
fn the_copy_rounds_to_nearest_even_and_keeps_nan() {
    check_copy(&Cpu::with_threads(1));
}

#[test]
fn scale_zero_skips_the_step_whatever_the_gradient() {
    check_skip(&Cpu::with_threads(1));
}

#[test]
fn ten_million_squares_are_summed_to_the_last_bit_of_f32() {
    let len = 10_000_003;
    let x = random(9, len);
    let want = squares_f64(&x);
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
    check_norms(&Cpu::with_threads(1));
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
