//! The fused head against an f64 reference, and the promises about its bits.

use dust_kernels::cpu::{CpuBuf, Level};
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::{Cpu, Device, Error, Weight};
use half::bf16;
use reference::{Case, Results, reference, sequential, worst};

#[path = "reference/logprob.rs"]
mod reference;

/// Rows, hidden, vocabulary.
const SHAPES: [(usize, usize, usize); 7] = [
    (1, 1, 1),
    (7, 111, 7),
    (5, 7, 1000),
    (111, 33, 989),
    (3, 989, 4099),
    (150, 16, 1111),
    (600, 5, 1111),
];

fn run(case: &Case, cpu: &Cpu, half: bool) -> Results {
    let HeadShape { rows, hidden, .. } = case.shape;
    let x = cpu.upload(&case.x).unwrap();
    let halves: Vec<bf16> = case.head.iter().map(|&w| bf16::from_f32(w)).collect();
    let (w32, w16) = (
        cpu.upload(&case.head).unwrap(),
        cpu.upload(&halves).unwrap(),
    );
    let head = if half {
        Weight::Bf16(&w16)
    } else {
        Weight::F32(&w32)
    };
    let targets = cpu.upload(&case.targets).unwrap();
    let dlogprob = cpu.upload(&case.dlogprob).unwrap();
    let unset = |len: usize| cpu.upload(&vec![f32::NAN; len]).unwrap();
    let (mut logprob, mut lse, mut entropy) = (unset(rows), unset(rows), unset(rows));
    let mut dx = unset(rows * hidden);
    let mut dhead = cpu.upload(&case.dhead).unwrap();
    let (shape, t) = (case.shape, case.temperature);
    cpu.logprob(
        shape,
        t,
        &x,
        head,
        &targets,
        &mut logprob,
        &mut lse,
        &mut entropy,
    )
    .unwrap();
    cpu.logprob_backward(
        shape,
        t,
        &x,
        head,
        &targets,
        &lse,
        &dlogprob,
        &mut dx,
        Some(&mut dhead),
    )
    .unwrap();
    Results([&logprob, &lse, &entropy, &dx, &dhead].map(|b| cpu.download(b).unwrap()))
}
fn levels(cpu: &Cpu) -> Vec<Cpu> {
    [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon]
        .into_iter()
        .filter_map(|level| cpu.with_level(level).ok())
        .collect()
}

fn close(case: &Case) {
    let want = reference(case);
    let baseline = sequential(case);
    for cpu in levels(&Cpu::with_threads(2)) {
        let got = run(case, &cpu, false);
        for (i, factor) in [2.0, 2.0, 2.0, 3.0, 3.0].into_iter().enumerate() {
            let error = worst(&got.0[i], &want.0[i]);
            // The floor is an ulp at the results' size.
            let size = want.0[i].iter().fold(1.0f64, |m, v| m.max(v.abs()));
            let allowed = factor * worst(&baseline.0[i], &want.0[i]) + 1.2e-7 * size;
            assert!(
                error <= allowed,
                "{} {:?} temperature {} result {i}: {error} > {allowed}",
                cpu.level(),
                case.shape,
                case.temperature
            );
        }
    }
}

#[test]
fn close_to_the_f64_reference_on_every_level() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for temperature in [1.0, 0.6, 1.7] {
            close(&Case::new(shape, temperature, seed as u64));
        }
    }
}

#[test]
fn a_large_vocabulary() {
    close(&Case::new((2, 24, 151_936), 1.0, 90));
}

#[test]
fn gradients_of_the_reference_agree_with_finite_differences() {
    let mut case = Case::new((4, 5, 9), 0.7, 40);
    let gradients = reference(&case);
    let loss = |case: &Case| -> f64 {
        let logprob = &reference(case).0[0];
        logprob
            .iter()
            .zip(&case.dlogprob)
            .map(|(l, d)| l * f64::from(*d))
            .sum()
    };
    let fields: [fn(&mut Case) -> &mut Vec<f32>; 2] = [|c| &mut c.x, |c| &mut c.head];
    for (which, field) in fields.into_iter().enumerate() {
        for i in 0..field(&mut case).len() {
            let value = field(&mut case)[i];
            field(&mut case)[i] = value + 1e-3;
            let (above, up) = (loss(&case), f64::from(field(&mut case)[i]));
            field(&mut case)[i] = value - 1e-3;
            let (below, down) = (loss(&case), f64::from(field(&mut case)[i]));
            field(&mut case)[i] = value;
            let slope = (above - below) / (up - down);
            let before = if which == 0 {
                0.0
            } else {
                f64::from(case.dhead[i])
            };
            let want = gradients.0[3 + which][i] - before;
            assert!((slope - want).abs() < 2e-5, "{which}[{i}]: {slope} {want}");
        }
    }
}

#[test]
fn bf16_heads_give_the_bits_of_f32_heads() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(shape, 0.9, seed as u64);
        for cpu in levels(&Cpu::with_threads(2)) {
            assert!(run(&case, &cpu, true).bits() == run(&case, &cpu, false).bits());
        }
    }
}

#[test]
fn runs_and_thread_counts_give_the_same_bits() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let case = Case::new(shape, 0.9, seed as u64);
        let want = run(&case, &Cpu::with_threads(1), true).bits();
        for threads in [1, 2, 5] {
            let got = run(&case, &Cpu::with_threads(threads), true).bits();
            assert!(got == want, "{threads} threads, {shape:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (hidden, vocab) = (111, 1500);
    let case = Case::new((140, hidden, vocab), 0.8, 50);
    for cpu in levels(&Cpu::with_threads(2)) {
        let all = run(&case, &cpu, true).bits();
        for (first, count) in [(0, 1), (139, 1), (5, 3), (120, 9)] {
            let mut part = Case::new((count, hidden, vocab), 0.8, 51);
            part.head.clone_from(&case.head);
            part.x = case.x[first * hidden..][..count * hidden].to_vec();
            part.targets = case.targets[first..][..count].to_vec();
            part.dlogprob = case.dlogprob[first..][..count].to_vec();
            let part = run(&part, &cpu, true).bits();
            for i in 0..3 {
                assert!(part[i][..] == all[i][first..][..count], "{i}");
            }
            assert!(part[3][..] == all[3][first * hidden..][..count * hidden]);
        }
    }
}

#[test]
fn the_logits_are_those_of_the_fused_head() {
    // log-probability + log-sum-exp is the target's logit, up to the rounding of their difference;
    // where the log-sum-exp is the only token's logit, both are exact.
    let cpu = Cpu::with_threads(2);
    let (rows, hidden) = (20, 1111);
    let case = Case::new((rows, hidden, 1), 1.0, 60);
    let (x, head) = (
        cpu.upload(&case.x).unwrap(),
        cpu.upload(&case.head).unwrap(),
    );
    for count in [1, 3, rows] {
        let shape = HeadShape {
            rows: count,
            ..case.shape
        };
        let mut logits = cpu.zeros(count).unwrap();
        cpu.logits(shape, &x, Weight::F32(&head), &mut logits)
            .unwrap();
        let results = run(&case, &cpu, true);
        assert_eq!(logits[..], results.0[1][..count]);
        assert!(results.0[0].iter().all(|&l| l == 0.0));
        assert!(results.0[2].iter().all(|&e| e == 0.0));
    }
}

#[test]
fn rows_without_gradient_add_nothing_even_if_not_finite() {
    let mut case = Case::new((3, 8, 700), 1.0, 70);
    case.dlogprob = vec![0.5, 0.0, -0.25];
    let clean = run(&case, &Cpu::with_threads(2), false);
    case.x[8..16].fill(f32::NAN);
    let got = run(&case, &Cpu::with_threads(2), false);
    assert!(got.0[0][1].is_nan() && got.0[1][1].is_nan() && got.0[2][1].is_nan());
    assert_eq!(got.0[3], clean.0[3]);
    assert_eq!(got.0[3][8..16], [0.0; 8]);
    assert_eq!(got.0[4], clean.0[4]);
}

#[test]
fn extreme_logits_stay_finite() {
    let mut case = Case::new((2, 1, 1300), 1.0, 80);
    case.x = vec![1.0, -1.0];
    case.head.fill(-1e30);
    case.head[600] = 1e30;
    case.targets = vec![600, 600];
    let got = run(&case, &Cpu::with_threads(2), false);
    assert_eq!(got.0[0][0], 0.0);
    assert_eq!(got.0[2][0], 0.0);
    assert_eq!(got.0[0][1], -2e30);
    assert!((got.0[2][1] - 1299f32.ln()).abs() < 1e-5);
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let cpu = Cpu::with_threads(1);
    let shape = HeadShape {
        rows: 2,
        hidden: 3,
        vocab: 4,
    };
    let buf = |len| cpu.zeros::<f32>(len).unwrap();
    let (x, head) = (buf(6), buf(12));
    let (good, short) = (cpu.upload(&[0, 3]).unwrap(), cpu.upload(&[0]).unwrap());
    let forward =
        |x: &CpuBuf<f32>, head: &CpuBuf<f32>, targets: &CpuBuf<u32>, t, lens: [usize; 3]| {
            let [mut a, mut b, mut c] = lens.map(buf);
            cpu.logprob(
                shape,
                t,
                x,
                Weight::F32(head),
                targets,
                &mut a,
                &mut b,
                &mut c,
            )
        };
    let named = |result: dust_kernels::Result<()>, want: &str| match result {
        Err(Error::TooShort { name, .. }) => assert_eq!(name, want),
        other => panic!("{want}: {other:?}"),
    };
    forward(&x, &head, &good, 1.0, [2; 3]).unwrap();
    named(forward(&buf(5), &head, &good, 1.0, [2; 3]), "x");
    named(forward(&x, &buf(11), &good, 1.0, [2; 3]), "head");
    named(forward(&x, &head, &short, 1.0, [2; 3]), "targets");
    named(forward(&x, &head, &good, 1.0, [1, 2, 2]), "logprob");
    named(forward(&x, &head, &good, 1.0, [2, 1, 2]), "lse");
    named(forward(&x, &head, &good, 1.0, [2, 2, 1]), "entropy");
    let outside = cpu.upload(&[3, 4]).unwrap();
    assert_eq!(
        forward(&x, &head, &outside, 1.0, [2; 3]),
        Err(Error::OutOfRange {
            op: "logprob",
            name: "targets",
            at: 1,
            value: 4,
            limit: 4
        })
    );
    for t in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40] {
        let result = forward(&x, &head, &good, t, [2; 3]);
        assert!(matches!(result, Err(Error::Invalid { .. })), "{t}");
    }
    let backward = |t, lens: [usize; 4]| {
        let [lse, dlogprob, mut dx, mut dhead] = lens.map(buf);
        cpu.logprob_backward(
            shape,
            t,
            &x,
            Weight::F32(&head),
            &good,
            &lse,
            &dlogprob,
            &mut dx,
            Some(&mut dhead),
        )
    };
    backward(1.0, [2, 2, 6, 12]).unwrap();
    named(backward(1.0, [1, 2, 6, 12]), "lse");
    named(backward(1.0, [2, 1, 6, 12]), "dlogprob");
    named(backward(1.0, [2, 2, 5, 12]), "dx");
    named(backward(1.0, [2, 2, 6, 11]), "dhead");
    assert!(matches!(
        backward(f32::NAN, [2, 2, 6, 12]),
        Err(Error::Invalid { .. })
    ));
    named(
        cpu.logits(shape, &x, Weight::F32(&head), &mut buf(7)),
        "logits",
    );
}
