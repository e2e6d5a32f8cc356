//! Advantages and the policy loss against f64, gradients against finite differences of f64.

#[path = "reference/grpo.rs"]
mod reference;

use dust_kernels::grpo::{
    AdvantageConfig, Grpo, GrpoConfig, KlEstimator, RatioLevel, SequenceStats,
};
use dust_kernels::{Cpu, Device, Error};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::{Batch, advantages, advantages_f64, configs};

#[test]
fn losses_gradients_and_statistics_match_f64() {
    let cpu = Cpu::with_threads(2);
    // Sequence ratios need few tokens to leave the clip range at all.
    let batch = Batch::random(1, &[1, 7, 0, 111, 2, 3, 1, 1, 2, 989, 1, 2, 3, 4], 1.0);
    let mut seen = [0.0f32; 3];
    for config in configs() {
        let (dlogprob, stats) = batch.run(&cpu, &config);
        let clipped = batch.check(&config, &dlogprob, &stats);
        (0..3).for_each(|i| seen[i] += clipped[i]);
    }
    assert!(
        seen.iter().all(|&n| n > 0.0),
        "a clip was never in force: {seen:?}"
    );
}

/// One token; returns its gradient and statistics.
fn one_token(config: &GrpoConfig, advantage: f32, new: f32, old: f32) -> (f32, SequenceStats) {
    let batch = Batch {
        offsets: vec![0, 1],
        weights: vec![1.0],
        advantages: vec![advantage],
        new: vec![new],
        old: vec![old],
        reference: Some(vec![-1.0]),
    };
    let (dlogprob, stats) = batch.run(&Cpu::with_threads(1), config);
    (dlogprob[0], stats[0])
}

#[test]
fn an_unmoved_policy_has_ratio_one_exactly() {
    let mut batch = Batch::random(2, &[7, 111, 1], 0.1);
    batch.new = batch.old.clone();
    batch.reference = Some(batch.old.clone());
    for config in configs() {
        let (dlogprob, stats) = batch.run(&Cpu::with_threads(2), &config);
        for (s, stats) in stats.iter().enumerate() {
            let tokens = batch.sequence(s).len() as f32;
            assert_eq!(stats.ratio, tokens);
            let (weight, advantage) = (batch.weights[s], batch.advantages[s]);
            assert_eq!([stats.ratio_deviation, stats.moved, stats.kl], [0.0; 3]);
            // The gradient of the plain policy gradient (K1's constant slope comes on top).
            if config.kl != KlEstimator::K1 || config.kl_coef == 0.0 {
                let want = (-f64::from(weight) * f64::from(advantage)) as f32;
                assert!(dlogprob[batch.sequence(s)].iter().all(|&d| d == want));
            }
        }
    }
}

#[test]
fn a_ratio_on_the_boundary_is_not_clipped_and_one_step_beyond_is() {
    // With no room at all the boundary is 1, which a ratio can hit exactly.
    let config = GrpoConfig {
        clip_low: 0.0,
        clip_high: 0.0,
        ..Default::default()
    };
    let (up, down) = ((-1.0f32).next_up(), (-1.0f32).next_down());
    for (advantage, new, clipped) in [
        (1.0, -1.0, false),
        (-1.0, -1.0, false),
        (1.0, up, true),
        (1.0, down, false),
        (-1.0, down, true),
        (-1.0, up, false),
    ] {
        let (d, stats) = one_token(&config, advantage, new, -1.0);
        assert_eq!(d == 0.0, clipped, "{advantage} {new}");
        assert_eq!(stats.clipped_high == 1.0, clipped && advantage > 0.0);
        assert_eq!(stats.clipped_low == 1.0, clipped && advantage < 0.0);
        assert!((stats.loss + advantage).abs() < 1e-6);
    }
}

#[test]
fn collapsed_tokens_cost_a_finite_loss() {
    for ratio in [RatioLevel::Token, RatioLevel::Sequence] {
        for kl in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            let config = GrpoConfig {
                kl_coef: 0.1,
                kl,
                ratio,
                ..Default::default()
            };
            for advantage in [-1.0, 0.0, 1.0] {
                for (new, old) in [
                    (-1000.0, -1.0),
                    (-1.0, -1000.0),
                    (f32::NEG_INFINITY, -1.0),
                    (-1.0, f32::NEG_INFINITY),
                    (f32::MIN, f32::MAX),
                ] {
                    let (d, stats) = one_token(&config, advantage, new, old);
                    assert!(d.is_finite(), "{d}");
                    for x in bytemuck::cast_slice::<_, f32>(&[stats]) {
                        assert!(x.is_finite(), "{stats:?}");
                    }
                }
            }
        }
    }
    // What is not a number is not hidden.
    let (d, stats) = one_token(&GrpoConfig::default(), 1.0, f32::NAN, -1.0);
    assert!(d.is_nan() && stats.loss.is_nan() && stats.ratio.is_nan());
    assert!(stats.ratio_deviation.is_nan() && stats.moved.is_nan());
}

#[test]
fn weights_aggregate_over_the_mini_batch_and_not_the_call() {
    let cpu = Cpu::with_threads(2);
    let lengths = [3usize, 5, 2, 7];
    let mut batch = Batch::random(3, &lengths, 0.3);
    let config = GrpoConfig {
        kl_coef: 0.1,
        ..Default::default()
    };
    batch.weights = vec![1.0; 4];
    let (_, sums) = batch.run(&cpu, &config);
    // Mean over tokens, mean over sequences of means over tokens.
    let token_mean = sums.iter().map(|s| s.loss).sum::<f32>() / 17.0;
    let sequence_mean = sums
        .iter()
        .zip(lengths)
        .map(|(s, n)| s.loss / n as f32)
        .sum::<f32>()
        / 4.0;
    for (weights, want) in [
        (lengths.map(|_| 1.0 / 17.0), token_mean),
        (lengths.map(|n| 1.0 / (4.0 * n as f32)), sequence_mean),
    ] {
        batch.weights = weights.to_vec();
        let (dlogprob, stats) = batch.run(&cpu, &config);
        assert!((stats.iter().map(|s| s.loss).sum::<f32>() - want).abs() < 1e-6);
        // Two calls of half the sequences each make the same numbers.
        for (half, from) in [(0..2usize, 0usize), (2..4, 8)] {
            let to = from + lengths[half.clone()].iter().sum::<usize>();
            let part = Batch {
                offsets: batch.offsets[half.start..=half.end]
                    .iter()
                    .map(|o| o - from as u32)
                    .collect(),
                weights: batch.weights[half.clone()].to_vec(),
                advantages: batch.advantages[half.clone()].to_vec(),
                new: batch.new[from..to].to_vec(),
                old: batch.old[from..to].to_vec(),
                reference: batch.reference.as_ref().map(|r| r[from..to].to_vec()),
            };
            let (d, s) = part.run(&cpu, &config);
            assert_eq!(d, dlogprob[from..to]);
            assert_eq!(s, stats[half]);
        }
    }
}

#[test]
fn without_a_reference_there_is_no_kl_and_padding_gets_no_gradient() {
    let mut batch = Batch::random(4, &[3, 4], 0.1);
    batch.reference = None;
    batch.new.extend([f32::NAN; 2]);
    batch.old.extend([0.0; 2]);
    let (dlogprob, stats) = batch.run(&Cpu::with_threads(1), &GrpoConfig::default());
    assert!(stats.iter().all(|s| s.kl == 0.0));
    assert_eq!(dlogprob[7..], [0.0, 0.0]);
    assert!(dlogprob[..7].iter().all(|d| d.is_finite()));
}

#[test]
fn losses_have_the_same_bits_on_any_number_of_threads() {
    let batch = Batch::random(5, &[111, 1, 989, 7, 3, 250], 0.5);
    let config = GrpoConfig {
        kl_coef: 0.1,
        ..Default::default()
    };
    let want = batch.run(&Cpu::with_threads(1), &config);
    for threads in [1, 2, 5] {
        assert_eq!(batch.run(&Cpu::with_threads(threads), &config), want);
    }
}

#[test]
fn advantages_are_standard_scores() {
    let cpu = Cpu::with_threads(2);
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for size in [1, 2, 7, 111, 989] {
        // A large offset shows a one-pass variance up.
        let rewards: Vec<f32> = (0..5 * size)
            .map(|_| 1000.0 + rng.random::<f32>())
            .collect();
        for divide_by_std in [true, false] {
            let config = AdvantageConfig {
                divide_by_std,
                ..Default::default()
            };
            let got = advantages(&cpu, size, config, &rewards);
            for (got, rewards) in got.chunks(size).zip(rewards.chunks(size)) {
                let want = advantages_f64(rewards, divide_by_std, 1e-6);
                for (got, want) in got.iter().zip(want) {
                    assert!((f64::from(*got) - want).abs() < 1e-6);
                }
            }
            for threads in [1, 5] {
                assert_eq!(
                    advantages(&Cpu::with_threads(threads), size, config, &rewards),
                    got
                );
            }
        }
    }
    // 0.1 is no binary fraction: its mean over three may round to another number.
    let config = AdvantageConfig {
        divide_by_std: true,
        eps: 0.0,
    };
    assert_eq!(advantages(&cpu, 3, config, &[0.1; 3]), [0.0; 3]);
    let got = advantages(&cpu, 2, config, &[0.1, 0.1f32.next_up()]);
    assert_eq!(got, [-1.0, 1.0]);
    let got = advantages(&cpu, 4, AdvantageConfig::default(), &[1.0, 0.0, 0.0, 0.0]);
    assert!((got[0] - 3f32.sqrt()).abs() < 1e-4);
}

#[test]
fn bad_arguments_are_refused() {
    let cpu = Cpu::with_threads(1);
    let x = cpu.zeros::<f32>(4).unwrap();
    let mut d = cpu.zeros::<f32>(4).unwrap();
    let mut stats = cpu.zeros(2).unwrap();
    let mut call = |config: GrpoConfig, offsets: &[u32], tokens, sequences, reference: bool| {
        let offsets = cpu.upload(offsets).unwrap();
        let reference = reference.then_some(&x);
        cpu.grpo_loss(
            &config, sequences, tokens, &offsets, &x, &x, &x, &x, reference, &mut d, &mut stats,
        )
        .unwrap_err()
    };
    let plain = GrpoConfig::default();
    let offsets = [0, 2, 4];
    for error in [
        call(
            GrpoConfig {
                dual_clip: Some(1.0),
                ..plain
            },
            &offsets,
            4,
            2,
            true,
        ),
        call(
            GrpoConfig {
                kl_coef: 0.1,
                ..plain
            },
            &offsets,
            4,
            2,
            false,
        ),
        call(
            GrpoConfig {
                clip_low: -0.1,
                ..plain
            },
            &offsets,
            4,
            2,
            true,
        ),
        call(
            GrpoConfig {
                clip_high: f32::NAN,
                ..plain
            },
            &offsets,
            4,
            2,
            true,
        ),
        call(plain, &[1, 2, 4], 4, 2, true),
        call(plain, &[0, 3, 2], 4, 2, true),
        call(plain, &[0, 2, 5], 4, 2, true),
    ] {
        assert!(
            matches!(
                error,
                Error::Invalid {
                    op: "grpo_loss",
                    ..
                }
            ),
            "{error}"
        );
    }
    let error = call(plain, &offsets, 5, 2, true);
    assert!(
        matches!(error, Error::TooShort { name: "new", .. }),
        "{error}"
    );
    let error = call(plain, &offsets, 4, 3, true);
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "offsets",
                ..
            }
        ),
        "{error}"
    );

    let config = AdvantageConfig::default();
    let error = cpu.advantages(1, 0, config, &x, &mut d).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Invalid {
                op: "advantages",
                ..
            }
        ),
        "{error}"
    );
    let error = cpu.advantages(1, 5, config, &x, &mut d).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "rewards",
                ..
            }
        ),
        "{error}"
    );
}
