//! One AdamW step and the norm over ten million parameters; bytes are those read and written once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::{Cpu, Device};

fn adamw(c: &mut Criterion) {
    let cpu = Cpu::new();
    let len = 10_000_000;
    let grad = cpu.upload(&vec![0.01f32; len]).unwrap();
    let scale = cpu.upload(&[1.0f32]).unwrap();
    let mut param = cpu.upload(&vec![0.5f32; len]).unwrap();
    let (mut m, mut v) = (cpu.zeros(len).unwrap(), cpu.zeros(len).unwrap());
    let mut copy = cpu.zeros(len).unwrap();
    let mut sum = cpu.zeros(1).unwrap();
    let config = AdamWConfig::default();
    let mut group = c.benchmark_group("adamw");
    group.sample_size(10);
    // Gradient read, three buffers read and written, the copy written.
    group.throughput(Throughput::Bytes(30 * len as u64));
    group.bench_function("step/1e7", |b| {
        b.iter(|| {
            let copy = Some(&mut copy);
            cpu.adamw(
                &config, len, &scale, &grad, &mut param, &mut m, &mut v, copy,
            )
            .unwrap();
        });
    });
    group.throughput(Throughput::Bytes(4 * len as u64));
    group.bench_function("sum_of_squares/1e7", |b| {
        b.iter(|| cpu.sum_of_squares(len, &grad, &mut sum, 0).unwrap());
    });
    group.finish();
}

criterion_group!(benches, adamw);
criterion_main!(benches);
