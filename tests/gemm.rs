//! Linear layers against an f64 reference, and the promises about their bits.

use dust_kernels::cpu::Level;
use dust_kernels::gemm::{Gemm, LinearShape};
use dust_kernels::{Cpu, Device, Error, Weight};
use half::bf16;
use proptest::prelude::*;
use reference::{Case, Results, reference, sequential, worst};

#[path = "reference/gemm.rs"]
mod reference;

/// Rows, inputs, outputs: awkward ones, more than one chunk, block and task of each dimension.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (7, 1, 7),
    (1, 7, 111),
    (7, 111, 7),
    (111, 7, 989),
    (3, 989, 111),
    (9, 2053, 50),
    (111, 989, 7),
    (300, 111, 111),
    (989, 33, 111),
    (16, 576, 960),
    (2, 4100, 13),
];

fn halves(case: &Case) -> Vec<bf16> {
    case.w.iter().map(|&w| bf16::from_f32(w)).collect()
}

fn run(case: &Case, cpu: &Cpu, half: bool) -> Results {
    let LinearShape {
        rows,
        inputs,
        outputs,
    } = case.shape;
    let x = cpu.upload(&case.x).unwrap();
    let (w32, w16) = (
        cpu.upload(&case.w).unwrap(),
        cpu.upload(&halves(case)).unwrap(),
    );
    let w = if half {
        Weight::Bf16(&w16)
    } else {
        Weight::F32(&w32)
    };
    let bias = cpu.upload(&case.bias).unwrap();
    let dy = cpu.upload(&case.dy).unwrap();
    let mut y = cpu.upload(&vec![f32::NAN; rows * outputs]).unwrap();
    let mut dx = cpu.upload(&vec![f32::NAN; rows * inputs]).unwrap();
    let mut dw = cpu.upload(&case.dw).unwrap();
    let mut dbias = cpu.upload(&case.bias).unwrap();
    cpu.linear(case.shape, &x, w, Some(&bias), &mut y).unwrap();
    cpu.linear_dx(case.shape, &dy, w, &mut dx).unwrap();
    cpu.linear_dw(case.shape, &x, &dy, &mut dw).unwrap();
    cpu.linear_dbias(case.shape, &dy, &mut dbias).unwrap();
    Results([&y, &dx, &dw, &dbias].map(|b| cpu.download(b).unwrap()))
}
fn levels(cpu: &Cpu) -> Vec<Cpu> {
    [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon]
        .into_iter()
        .filter_map(|level| cpu.with_level(level).ok())
        .collect()
}

#[test]
fn close_to_the_f64_reference_on_every_level() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(shape, seed as u64);
        let want = reference(&case);
        let baseline = sequential(&case);
        for cpu in levels(&Cpu::with_threads(2)) {
            let got = run(&case, &cpu, false);
            for (i, factor) in [2.0, 3.0, 3.0, 3.0].into_iter().enumerate() {
                let error = worst(&got.0[i], &want.0[i]);
                let allowed = factor * worst(&baseline.0[i], &want.0[i]) + 2e-7;
                assert!(
                    error <= allowed,
                    "{} {shape:?} result {i}: {error} > {allowed}",
                    cpu.level()
                );
            }
        }
    }
}

#[test]
fn gradients_of_the_reference_agree_with_finite_differences() {
    // The products are linear in each argument, so a central difference is exact but for rounding.
    let mut case = Case::new((5, 7, 6), 40);
    let gradients = reference(&case);
    let loss = |case: &Case| -> f64 {
        let y = &reference(case).0[0];
        y.iter().zip(&case.dy).map(|(y, g)| y * f64::from(*g)).sum()
    };
    let fields: [fn(&mut Case) -> &mut Vec<f32>; 3] = [|c| &mut c.x, |c| &mut c.w, |c| &mut c.bias];
    for (which, field) in fields.into_iter().enumerate() {
        for i in 0..field(&mut case).len() {
            let value = field(&mut case)[i];
            field(&mut case)[i] = value + 0.25;
            let (above, up) = (loss(&case), f64::from(field(&mut case)[i]));
            field(&mut case)[i] = value - 0.25;
            let (below, down) = (loss(&case), f64::from(field(&mut case)[i]));
            field(&mut case)[i] = value;
            let slope = (above - below) / (up - down);
            // dw and dbias were added to what was there.
            let accumulated = match which {
                0 => 0.0,
                1 => f64::from(case.dw[i]),
                _ => f64::from(case.bias[i]),
            };
            let want = gradients.0[which + 1][i] - accumulated;
            assert!((slope - want).abs() < 1e-9, "{which}[{i}]: {slope} {want}");
        }
    }
}

#[test]
fn bf16_weights_give_the_bits_of_f32_weights() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(shape, seed as u64);
        for cpu in levels(&Cpu::with_threads(2)) {
            assert!(run(&case, &cpu, true).bits() == run(&case, &cpu, false).bits());
        }
    }
}

#[test]
fn runs_and_thread_counts_give_the_same_bits() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(shape, seed as u64);
        let want = run(&case, &Cpu::with_threads(1), true).bits();
        for threads in [1, 2, 5] {
            let got = run(&case, &Cpu::with_threads(threads), true).bits();
            assert!(got == want, "{threads} threads, {shape:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for half in [false, true] {
        for cpu in levels(&Cpu::with_threads(2)) {
            // Sizes around every tile's height and the switch to widened panels.
            let rows = 25;
            let case = Case::new((rows, 1111, 101), 60);
            let all = run(&case, &cpu, half);
            for (first, count) in [(0, 1), (24, 1), (3, 2), (5, 3), (8, 8), (2, 9), (6, 15)] {
                let mut part = Case::new((count, 1111, 101), 60);
                part.w.clone_from(&case.w);
                part.bias.clone_from(&case.bias);
                part.x = case.x[first * 1111..][..count * 1111].to_vec();
                part.dy = case.dy[first * 101..][..count * 101].to_vec();
                let part = run(&part, &cpu, half).bits();
                let all = all.bits();
                assert!(part[0][..] == all[0][first * 101..][..count * 101]);
                assert!(part[1][..] == all[1][first * 1111..][..count * 1111]);
            }
        }
    }
}

#[test]
fn longer_buffers_keep_what_lies_behind_the_shape() {
    let cpu = Cpu::with_threads(2);
    let case = Case::new((5, 9, 11), 70);
    let (x, w) = (cpu.upload(&case.x).unwrap(), cpu.upload(&case.w).unwrap());
    let dy = cpu.upload(&case.dy).unwrap();
    for len in [5 * 11 + 3, 100] {
        let mut y = cpu.upload(&vec![7.0; len]).unwrap();
        cpu.linear(case.shape, &x, Weight::F32(&w), None, &mut y)
            .unwrap();
        assert!(y[5 * 11..].iter().all(|&v| v == 7.0));
        let mut dx = cpu.upload(&vec![7.0; len]).unwrap();
        cpu.linear_dx(case.shape, &dy, Weight::F32(&w), &mut dx)
            .unwrap();
        assert!(dx[5 * 9..].iter().all(|&v| v == 7.0));
        let mut dw = cpu.upload(&vec![7.0; 11 * 9 + len]).unwrap();
        cpu.linear_dw(case.shape, &x, &dy, &mut dw).unwrap();
        assert!(dw[11 * 9..].iter().all(|&v| v == 7.0));
    }
}

#[test]
fn empty_dimensions_are_sums_of_nothing() {
    let cpu = Cpu::with_threads(2);
    let empty = cpu.zeros::<f32>(0).unwrap();
    let shape = |rows, inputs, outputs| LinearShape {
        rows,
        inputs,
        outputs,
    };
    let bias = cpu.upload(&[1.0f32, 2.0]).unwrap();
    let mut y = cpu.upload(&[9.0f32; 4]).unwrap();
    let none = Weight::F32(&empty);
    cpu.linear(shape(2, 0, 2), &empty, none, Some(&bias), &mut y)
        .unwrap();
    assert_eq!(y[..], [1.0, 2.0, 1.0, 2.0]);
    cpu.linear_dx(shape(2, 2, 0), &empty, none, &mut y).unwrap();
    assert_eq!(y[..], [0.0; 4]);
    let mut dw = cpu.upload(&[3.0f32; 4]).unwrap();
    cpu.linear_dw(shape(0, 2, 2), &empty, &empty, &mut dw)
        .unwrap();
    assert_eq!(dw[..], [3.0; 4]);
}

#[test]
fn short_buffers_are_refused_by_name() {
    let cpu = Cpu::with_threads(1);
    let shape = LinearShape {
        rows: 3,
        inputs: 4,
        outputs: 5,
    };
    let buf = |len| cpu.zeros::<f32>(len).unwrap();
    let named = |result: dust_kernels::Result<()>, want: &str| match result {
        Err(Error::TooShort { name, .. }) => assert_eq!(name, want),
        other => panic!("{want}: {other:?}"),
    };
    let (x, w, bias) = (buf(12), buf(20), buf(5));
    let weight = Weight::F32(&w);
    named(cpu.linear(shape, &buf(11), weight, None, &mut buf(15)), "x");
    named(
        cpu.linear(shape, &x, Weight::F32(&buf(19)), None, &mut buf(15)),
        "w",
    );
    named(
        cpu.linear(shape, &x, weight, Some(&buf(4)), &mut buf(15)),
        "bias",
    );
    named(
        cpu.linear(shape, &x, weight, Some(&bias), &mut buf(14)),
        "y",
    );
    named(cpu.linear_dx(shape, &buf(14), weight, &mut buf(12)), "dy");
    named(cpu.linear_dx(shape, &buf(15), weight, &mut buf(11)), "dx");
    named(cpu.linear_dw(shape, &x, &buf(15), &mut buf(19)), "dw");
    named(cpu.linear_dbias(shape, &buf(15), &mut buf(4)), "dbias");
    let huge = LinearShape {
        rows: usize::MAX,
        inputs: 2,
        outputs: 1,
    };
    assert!(matches!(
        cpu.linear(huge, &x, weight, None, &mut buf(1)),
        Err(Error::Invalid { .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_small_shape_is_right(rows in 1usize..40, inputs in 1usize..60, outputs in 1usize..70, seed: u64) {
        let case = Case::new((rows, inputs, outputs), seed);
        let want = reference(&case);
        for cpu in levels(&Cpu::with_threads(2)) {
            let got = run(&case, &cpu, true);
            for i in 0..4 {
                prop_assert!(worst(&got.0[i], &want.0[i]) < 1e-4);
            }
        }
    }
}
