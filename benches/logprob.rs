//! The fused head at the size of SmolLM2-135M: training's forward and backward, rollout's logits.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::{Cpu, Device, Weight};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn head(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let shape = HeadShape {
        rows: 512,
        hidden: 576,
        vocab: 49152,
    };
    let HeadShape {
        rows,
        hidden,
        vocab,
    } = shape;
    let host: Vec<bf16> = (0..vocab * hidden)
        .map(|_| bf16::from_f32(rng.random_range(-0.1..0.1)))
        .collect();
    let weight = cpu.upload(&host).unwrap();
    let weight = Weight::Bf16(&weight);
    let x: Vec<f32> = (0..rows * hidden)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    let x = cpu.upload(&x).unwrap();
    let targets: Vec<u32> = (0..rows)
        .map(|_| rng.random_range(0..vocab as u32))
        .collect();
    let targets = cpu.upload(&targets).unwrap();
    let (mut logprob, mut lse, mut entropy) = (
        cpu.zeros(rows).unwrap(),
        cpu.zeros(rows).unwrap(),
        cpu.zeros(rows).unwrap(),
    );
    let dlogprob = cpu.upload(&vec![1.0f32; rows]).unwrap();
    let mut dx = cpu.zeros(rows * hidden).unwrap();
    let mut dhead = cpu.zeros(vocab * hidden).unwrap();
    let flops = (2 * rows * hidden * vocab) as u64;

    let mut group = c.benchmark_group("logprob");
    group.sample_size(10);
    group.throughput(Throughput::Elements(flops));
    group.bench_function("forward/512", |b| {
        b.iter(|| {
            cpu.logprob(
                shape,
                1.0,
                &x,
                weight,
                &targets,
                &mut logprob,
                &mut lse,
                &mut entropy,
            )
            .unwrap();
        });
    });
    group.throughput(Throughput::Elements(3 * flops));
    group.bench_function("backward/512", |b| {
        b.iter(|| {
            cpu.logprob_backward(
                shape,
                1.0,
                &x,
                weight,
                &targets,
                &lse,
                &dlogprob,
                &mut dx,
                Some(&mut dhead),
            )
            .unwrap();
        });
    });
    let one = HeadShape { rows: 1, ..shape };
    let mut logits = cpu.zeros(vocab).unwrap();
    group.throughput(Throughput::Bytes((2 * hidden * vocab) as u64));
    group.bench_function("logits/1", |b| {
        b.iter(|| cpu.logits(one, &x, weight, &mut logits).unwrap());
    });
    group.finish();
}

criterion_group!(benches, head);
criterion_main!(benches);
