//! The fused head on the emulator against the f64 reference and the CPU, its bits, and its counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/logprob.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::{Cpu, Cuda, Device, Error, Float, Weight};
use half::bf16;
use reference::{Case, Results, bf16_gradients, sequential};

/// Forward and backward. What is bf16 is widened.
fn run<D: Device + Logprob>(device: &D, case: &Case) -> Results {
    let HeadShape { rows, hidden, .. } = case.shape;
    let x: Vec<D::Elem> = case.x.iter().map(|&x| D::Elem::from_f32(x)).collect();
    let head: Vec<bf16> = case.head.iter().map(|&w| bf16::from_f32(w)).collect();
    let (x, head) = (up(device, &x), up(device, &head));
    let head = Weight::Bf16(&head);
    let (targets, dlogprob) = (up(device, &case.targets), up(device, &case.dlogprob));
    let unset = || up(device, &vec![f32::NAN; rows]);
    let (mut logprob, mut lse, mut entropy) = (unset(), unset(), unset());
    let mut dx = up(device, &vec![D::Elem::from_f32(f32::NAN); rows * hidden]);
    let mut dhead = up(device, &case.dhead);
    let (shape, t) = (case.shape, case.temperature);
    device
        .logprob(
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
    device
        .logprob_backward(
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
    let dx = device.download(&dx).unwrap();
    let [logprob, lse, entropy, dhead] =
        [&logprob, &lse, &entropy, &dhead].map(|b| device.download(b).unwrap());
    let dx = dx.iter().map(|x| x.to_f32()).collect();
    Results([logprob, lse, entropy, dx, dhead])
}

const NAMES: [&str; 5] = ["logprob", "lse", "entropy", "dx", "dhead"];

/// Against f64. The three sums stay in f32: naive sums in f32 set the limit, and the truncation of
/// tensor cores, a last place every eighth product. The gradients pass through bf16: a computation
/// that rounds at the same places and nowhere else sets the limit.
fn check(cuda: &Cuda, what: &str, case: &Case) {
    let got = run(cuda, case);
    let want = reference::reference(case);
    let (naive, halves) = (sequential(case), bf16_gradients(case));
    let size = want.0[1].iter().fold(8.0, |m: f64, w| m.max(w.abs()));
    let truncation = (case.shape.hidden as f64 / 8.0 + 4.0) * 1.2e-7 * size;
    for (i, name) in NAMES.into_iter().enumerate() {
        let name = format!("{name} of {:?}, {what}", case.shape);
        let (got, want) = (wide(&got.0[i]), &want.0[i]);
        match i {
            0..3 => {
                let limit = 2.0 * error(&wide(&naive.0[i]), want) + truncation;
                let error = error(&got, want);
                assert!(error <= limit, "{name}: {error:e}, limit {limit:e}");
            }
            3 => assert_close(&name, &got, &rounded(&halves.0[i]), want, 2.0),
            _ => assert_close(&name, &got, &halves.0[i], want, 2.0),
        }
    }
}

#[test]
fn agrees_with_f64_under_every_schedule() {
    for_each_schedule(|what, cuda| {
        // One tile; then two tiles of rows, of tokens, and of the hidden width.
        for shape in [(5, 40, 100), (131, 136, 250)] {
            check(cuda, what, &Case::new(shape, 0.6, 1).in_bf16());
        }
    });
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    with_cuda(|cuda, _| {
        for shape in [(1, 8, 1), (7, 112, 7), (111, 24, 989), (3, 200, 1027)] {
            check(cuda, "serial", &Case::new(shape, 1.0, 2).in_bf16());
        }
    });
}

#[test]
fn chunks_of_the_vocabulary_and_of_rows_are_added_up() {
    with_cuda(|cuda, _| {
        check(
            cuda,
            "8192 + 9 tokens",
            &Case::new((3, 8, 8201), 1.3, 3).in_bf16(),
        );
        let mut rows = Case::new((2065, 8, 9), 1.0, 4).in_bf16();
        rows.dlogprob.fill(0.01);
        check(cuda, "2048 + 17 rows", &rows);
    });
}

#[test]
fn agrees_with_the_cpu() {
    let case = Case::new((40, 64, 300), 0.8, 5).in_bf16();
    let got = with_cuda(|cuda, _| run(cuda, &case));
    let want = run(&Cpu::with_threads(1), &case);
    let halves = bf16_gradients(&case);
    for (i, name) in NAMES.into_iter().enumerate() {
        let (got, want) = (wide(&got.0[i]), wide(&want.0[i]));
        match i {
            0..3 => assert!(error(&got, &want) < 1e-5, "{name}"),
            3 => assert_close(name, &got, &rounded(&halves.0[i]), &want, 2.0),
            _ => assert_close(name, &got, &halves.0[i], &want, 2.0),
        }
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    with_cuda(|cuda, _| {
        let case = Case::new((70, 24, 200), 1.0, 6);
        assert!(run(cuda, &case).bits() == run(cuda, &case).bits());
    });
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for_each_schedule(|what, cuda| {
        let (rows, hidden, vocab) = (130, 40, 140);
        let case = Case::new((rows, hidden, vocab), 0.8, 7);
        let all = run(cuda, &case).bits();
        for (first, count) in [(129, 1), (3, 9)] {
            let mut part = Case::new((count, hidden, vocab), 0.8, 8);
            part.head.clone_from(&case.head);
            part.x = case.x[first * hidden..][..count * hidden].to_vec();
            part.targets = case.targets[first..][..count].to_vec();
            part.dlogprob = case.dlogprob[first..][..count].to_vec();
            let part = run(cuda, &part).bits();
            for (i, width) in [1, 1, 1, hidden].into_iter().enumerate() {
                let alone = &part[i][..];
                let name = NAMES[i];
                assert!(
                    alone == &all[i][first * width..][..count * width],
                    "{name}, {what}"
                );
            }
        }
    });
}

/// The logits of the first `rows` rows.
fn logits(cuda: &Cuda, case: &Case, rows: usize) -> Vec<f32> {
    let halves = |v: &[f32]| -> Vec<bf16> { v.iter().map(|&x| bf16::from_f32(x)).collect() };
    let (x, head) = (up(cuda, &halves(&case.x)), up(cuda, &halves(&case.head)));
    let shape = HeadShape { rows, ..case.shape };
    let mut logits = up(cuda, &vec![f32::NAN; rows * shape.vocab]);
    cuda.logits(shape, &x, Weight::Bf16(&head), &mut logits)
        .unwrap();
    cuda.download(&logits).unwrap()
}

#[test]
fn logits_have_the_bits_of_the_fused_head() {
    for_each_schedule(|what, cuda| {
        // A vocabulary of one token: its logit is the log-sum-exp.
        let case = Case::new((70, 232, 1), 1.0, 9).in_bf16();
        let lse = run(cuda, &case).0[1].clone();
        for rows in [1, 16, 17, 64, 65, 70] {
            assert_eq!(logits(cuda, &case, rows), lse[..rows], "{what}");
        }
        // Every tile, rows that are and are not aligned.
        for vocab in [132, 77] {
            let case = Case::new((66, 40, vocab), 1.0, 10).in_bf16();
            let all = logits(cuda, &case, 66);
            for rows in [5, 16, 17, 64, 65] {
                let part = logits(cuda, &case, rows);
                assert!(part[..] == all[..rows * vocab], "{rows} rows, {what}");
            }
            let (x, w) = (wide(&case.x), wide(&case.head));
            let dot = |i: usize| -> f64 {
                let (r, v) = (i / vocab * 40, i % vocab * 40);
                (0..40).map(|k| x[r + k] * w[v + k]).sum()
            };
            let want: Vec<f64> = (0..66 * vocab).map(dot).collect();
            assert!(error(&wide(&all), &want) < 1e-5, "{what}");
        }
    });
}

#[test]
fn rows_without_gradient_add_nothing_even_if_not_finite() {
    with_cuda(|cuda, _| {
        let mut case = Case::new((3, 8, 140), 1.0, 11);
        case.dlogprob = vec![0.5, 0.0, -0.25];
        let clean = run(cuda, &case);
        case.x[8..16].fill(f32::NAN);
        let got = run(cuda, &case);
        assert!(got.0[0][1].is_nan() && got.0[1][1].is_nan() && got.0[2][1].is_nan());
        assert_eq!(got.0[3], clean.0[3]);
        assert_eq!(got.0[3][8..16], [0.0; 8]);
        assert_eq!(got.0[4], clean.0[4]);
        // No row at all has one.
        case.dlogprob.fill(0.0);
        let got = run(cuda, &case);
        assert_eq!(got.0[3], [0.0; 24]);
        assert_eq!(got.0[4], case.dhead);
    });
}

#[test]
fn extreme_logits_stay_finite() {
    with_cuda(|cuda, _| {
        let mut case = Case::new((2, 8, 300), 1.0, 12);
        case.x.fill(0.0);
        (case.x[0], case.x[8]) = (1.0, -1.0);
        let large = 2f32.powi(100);
        case.head.fill(-large);
        case.head[150 * 8] = large;
        case.targets = vec![150, 150];
        let got = run(cuda, &case);
        assert_eq!((got.0[0][0], got.0[2][0]), (0.0, 0.0));
        assert_eq!(got.0[0][1], -2.0 * large);
        assert!((got.0[2][1] - 299f32.ln()).abs() < 1e-5);
    });
}

#[test]
fn a_bad_target_is_reported_and_its_neighbours_are_right() {
    with_cuda(|cuda, _| {
        let case = Case::new((5, 16, 150), 1.0, 13);
        let good = run(cuda, &case).0[0].clone();
        let halves = |v: &[f32]| -> Vec<bf16> { v.iter().map(|&x| bf16::from_f32(x)).collect() };
        let (x, head) = (up(cuda, &halves(&case.x)), up(cuda, &halves(&case.head)));
        let head = Weight::Bf16(&head);
        for bad in [150, u32::MAX] {
            let mut targets = case.targets.clone();
            targets[3] = bad;
            let targets = up(cuda, &targets);
            let [mut logprob, mut lse, mut entropy] = [(); 3].map(|()| cuda.zeros(5).unwrap());
            cuda.logprob(
                case.shape,
                1.0,
                &x,
                head,
                &targets,
                &mut logprob,
                &mut lse,
                &mut entropy,
            )
            .unwrap();
            let fault = |op| Error::OutOfRange {
                op,
                name: "targets",
                at: 3,
                value: bad as usize,
                limit: 150,
            };
            assert_eq!(cuda.download(&logprob), Err(fault("logprob")));
            let got = cuda.download(&logprob).unwrap();
            assert!(got[3].is_nan());
            assert_eq!((&got[..3], got[4]), (&good[..3], good[4]));
            let dlogprob = up(cuda, &case.dlogprob);
            let mut dx = cuda.zeros(5 * 16).unwrap();
            cuda.logprob_backward(
                case.shape, 1.0, &x, head, &targets, &lse, &dlogprob, &mut dx, None,
            )
            .unwrap();
            assert_eq!(cuda.download(&dx), Err(fault("logprob_backward")));
        }
    });
}

#[test]
fn bad_arguments_are_refused() {
    with_cuda(|cuda, _| {
        let forward = |hidden, head: Weight<'_, Cuda>, t, len| {
            let shape = HeadShape {
                rows: 2,
                hidden,
                vocab: 4,
            };
            let (x, targets) = (cuda.zeros(16).unwrap(), cuda.zeros(2).unwrap());
            let [mut a, mut b, mut c] = [2, len, 2].map(|len| cuda.zeros(len).unwrap());
            cuda.logprob(shape, t, &x, head, &targets, &mut a, &mut b, &mut c)
        };
        let (half, full) = (cuda.zeros(32).unwrap(), cuda.zeros(32).unwrap());
        let (half, full) = (Weight::Bf16(&half), Weight::F32(&full));
        assert_eq!(forward(8, half, 1.0, 2), Ok(()));
        let short = forward(8, half, 1.0, 1);
        assert!(matches!(short, Err(Error::TooShort { name: "lse", .. })));
        for (hidden, head, t, word) in [
            (8, half, 0.0, "temperature"),
            (4, half, 1.0, "hidden"),
            (8, full, 1.0, "bf16"),
        ] {
            let message = forward(hidden, head, t, 2).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    });
}

#[test]
fn every_product_is_in_mma_and_memory_is_used_well() {
    with_emulator(|cuda, emulator| {
        let shape = HeadShape {
            rows: 128,
            hidden: 512,
            vocab: 256,
        };
        let HeadShape {
            rows,
            hidden,
            vocab,
        } = shape;
        let x = up(cuda, &random(1, rows * hidden));
        let head = up(cuda, &random(2, vocab * hidden));
        let head = Weight::Bf16(&head);
        let targets = up(cuda, &vec![3u32; rows]);
        let dlogprob = up(cuda, &vec![0.1f32; rows]);
        let [mut logprob, mut lse, mut entropy] = [(); 3].map(|()| cuda.zeros(rows).unwrap());
        let mut dx = cuda.zeros(rows * hidden).unwrap();
        let mut dhead = cuda.zeros(vocab * hidden).unwrap();
        let products = 2 * (rows * hidden * vocab) as u64;

        let forward = reports_of(emulator, || {
            cuda.logprob(
                shape,
                1.0,
                &x,
                head,
                &targets,
                &mut logprob,
                &mut lse,
                &mut entropy,
            )
        });
        // Two tiles of the vocabulary: the hidden states are read twice. The rest are targets, which
        // every thread reads for itself, and states.
        let costs = |least_bytes: usize| Costs {
            least_bytes: least_bytes as u64,
            bytes: 1.1,
            sectors: 0.9,
            conflicts: 0.05,
        };
        costs(2 * (2 * rows * hidden + vocab * hidden)).check("logprob", &forward);
        assert_eq!(forward[0].counters.mma_flops, products);
        // No logits: 16 bytes for 128 of them, and the results.
        let stored: u64 = forward.iter().map(|r| r.counters.global_store_bytes).sum();
        assert_eq!(stored as usize, rows * (2 * 16 + 4 * 4));

        let backward = reports_of(emulator, || {
            cuda.logprob_backward(
                shape,
                1.0,
                &x,
                head,
                &targets,
                &lse,
                &dlogprob,
                &mut dx,
                Some(&mut dhead),
            )
        });
        let products_of = |kernel: &str| -> u64 {
            let of = backward.iter().filter(|r| r.kernel == kernel);
            of.map(|r| r.counters.mma_flops).sum()
        };
        for kernel in ["logprob_gradient", "logprob_dx", "logprob_dhead"] {
            assert_eq!(products_of(kernel), products, "{kernel}");
        }
        // Products of two, four and eight tiles, dz and the sums of dx written and read, hidden
        // states copied, dhead read and written.
        let tiles = 2 * 256 * (2 * hidden + 4 * vocab + 8 * rows);
        let rest = 2 * rows * vocab + 8 * rows * hidden + 8 * vocab * hidden + 6 * rows * hidden;
        costs(tiles + rest).check("logprob_backward", &backward);

        // Decoding: bound by reading the head. Of 64 rows, each of the two columns of tiles reads
        // the hidden states.
        for (rows, reads) in [(8, 1), (64, 2)] {
            let shape = HeadShape { rows, ..shape };
            let mut logits = cuda.zeros(rows * vocab).unwrap();
            let decode = reports_of(emulator, || cuda.logits(shape, &x, head, &mut logits));
            let least = 2 * vocab * hidden + 2 * reads * rows * hidden + 4 * rows * vocab;
            Costs::memory_bound(least).check("logits of few rows", &decode);
        }
    });
}
