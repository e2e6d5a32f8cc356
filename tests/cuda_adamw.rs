//! AdamW and the norm on the emulator against f64 and the CPU, their bits, and their counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/adamw.rs"]
mod reference;

use common::cuda::{
    Costs, bits, for_each_schedule, reports_of, up, wide, with_cuda, with_emulator,
};
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::{Cpu, Cuda, Device, Error};
use half::bf16;
use reference::{check, check_copy, check_norms, check_skip, random, squares_f64, train};

/// The sum of squares, beside two elements that stay as they are.
fn squares(cuda: &Cuda, x: &[f32]) -> f32 {
    let mut out = up(cuda, &[7.0f32; 3]);
    cuda.sum_of_squares(x.len(), &up(cuda, x), &mut out, 1)
        .unwrap();
    let out = cuda.download(&out).unwrap();
    assert_eq!([out[0], out[2]], [7.0, 7.0]);
    out[1]
}

#[test]
fn agrees_with_f64_under_every_schedule() {
    let x = random(1, 40_003);
    let want = squares_f64(&x) as f32;
    for_each_schedule(|what, cuda| {
        for len in [1, 7, 111, 2050] {
            check(3, &train(cuda, len, 3));
        }
        assert_eq!(squares(cuda, &x), want, "{what}");
        check_norms(cuda);
    });
}

#[test]
fn agrees_with_the_cpu() {
    let len = 20_003;
    let got = with_cuda(|cuda, _| train(cuda, len, 5));
    let want = train(&Cpu::with_threads(1), len, 5);
    for (got, want) in [(got.0, want.0), (got.1, want.1), (got.2, want.2)] {
        for (got, want) in wide(&got).into_iter().zip(wide(&want)) {
            assert!(
                (got - want).abs() <= 1e-6 * want.abs() + 1e-9,
                "{got} {want}"
            );
        }
    }
}

#[test]
fn squares_are_summed_to_the_last_bit_of_f32() {
    with_cuda(|cuda, _| {
        assert_eq!(squares(cuda, &[]), 0.0);
        // Around a vector, a row of vectors of a block, and a block.
        for len in [1, 3, 4, 5, 1023, 1025, 16_383, 16_384, 16_385, 300_007] {
            let x = random(len as u64, len);
            assert_eq!(squares(cuda, &x), squares_f64(&x) as f32, "{len}");
        }
        assert_eq!(squares(cuda, &[1e30; 5]), f32::INFINITY);
        assert!(squares(cuda, &[1.0, f32::NAN]).is_nan());
    });
}

#[test]
fn the_copy_rounds_to_nearest_even_and_keeps_nan() {
    with_cuda(|cuda, _| check_copy(cuda));
}

#[test]
fn scale_zero_skips_the_step_whatever_the_gradient() {
    with_cuda(|cuda, _| check_skip(cuda));
}

#[test]
fn bits_depend_on_the_parameter_alone() {
    with_cuda(|cuda, _| {
        let (many, again, few) = (
            train(cuda, 3001, 3),
            train(cuda, 3001, 3),
            train(cuda, 1234, 3),
        );
        assert!(many == again);
        assert_eq!(bits(&many.0[..1234]), bits(&few.0));
        assert_eq!(bits(&many.1[..1234]), bits(&few.1));
        assert_eq!(bits(&many.2[..1234]), bits(&few.2));
        assert_eq!(bits(&many.3[..1234]), bits(&few.3));
    });
}

#[test]
fn no_parameters_are_no_work() {
    with_cuda(|cuda, _| {
        let got = train(cuda, 0, 1);
        assert_eq!((got.0.len(), got.3.len()), (0, 0));
    });
}

#[test]
fn bad_arguments_are_refused_as_on_the_cpu() {
    with_cuda(|cuda, _| {
        let one = up(cuda, &[1f32]);
        let [mut p, mut m, mut v] = [(); 3].map(|()| cuda.zeros(1).unwrap());
        let mut step = |config: AdamWConfig, len| {
            cuda.adamw(&config, len, &one, &one, &mut p, &mut m, &mut v, None)
                .unwrap_err()
        };
        let plain = AdamWConfig::default();
        let error = step(AdamWConfig { step: 0, ..plain }, 1);
        assert!(matches!(error, Error::Invalid { op: "adamw", .. }));
        let error = step(
            AdamWConfig {
                beta2: 1.0,
                ..plain
            },
            1,
        );
        assert!(matches!(error, Error::Invalid { op: "adamw", .. }));
        let error = step(plain, 2);
        assert!(matches!(error, Error::TooShort { name: "grad", .. }));
        let error = cuda.sum_of_squares(1, &one, &mut p, 1).unwrap_err();
        assert!(matches!(error, Error::TooShort { name: "out", .. }));
        let error = cuda.clip_scale(1, 0.0, &one, &mut p, &mut m).unwrap_err();
        assert!(matches!(
            error,
            Error::Invalid {
                op: "clip_scale",
                ..
            }
        ));
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let n = 64 * 1024;
        let (scale, grad) = (up(cuda, &[1f32]), up(cuda, &random(1, n)));
        let mut param = up(cuda, &random(2, n));
        let [mut m, mut v] = [(); 2].map(|()| cuda.zeros(n).unwrap());
        let mut copy = cuda.zeros::<bf16>(n).unwrap();
        let config = AdamWConfig::default();
        let reports = reports_of(emulator, || {
            let copy = Some(&mut copy);
            cuda.adamw(&config, n, &scale, &grad, &mut param, &mut m, &mut v, copy)
        });
        Costs::memory_bound((4 * 4 + 3 * 4 + 2) * n).check("adamw", &reports);
        let mut out = cuda.zeros(1).unwrap();
        let reports = reports_of(emulator, || cuda.sum_of_squares(n, &grad, &mut out, 0));
        Costs::memory_bound(4 * n).check("sum_of_squares", &reports);
    });
}
