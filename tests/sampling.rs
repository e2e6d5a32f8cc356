//! Sampling, tested as a sampler: every filter against f64, membership of every draw, chi-square over
//! a million draws, replay, and the bits of the training log-probability.

use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::sampling::{RowSampling, Sampling};
use dust_kernels::{Cpu, Device, Error, Weight};
use reference::*;
use std::collections::HashMap;

#[path = "reference/sampling.rs"]
mod reference;

#[test]
fn filters_match_f64_and_no_draw_leaves_them() {
    let cpu = Cpu::with_threads(2);
    let mut compared = 0;
    for vocab in [1, 7, 111, 989, 5000] {
        for logits in shapes(vocab) {
            for filter in filters() {
                let want = reference(&logits, &filter);
                if want.close {
                    continue;
                }
                compared += 1;
                let rows = 32;
                let params: Vec<RowSampling> = (0..rows)
                    .map(|position| RowSampling {
                        seed: 5,
                        position,
                        ..filter
                    })
                    .collect();
                let (tokens, logprob, kept) =
                    sample(&cpu, vocab, &logits.repeat(rows as usize), &params);
                for row in 0..rows as usize {
                    let token = tokens[row] as usize;
                    assert!(
                        want.filtered[token] > 0.0,
                        "{vocab} {filter:?}: drew {token}"
                    );
                    assert!(
                        (f64::from(kept[row]) - want.kept).abs() < 1e-6,
                        "{vocab} {filter:?}: kept {}, not {}",
                        kept[row],
                        want.kept
                    );
                    let z = f64::from(logits[token] * (1.0 / filter.temperature));
                    assert!((f64::from(logprob[row]) - (z - want.lse)).abs() < 1e-5);
                }
            }
        }
    }
    // Most of the grid is decided clearly enough to be compared.
    assert!(compared > 1800, "{compared}");
}

/// The value that a chi-square of `freedom` degrees exceeds with probability 1e-4
/// (Wilson and Hilferty's approximation).
fn chi_square_limit(freedom: f64) -> f64 {
    let v = 2.0 / (9.0 * freedom);
    freedom * (1.0 - v + 3.719 * v.sqrt()).powi(3)
}

#[test]
fn a_million_draws_are_distributed_as_they_should_be() {
    let cpu = Cpu::with_threads(2);
    let filtered = RowSampling {
        top_k: 8,
        top_p: 0.9,
        min_p: 0.05,
        ..Default::default()
    };
    for (vocab, range, filter) in [
        (11, 2.0, RowSampling::default()),
        (
            11,
            2.0,
            RowSampling {
                temperature: 0.5,
                ..Default::default()
            },
        ),
        (
            11,
            2.0,
            RowSampling {
                top_k: 4,
                ..Default::default()
            },
        ),
        (
            11,
            2.0,
            RowSampling {
                top_p: 0.8,
                ..Default::default()
            },
        ),
        (
            11,
            2.0,
            RowSampling {
                min_p: 0.3,
                ..Default::default()
            },
        ),
        (11, 2.0, filtered),
        // Three blocks, the last one short.
        (1100, 1.0, RowSampling::default()),
    ] {
        let logits = random(6, vocab, range);
        let want = reference(&logits, &filter);
        let rows = 1024;
        let logits = cpu.upload(&logits.repeat(rows)).unwrap();
        let mut tokens = cpu.zeros::<u32>(rows).unwrap();
        let (mut logprob, mut kept) = (cpu.zeros(rows).unwrap(), cpu.zeros(rows).unwrap());
        let mut counts = vec![0u32; vocab];
        for position in 0..1000 {
            let params: Vec<RowSampling> = (0..rows as u32)
                .map(|sequence| RowSampling {
                    seed: 42,
                    sequence,
                    position,
                    ..filter
                })
                .collect();
            let params = cpu.upload(&params).unwrap();
            cpu.sample(
                rows,
                vocab,
                &logits,
                &params,
                &mut tokens,
                &mut logprob,
                &mut kept,
            )
            .unwrap();
            tokens.iter().for_each(|&t| counts[t as usize] += 1);
        }
        let draws = 1000.0 * rows as f64;
        let (mut statistic, mut classes) = (0.0, 0.0);
        for (&count, p) in counts.iter().zip(want.filtered) {
            if p == 0.0 {
                assert_eq!(count, 0);
                continue;
            }
            let expected = p * draws;
            assert!(expected > 20.0);
            statistic += (f64::from(count) - expected).powi(2) / expected;
            classes += 1.0;
        }
        let limit = chi_square_limit(classes - 1.0);
        assert!(
            classes > 1.0 && statistic < limit,
            "{filter:?}: {statistic} of {limit}"
        );
    }
}

#[test]
fn a_draw_depends_on_its_row_alone() {
    for vocab in [7, 989, 2000] {
        let (logits, params) = mixed_batch(vocab);
        let want = bits(&sample(&Cpu::with_threads(1), vocab, &logits, &params));
        for threads in [1, 2, 5] {
            let cpu = Cpu::with_threads(threads);
            assert_eq!(
                bits(&sample(&cpu, vocab, &logits, &params)),
                want,
                "{threads} threads"
            );
            for row in [0, 17, params.len() - 1] {
                let alone = sample(
                    &cpu,
                    vocab,
                    &logits[row * vocab..][..vocab],
                    &params[row..=row],
                );
                assert_eq!(bits(&alone)[0], want[row]);
            }
        }
    }
}

#[test]
fn seed_sequence_and_position_each_change_the_draws() {
    let cpu = Cpu::with_threads(1);
    let vocab = 111;
    let draws = |seed, sequence| {
        let params: Vec<RowSampling> = (0..64)
            .map(|position| RowSampling {
                seed,
                sequence,
                position,
                ..Default::default()
            })
            .collect();
        sample(&cpu, vocab, &vec![0.0; 64 * vocab], &params).0
    };
    let base = draws(0, 0);
    assert_eq!(base, draws(0, 0));
    for other in [draws(1, 0), draws(1 << 32, 0), draws(0, 1)] {
        // Of 64 draws from 111 equal tokens about 0.6 agree by chance.
        assert!(base.iter().zip(&other).filter(|(a, b)| a == b).count() < 8);
    }
    let mut seen: HashMap<u32, u32> = HashMap::new();
    base.iter().for_each(|&t| *seen.entry(t).or_default() += 1);
    assert!(seen.len() > 30);
}

#[test]
fn the_logprob_of_a_rollout_has_the_bits_of_training() {
    let cpu = Cpu::with_threads(2);
    for vocab in [111, 989, 1600] {
        let (rows, hidden) = (7, 64);
        let shape = HeadShape {
            rows,
            hidden,
            vocab,
        };
        let x = cpu.upload(&random(7, rows * hidden, 1.0)).unwrap();
        let head = cpu.upload(&random(8, vocab * hidden, 1.0)).unwrap();
        let mut logits = cpu.zeros(rows * vocab).unwrap();
        cpu.logits(shape, &x, Weight::F32(&head), &mut logits)
            .unwrap();
        for (temperature, training) in [(1.0, 1.0), (0.7, 0.7), (1.3, 1.3), (0.0, 1.0)] {
            for top_p in [1.0, 0.9] {
                let params: Vec<RowSampling> = (0..rows as u32)
                    .map(|sequence| RowSampling {
                        sequence,
                        temperature,
                        top_p,
                        ..Default::default()
                    })
                    .collect();
                let (tokens, got, _) = sample(&cpu, vocab, &logits, &params);
                let tokens = cpu.upload(&tokens).unwrap();
                let mut want = cpu.zeros::<f32>(rows).unwrap();
                let (mut lse, mut entropy) = (cpu.zeros(rows).unwrap(), cpu.zeros(rows).unwrap());
                let head = Weight::F32(&head);
                cpu.logprob(
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
                assert_eq!(
                    to_bits(&got),
                    to_bits(&want),
                    "{vocab} {temperature} {top_p}"
                );
            }
        }
    }
}

#[test]
fn ties_keep_the_lowest_token() {
    let cpu = Cpu::with_threads(1);
    let vocab = 1500;
    let many = |filter: RowSampling, logits: &[f32]| {
        let params: Vec<RowSampling> = (0..200)
            .map(|position| RowSampling { position, ..filter })
            .collect();
        let (tokens, _, kept) = sample(&cpu, vocab, &logits.repeat(200), &params);
        (tokens.iter().copied().max().unwrap(), kept[0])
    };
    let plain = RowSampling::default();
    let equal = vec![2.5; vocab];
    // Of equal tokens, k are the first k; a mass of 1/10 is the first tenth.
    assert_eq!(
        many(RowSampling { top_k: 1, ..plain }, &equal),
        (0, 1.0 / 1500.0)
    );
    assert_eq!(
        many(RowSampling { top_k: 3, ..plain }, &equal),
        (2, 3.0 / 1500.0)
    );
    assert_eq!(
        many(
            RowSampling {
                temperature: 0.0,
                ..plain
            },
            &equal
        ),
        (0, 1.0)
    );
    let (highest, kept) = many(
        RowSampling {
            top_p: 0.0999,
            ..plain
        },
        &equal,
    );
    assert!((140..150).contains(&highest));
    assert!((kept - 0.1).abs() < 1e-6);
    // Zero has two signs and one value.
    let mut zeros = vec![-5.0; vocab];
    (zeros[700], zeros[800], zeros[900]) = (-0.0, 0.0, -0.0);
    assert_eq!(many(RowSampling { top_k: 1, ..plain }, &zeros).0, 700);
    assert_eq!(
        many(
            RowSampling {
                temperature: 0.0,
                ..plain
            },
            &zeros
        )
        .0,
        700
    );
    assert_eq!(many(RowSampling { top_k: 2, ..plain }, &zeros).0, 800);
}

#[test]
fn bad_rows_are_reported_and_their_neighbours_are_not_changed() {
    let cpu = Cpu::with_threads(2);
    let vocab = 700;
    let good = random(9, vocab, 3.0);
    let plain = RowSampling::default();
    let bad = bad_rows(&good);
    let alone = bits(&sample(&cpu, vocab, &good, &[plain]));
    let (mut logits, mut params) = (good.clone(), vec![plain]);
    for (row, setting) in &bad {
        logits.extend(row.iter().chain(&good));
        params.extend([*setting, plain]);
    }
    let got = sample(&cpu, vocab, &logits, &params);
    for (i, row) in bits(&got).iter().enumerate() {
        if i % 2 == 0 {
            assert_eq!(*row, alone[0], "row {i}");
        } else {
            assert_eq!(row[0], u32::MAX, "row {i}");
            assert!(got.1[i].is_nan() && got.2[i] == 0.0, "row {i}");
        }
    }
}

#[test]
fn extreme_logits_are_sampled() {
    let cpu = Cpu::with_threads(1);
    for filter in [
        RowSampling::default(),
        RowSampling {
            top_p: 0.9,
            ..Default::default()
        },
    ] {
        let (tokens, logprob, kept) = sample(&cpu, 3, &[-3e38, 3e38, 0.0], &[filter]);
        assert_eq!((tokens[0], logprob[0], kept[0]), (1, 0.0, 1.0));
        let (tokens, logprob, _) = sample(&cpu, 2, &[f32::NEG_INFINITY, f32::MIN], &[filter]);
        assert_eq!((tokens[0], logprob[0]), (1, 0.0));
    }
}

#[test]
fn short_buffers_are_refused() {
    let cpu = Cpu::with_threads(1);
    let logits = cpu.zeros(6).unwrap();
    let params = cpu.upload(&[RowSampling::default(); 2]).unwrap();
    let mut tokens = cpu.zeros::<u32>(3).unwrap();
    let (mut a, mut b) = (cpu.zeros(3).unwrap(), cpu.zeros(1).unwrap());
    for (rows, vocab, culprit) in [(2, 4, "logits"), (3, 2, "params"), (2, 3, "kept")] {
        let error = cpu
            .sample(rows, vocab, &logits, &params, &mut tokens, &mut a, &mut b)
            .unwrap_err();
        assert!(
            matches!(error, Error::TooShort { name, .. } if name == culprit),
            "{error}"
        );
    }
    cpu.sample(0, 3, &logits, &params, &mut tokens, &mut a, &mut b)
        .unwrap();
    // A row without tokens has no finite logit.
    cpu.sample(1, 0, &logits, &params, &mut tokens, &mut a, &mut b)
        .unwrap();
    assert_eq!(tokens[0], u32::MAX);
}
