//! Advantages and the policy loss on the emulator against f64 and the CPU, and their bits.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/grpo.rs"]
mod reference;

use common::cuda::{Costs, bits, for_each_schedule, reports_of, up, with_cuda, with_emulator};
use dust_kernels::grpo::{
    AdvantageConfig, Grpo, GrpoConfig, KlEstimator, RatioLevel, SequenceStats,
};
use dust_kernels::{Cpu, Cuda, Device, Error};
use reference::{Batch, advantages, advantages_f64, configs};

#[test]
fn losses_gradients_and_statistics_match_f64_under_every_schedule() {
    let batch = Batch::random(1, &[1, 7, 0, 33, 2, 3, 1, 1, 130, 2, 1, 2, 3, 4], 1.0);
    for_each_schedule(|what, cuda| {
        let mut seen = [0.0f32; 3];
        for config in configs() {
            let (dlogprob, stats) = batch.run(cuda, &config);
            let clipped = batch.check(&config, &dlogprob, &stats);
            (0..3).for_each(|i| seen[i] += clipped[i]);
        }
        assert!(seen.iter().all(|&n| n > 0.0), "{what}: {seen:?}");
    });
}

fn values(stats: &[SequenceStats]) -> &[f32] {
    bytemuck::cast_slice(stats)
}

#[test]
fn agrees_with_the_cpu_to_the_last_places() {
    let batch = Batch::random(2, &[111, 0, 989, 1, 128, 129, 2000], 0.7);
    let cpu = Cpu::with_threads(2);
    with_cuda(|cuda, _| {
        for config in configs() {
            let (got, want) = (batch.run(cuda, &config), batch.run(&cpu, &config));
            let gradients = got.0.iter().zip(&want.0);
            let statistics = values(&got.1).iter().zip(values(&want.1));
            for (got, want) in gradients.chain(statistics) {
                assert!(
                    (got - want).abs() <= 3e-7 * (1.0 + want.abs()),
                    "{config:?}: {got} {want}"
                );
            }
        }
    });
}

#[test]
fn an_unmoved_policy_has_ratio_one_exactly() {
    let mut batch = Batch::random(3, &[7, 300, 1], 0.1);
    batch.new = batch.old.clone();
    batch.reference = Some(batch.old.clone());
    with_cuda(|cuda, _| {
        for config in configs() {
            let (dlogprob, stats) = batch.run(cuda, &config);
            for (s, stats) in stats.iter().enumerate() {
                assert_eq!(stats.ratio, batch.sequence(s).len() as f32);
                assert_eq!([stats.ratio_deviation, stats.moved, stats.kl], [0.0; 3]);
                if config.kl != KlEstimator::K1 || config.kl_coef == 0.0 {
                    let (weight, advantage) = (batch.weights[s], batch.advantages[s]);
                    let want = (-f64::from(weight) * f64::from(advantage)) as f32;
                    assert!(dlogprob[batch.sequence(s)].iter().all(|&d| d == want));
                }
            }
        }
    });
}

/// One token; its gradient and statistics.
fn one_token(
    cuda: &Cuda,
    config: &GrpoConfig,
    advantage: f32,
    new: f32,
    old: f32,
) -> (f32, SequenceStats) {
    let batch = Batch {
        offsets: vec![0, 1],
        weights: vec![1.0],
        advantages: vec![advantage],
        new: vec![new],
        old: vec![old],
        reference: Some(vec![-1.0]),
    };
    let (dlogprob, stats) = batch.run(cuda, config);
    (dlogprob[0], stats[0])
}

#[test]
fn a_ratio_on_the_boundary_is_not_clipped_and_one_step_beyond_is() {
    let config = GrpoConfig {
        clip_low: 0.0,
        clip_high: 0.0,
        ..Default::default()
    };
    let (up, down) = ((-1.0f32).next_up(), (-1.0f32).next_down());
    with_cuda(|cuda, _| {
        for (advantage, new, clipped) in [
            (1.0, -1.0, false),
            (-1.0, -1.0, false),
            (1.0, up, true),
            (1.0, down, false),
            (-1.0, down, true),
            (-1.0, up, false),
        ] {
            let (d, stats) = one_token(cuda, &config, advantage, new, -1.0);
            assert_eq!(d == 0.0, clipped, "{advantage} {new}");
            assert_eq!(stats.clipped_high == 1.0, clipped && advantage > 0.0);
            assert_eq!(stats.clipped_low == 1.0, clipped && advantage < 0.0);
        }
    });
}

#[test]
fn collapsed_tokens_cost_a_finite_loss_and_nan_is_not_hidden() {
    with_cuda(|cuda, _| {
        for ratio in [RatioLevel::Token, RatioLevel::Sequence] {
            for kl in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
                let config = GrpoConfig {
                    kl_coef: 0.1,
                    kl,
                    ratio,
                    ..Default::default()
                };
                for (new, old) in [
                    (-1000.0, -1.0),
                    (-1.0, -1000.0),
                    (f32::NEG_INFINITY, -1.0),
                    (-1.0, f32::NEG_INFINITY),
                    (f32::MIN, f32::MAX),
                ] {
                    let (d, stats) = one_token(cuda, &config, -1.0, new, old);
                    assert!(d.is_finite(), "{d}");
                    assert!(values(&[stats]).iter().all(|x| x.is_finite()), "{stats:?}");
                }
            }
        }
        // One NaN among many tokens, whichever thread has it.
        let mut batch = Batch::random(4, &[300], 0.1);
        batch.new[200] = f32::NAN;
        let (d, stats) = batch.run(cuda, &GrpoConfig::default());
        assert_eq!(d.iter().filter(|d| d.is_nan()).count(), 1);
        assert!(d[200].is_nan() && stats[0].loss.is_nan() && stats[0].ratio.is_nan());
        assert!(stats[0].ratio_deviation.is_nan() && stats[0].moved.is_nan());
    });
}

#[test]
fn bits_depend_on_the_sequence_alone() {
    let batch = Batch::random(5, &[111, 1, 300, 7, 250], 0.5);
    with_cuda(|cuda, _| {
        for config in configs().into_iter().step_by(5) {
            let (dlogprob, stats) = batch.run(cuda, &config);
            let again = batch.run(cuda, &config);
            assert_eq!(bits(&dlogprob), bits(&again.0));
            assert_eq!(bits(&stats), bits(&again.1));
            let range = batch.sequence(2);
            let alone = Batch {
                offsets: vec![0, 300],
                weights: vec![batch.weights[2]],
                advantages: vec![batch.advantages[2]],
                new: batch.new[range.clone()].to_vec(),
                old: batch.old[range.clone()].to_vec(),
                reference: batch.reference.as_ref().map(|r| r[range.clone()].to_vec()),
            };
            let (d, s) = alone.run(cuda, &config);
            assert_eq!(bits(&d), bits(&dlogprob[range]));
            assert_eq!(bits(&s), bits(&stats[2..3]));
        }
    });
}

#[test]
fn padding_gets_no_gradient_and_without_a_reference_there_is_no_kl() {
    with_cuda(|cuda, _| {
        let mut batch = Batch::random(6, &[3, 4], 0.1);
        batch.reference = None;
        batch.new.extend([f32::NAN; 200]);
        batch.old.extend([0.0; 200]);
        let (dlogprob, stats) = batch.run(cuda, &GrpoConfig::default());
        assert!(stats.iter().all(|s| s.kl == 0.0));
        assert_eq!(dlogprob[7..], [0.0; 200]);
        assert!(dlogprob[..7].iter().all(|d| d.is_finite()));
        let nothing = Batch {
            offsets: vec![0],
            weights: vec![],
            advantages: vec![],
            new: vec![1.0; 3],
            old: vec![1.0; 3],
            reference: None,
        };
        assert_eq!(nothing.run(cuda, &GrpoConfig::default()).0, [0.0; 3]);
    });
}

#[test]
fn bad_offsets_are_named_when_memory_is_read_and_nothing_is_written() {
    with_cuda(|cuda, _| {
        let x = up(cuda, &[-1f32; 4]);
        for (offsets, at, value, limit) in [
            ([1, 2, 4], 0, 1, 1),
            ([0, 3, 2], 1, 3, 3),
            ([0, 2, 5], 2, 5, 5),
            ([0, u32::MAX, 4], 1, u32::MAX as usize, 5),
        ] {
            let offsets = up(cuda, &offsets);
            let mut d = up(cuda, &[7f32; 4]);
            let mut stats = cuda.zeros(2).unwrap();
            let config = GrpoConfig::default();
            cuda.grpo_loss(
                &config, 2, 4, &offsets, &x, &x, &x, &x, None, &mut d, &mut stats,
            )
            .unwrap();
            let error = cuda.download(&d).unwrap_err();
            let want = Error::OutOfRange {
                op: "grpo_loss",
                name: "offsets",
                at,
                value,
                limit,
            };
            assert_eq!(error, want);
            assert_eq!(cuda.download(&d).unwrap(), [7.0; 4]);
            assert!(cuda.download(&stats).unwrap() == [SequenceStats::default(); 2]);
        }
    });
}

#[test]
fn advantages_are_standard_scores() {
    for_each_schedule(|what, cuda| {
        // Below and above what a lane, a warp and registers hold.
        for size in [1, 2, 7, 33, 128, 300] {
            let rewards: Vec<f32> = (0..5 * size)
                .map(|i| 1000.0 + ((i * 7919) % 1009) as f32 / 1009.0)
                .collect();
            for divide_by_std in [true, false] {
                let config = AdvantageConfig {
                    divide_by_std,
                    ..Default::default()
                };
                let got = advantages(cuda, size, config, &rewards);
                for (got, rewards) in got.chunks(size).zip(rewards.chunks(size)) {
                    let want = advantages_f64(rewards, divide_by_std, 1e-6);
                    for (got, want) in got.iter().zip(want) {
                        let off = (f64::from(*got) - want).abs();
                        assert!(off < 1e-6, "{what}, {size}: {got} {want}");
                    }
                }
                let alone = advantages(cuda, size, config, &rewards[4 * size..]);
                assert_eq!(bits(&alone), bits(&got[4 * size..]));
            }
        }
        let config = AdvantageConfig {
            divide_by_std: true,
            eps: 0.0,
        };
        assert_eq!(advantages(cuda, 3, config, &[0.1; 6]), [0.0; 6]);
        let pair = [0.1, 0.1f32.next_up()];
        assert_eq!(advantages(cuda, 2, config, &pair), [-1.0, 1.0]);
        let with_nan = advantages(cuda, 3, config, &[1.0, f32::NAN, 0.0, 1.0, 1.0, 1.0]);
        assert!(with_nan[..3].iter().all(|a| a.is_nan()));
        assert_eq!(with_nan[3..], [0.0; 3]);
        assert!(advantages(cuda, 1, config, &[f32::NAN])[0].is_nan());
    });
}

#[test]
fn bad_arguments_are_refused_as_on_the_cpu() {
    with_cuda(|cuda, _| {
        let x = up(cuda, &[0f32; 4]);
        let (mut d, mut stats) = (up(cuda, &[0f32; 4]), cuda.zeros(2).unwrap());
        let offsets = up(cuda, &[0u32, 2, 4]);
        let plain = GrpoConfig::default();
        let mut call = |config: GrpoConfig, sequences, tokens| {
            cuda.grpo_loss(
                &config, sequences, tokens, &offsets, &x, &x, &x, &x, None, &mut d, &mut stats,
            )
            .unwrap_err()
        };
        let dual_clip = Some(1.0);
        for config in [
            GrpoConfig { dual_clip, ..plain },
            GrpoConfig {
                kl_coef: 0.1,
                ..plain
            },
            GrpoConfig {
                clip_low: -0.1,
                ..plain
            },
        ] {
            let error = call(config, 2, 4);
            let op = "grpo_loss";
            assert!(matches!(error, Error::Invalid { op: o, .. } if o == op));
        }
        let error = call(plain, 2, 5);
        assert!(matches!(error, Error::TooShort { name: "new", .. }));
        let error = call(plain, 3, 4);
        assert!(matches!(
            error,
            Error::TooShort {
                name: "offsets",
                ..
            }
        ));
        let config = AdvantageConfig::default();
        let error = cuda.advantages(1, 0, config, &x, &mut d).unwrap_err();
        assert!(matches!(
            error,
            Error::Invalid {
                op: "advantages",
                ..
            }
        ));
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let (sequences, length) = (4, 4096);
        let batch = Batch::random(7, &[length; 4], 0.3);
        let tokens = sequences * length;
        let f = |x: &[f32]| up(cuda, x);
        let offsets = up(cuda, &batch.offsets);
        let (weights, advantage) = (f(&batch.weights), f(&batch.advantages));
        let (new, old) = (f(&batch.new), f(&batch.old));
        let reference = f(batch.reference.as_deref().unwrap());
        let mut d = cuda.zeros(tokens).unwrap();
        let mut stats = cuda.zeros(sequences).unwrap();
        let config = GrpoConfig {
            kl_coef: 0.1,
            ..Default::default()
        };
        let reports = reports_of(emulator, || {
            cuda.grpo_loss(
                &config,
                sequences,
                tokens,
                &offsets,
                &weights,
                &advantage,
                &new,
                &old,
                Some(&reference),
                &mut d,
                &mut stats,
            )
        });
        let least = 16 * tokens + sequences * (3 * 4 + 32);
        Costs::memory_bound(least).check("grpo_loss", &reports);

        let (groups, size) = (256, 64);
        let rewards = f(&batch.new);
        let mut out = cuda.zeros(groups * size).unwrap();
        let config = AdvantageConfig::default();
        let reports = reports_of(emulator, || {
            cuda.advantages(groups, size, config, &rewards, &mut out)
        });
        Costs::memory_bound(8 * groups * size).check("advantages", &reports);
    });
}
