//! The policy loss of 64 sequences of 512 tokens, with a reference.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::grpo::{Grpo, GrpoConfig};
use dust_kernels::{Cpu, Device};

fn grpo(c: &mut Criterion) {
    let cpu = Cpu::new();
    let (sequences, length) = (64, 512);
    let tokens = sequences * length;
    let offsets: Vec<u32> = (0..=sequences).map(|s| (s * length) as u32).collect();
    let offsets = cpu.upload(&offsets).unwrap();
    let weights = cpu.upload(&vec![1.0 / tokens as f32; sequences]).unwrap();
    let advantages: Vec<f32> = (0..sequences).map(|s| (s % 5) as f32 - 2.0).collect();
    let advantages = cpu.upload(&advantages).unwrap();
    let old = cpu.upload(&vec![-1.0f32; tokens]).unwrap();
    let new: Vec<f32> = (0..tokens).map(|t| -1.0 + (t % 7) as f32 * 0.05).collect();
    let new = cpu.upload(&new).unwrap();
    let mut dlogprob = cpu.zeros(tokens).unwrap();
    let mut stats = cpu.zeros(sequences).unwrap();
    let config = GrpoConfig {
        kl_coef: 0.01,
        ..Default::default()
    };
    let mut group = c.benchmark_group("grpo");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("loss/64x512", |b| {
        b.iter(|| {
            cpu.grpo_loss(
                &config,
                sequences,
                tokens,
                &offsets,
                &weights,
                &advantages,
                &new,
                &old,
                Some(&old),
                &mut dlogprob,
                &mut stats,
            )
            .unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, grpo);
criterion_main!(benches);
