//! Sampling on the emulator against f64 and the CPU's draws, its bits, and its counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
    pub mod workloads;
}
#[path = "reference/sampling.rs"]
mod reference;

use common::cuda::{Costs, for_each_schedule, reports_of, up, with_cuda, with_emulator};
use common::workloads::zipf;
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::sampling::{RowSampling, Sampling};
use dust_kernels::{Cpu, Cuda, Device, Error, Weight};
use half::bf16;
use reference::*;

/// Draws from one row of logits under each of `params`; against the CPU's draws and, unless a
/// filter's decision hangs on the last digits, against f64.
fn check(cuda: &Cuda, what: &str, logits: &[f32], params: &[RowSampling]) {
    let vocab = logits.len();
    let rows = logits.repeat(params.len());
    let (tokens, logprob, kept) = sample(cuda, vocab, &rows, params);
    let (expected, ..) = sample(&Cpu::with_threads(1), vocab, &rows, params);
    for (row, filter) in params.iter().enumerate() {
        let want = reference(logits, filter);
        if want.close {
            continue;
        }
        let token = tokens[row] as usize;
        assert!(
            token < vocab && want.filtered[token] > 0.0,
            "{what}, {vocab} {filter:?}: drew {token}"
        );
        assert_eq!(tokens[row], expected[row], "{what}, {vocab} {filter:?}");
        let share = f64::from(kept[row]);
        assert!(
            (share - want.kept).abs() < 1e-6,
            "{what}, {vocab} {filter:?}: kept {share}, not {}",
            want.kept
        );
        let z = f64::from(logits[token] * (1.0 / filter.temperature));
        let error = (f64::from(logprob[row]) - (z - want.lse)).abs();
        assert!(error < 1e-5, "{what}, {vocab} {filter:?}: {error:e}");
    }
}

/// Every filter, each with numbers of its own.
fn numbered(filters: impl IntoIterator<Item = RowSampling>) -> Vec<RowSampling> {
    let filters = filters.into_iter().zip(0..);
    let number = |(filter, i): (RowSampling, u32)| RowSampling {
        seed: 5 + (u64::from(i) << 40),
        sequence: i,
        position: 1000 - i,
        ..filter
    };
    filters.map(number).collect()
}

#[test]
fn agrees_with_f64_and_the_cpu_under_every_schedule() {
    let some = numbered(filters().into_iter().step_by(11));
    for_each_schedule(|what, cuda| {
        // With ties and with masked tokens.
        for logits in shapes(300).drain(2..) {
            check(cuda, what, &logits, &some);
        }
    });
}

#[test]
fn every_filter_agrees_with_f64_and_the_cpu() {
    let all = numbered(filters());
    with_cuda(|cuda, _| {
        // Rows that are and are not aligned, one unit and several.
        for logits in shapes(111) {
            check(cuda, "serial", &logits, &all);
        }
        // Several steps of a warp, and hardly anything.
        let some: Vec<_> = all.iter().copied().step_by(13).collect();
        for vocab in [1, 7, 2500] {
            for logits in shapes(vocab) {
                check(cuda, "serial", &logits, &some);
            }
        }
    });
}

#[test]
fn plain_draws_are_the_cpus() {
    with_cuda(|cuda, _| {
        for (vocab, rows) in [(11, 80), (1100, 30), (40_000, 1)] {
            for (i, logits) in shapes(vocab).into_iter().enumerate() {
                let plain = RowSampling {
                    seed: i as u64,
                    ..Default::default()
                };
                let params: Vec<_> = (0..rows)
                    .map(|position| RowSampling { position, ..plain })
                    .collect();
                check(cuda, "plain", &logits, &params);
            }
        }
    });
}

#[test]
fn a_draw_depends_on_its_row_alone() {
    let (logits, params) = mixed_batch(200);
    let some = (0..params.len()).step_by(9);
    let logits: Vec<f32> = some
        .clone()
        .flat_map(|row| logits[row * 200..][..200].to_vec())
        .collect();
    let params: Vec<RowSampling> = some.map(|row| params[row]).collect();
    for_each_schedule(|what, cuda| {
        let all = bits(&sample(cuda, 200, &logits, &params));
        assert_eq!(bits(&sample(cuda, 200, &logits, &params)), all, "{what}");
        for row in [0, 8, params.len() - 1] {
            let alone = sample(cuda, 200, &logits[row * 200..][..200], &params[row..=row]);
            assert_eq!(bits(&alone)[0], all[row], "{what}");
        }
    });
}

#[test]
fn the_logprob_of_a_rollout_has_the_bits_of_training() {
    for_each_schedule(|what, cuda| {
        for vocab in [111, 400] {
            let (rows, hidden) = (7, 72);
            let shape = HeadShape {
                rows,
                hidden,
                vocab,
            };
            let halves = |seed, len| -> Vec<bf16> {
                let values = random(seed, len, 1.0);
                values.into_iter().map(bf16::from_f32).collect()
            };
            let x = up(cuda, &halves(7, rows * hidden));
            let head = up(cuda, &halves(8, vocab * hidden));
            let head = Weight::Bf16(&head);
            let mut logits = cuda.zeros(rows * vocab).unwrap();
            cuda.logits(shape, &x, head, &mut logits).unwrap();
            let logits = cuda.download(&logits).unwrap();
            for (temperature, training) in [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)] {
                let params: Vec<RowSampling> = (0..rows as u32)
                    .map(|sequence| RowSampling {
                        sequence,
                        temperature,
                        top_p: if sequence % 2 == 0 { 0.9 } else { 1.0 },
                        ..Default::default()
                    })
                    .collect();
                let (tokens, got, _) = sample(cuda, vocab, &logits, &params);
                let tokens = up(cuda, &tokens);
                let [mut want, mut lse, mut entropy] =
                    [(); 3].map(|()| cuda.zeros::<f32>(rows).unwrap());
                cuda.logprob(
                    shape,
                    training,
                    &x,
                    head,
                    &tokens,
                    &mut want,
                    &mut lse,
                    &mut entropy,
                )
                .unwrap();
                let to_bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let want = cuda.download(&want).unwrap();
                assert_eq!(
                    to_bits(&got),
                    to_bits(&want),
                    "{what}, {vocab} {temperature}"
                );
            }
        }
    });
}

#[test]
fn ties_keep_the_lowest_token() {
    with_cuda(|cuda, _| {
        let vocab = 1500;
        let plain = RowSampling::default();
        let greedy = RowSampling {
            temperature: 0.0,
            ..plain
        };
        let top_k = |top_k| RowSampling { top_k, ..plain };
        let some = |filter: RowSampling, logits: &[f32]| {
            let params: Vec<_> = (0..8)
                .map(|position| RowSampling { position, ..filter })
                .collect();
            let (tokens, _, kept) = sample(cuda, vocab, &logits.repeat(8), &params);
            let cpu = sample(&Cpu::with_threads(1), vocab, &logits.repeat(8), &params);
            assert_eq!(tokens, cpu.0);
            (tokens.iter().copied().max().unwrap(), kept[0])
        };
        let equal = vec![2.5; vocab];
        assert_eq!(some(top_k(1), &equal), (0, 1.0 / 1500.0));
        let (highest, kept) = some(top_k(3), &equal);
        assert!(highest <= 2 && (kept - 3.0 / 1500.0).abs() < 1e-9);
        assert_eq!(some(greedy, &equal), (0, 1.0));
        let tenth = RowSampling {
            top_p: 0.0999,
            ..plain
        };
        let (highest, kept) = some(tenth, &equal);
        assert!(highest < 150 && (kept - 0.1).abs() < 1e-6);
        // Zero has two signs and one value.
        let mut zeros = vec![-5.0; vocab];
        (zeros[700], zeros[800], zeros[900]) = (-0.0, 0.0, -0.0);
        assert_eq!(some(top_k(1), &zeros).0, 700);
        assert_eq!(some(greedy, &zeros).0, 700);
        assert!([700, 800].contains(&some(top_k(2), &zeros).0));
    });
}

#[test]
fn bad_rows_are_reported_and_their_neighbours_are_not_changed() {
    for vocab in [300, 301] {
        let good = random(9, vocab, 3.0);
        let plain = RowSampling::default();
        let (mut logits, mut params) = (good.clone(), vec![plain]);
        for (row, setting) in bad_rows(&good) {
            logits.extend(row.iter().chain(&good));
            params.extend([setting, plain]);
        }
        with_cuda(|cuda, _| {
            let alone = bits(&sample(cuda, vocab, &good, &[plain]));
            let got = sample(cuda, vocab, &logits, &params);
            for (i, row) in bits(&got).iter().enumerate() {
                if i % 2 == 0 {
                    assert_eq!(*row, alone[0], "row {i}");
                } else {
                    assert_eq!(row[0], u32::MAX, "row {i}");
                    assert!(got.1[i].is_nan() && got.2[i] == 0.0, "row {i}");
                }
            }
        });
    }
}

#[test]
fn extreme_logits_are_sampled() {
    with_cuda(|cuda, _| {
        let plain = RowSampling::default();
        let top_p = RowSampling {
            top_p: 0.9,
            ..plain
        };
        // More tokens asked for than are finite.
        let top_k = RowSampling { top_k: 2, ..plain };
        for filter in [plain, top_p, top_k] {
            let (tokens, logprob, kept) = sample(cuda, 3, &[-3e38, 3e38, 0.0], &[filter]);
            assert_eq!((tokens[0], logprob[0], kept[0]), (1, 0.0, 1.0));
            let masked = [f32::NEG_INFINITY, f32::MIN, f32::NEG_INFINITY];
            let (tokens, logprob, _) = sample(cuda, 3, &masked, &[filter]);
            assert_eq!((tokens[0], logprob[0]), (1, 0.0));
        }
    });
}

#[test]
fn short_buffers_and_endless_vocabularies_are_refused() {
    with_cuda(|cuda, _| {
        let logits = cuda.zeros(6).unwrap();
        let params = up(cuda, &[RowSampling::default(); 2]);
        let mut tokens = cuda.zeros::<u32>(3).unwrap();
        let (mut a, mut b) = (cuda.zeros(3).unwrap(), cuda.zeros(1).unwrap());
        let mut run =
            |rows, vocab| cuda.sample(rows, vocab, &logits, &params, &mut tokens, &mut a, &mut b);
        for (rows, vocab, culprit) in [(2, 4, "logits"), (3, 2, "params"), (2, 3, "kept")] {
            let error = run(rows, vocab).unwrap_err();
            assert!(
                matches!(error, Error::TooShort { name, .. } if name == culprit),
                "{error}"
            );
        }
        assert!(matches!(run(0, 1 << 22), Err(Error::Invalid { .. })));
        assert_eq!(run(0, 3), Ok(()));
        // A row without tokens has no finite logit.
        assert_eq!(run(1, 0), Ok(()));
        assert_eq!(cuda.download(&tokens).unwrap()[0], u32::MAX);
    });
}

#[test]
fn more_tokens_than_a_list_holds_are_narrowed_down() {
    with_cuda(|cuda, _| {
        let vocab = 7001;
        let filter = |top_k, top_p| RowSampling {
            top_k,
            top_p,
            ..Default::default()
        };
        let some = numbered([
            filter(0, 0.9),
            filter(0, 0.3),
            filter(3000, 1.0),
            filter(5000, 0.7),
            // The tail beyond top-p is too small for what the units' states tell.
            filter(0, 0.999_999),
        ]);
        for logits in shapes(vocab) {
            check(cuda, "narrowed", &logits, &some);
        }
        // Equal tokens are told apart by their numbers alone.
        let equal = vec![0.25; vocab];
        let (tokens, _, kept) = sample(cuda, vocab, &equal.repeat(40), &[filter(2500, 1.0); 40]);
        assert!(tokens.iter().all(|&t| t < 2500));
        assert!((kept[0] - 2500.0 / 7001.0).abs() < 1e-6);
    });
}

#[test]
fn sampling_reads_the_logits_once() {
    with_emulator(|cuda, emulator| {
        let (rows, vocab) = (2, 151_936);
        let logits = up(cuda, &zipf(rows, vocab));
        let plain = RowSampling::default();
        let top_p = RowSampling {
            top_p: 0.95,
            ..plain
        };
        // With top-p, a fifth of the units hold a kept token here; these are read twice more.
        for (filter, bytes) in [
            (plain, 1.1),
            (RowSampling { top_k: 20, ..top_p }, 1.1),
            (top_p, 1.5),
        ] {
            let params = up(cuda, &numbered([filter; 2]));
            let mut tokens = cuda.zeros(rows).unwrap();
            let [mut logprob, mut kept] = [(); 2].map(|()| cuda.zeros(rows).unwrap());
            let reports = reports_of(emulator, || {
                cuda.sample(
                    rows,
                    vocab,
                    &logits,
                    &params,
                    &mut tokens,
                    &mut logprob,
                    &mut kept,
                )
            });
            let costs = Costs {
                bytes,
                ..Costs::memory_bound(rows * (4 * vocab + 32 + 12))
            };
            costs.check(&format!("{filter:?}"), &reports);
        }
    });
}
