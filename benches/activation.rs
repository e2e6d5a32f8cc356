//! SwiGLU at the width of SmolLM2-135M, for 512 tokens; bytes are those read and written once.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::activation::Activation;
use dust_kernels::{Cpu, Device};

fn activation(c: &mut Criterion) {
    let cpu = Cpu::new();
    let (rows, width) = (512, 1536);
    let host: Vec<f32> = (0..2 * rows * width)
        .map(|i| (i % 97) as f32 * 0.1 - 5.0)
        .collect();
    let gate_up = cpu.upload(&host).unwrap();
    let mut out = cpu.zeros(rows * width).unwrap();
    let mut dgate_up = cpu.zeros(2 * rows * width).unwrap();
    let mut group = c.benchmark_group("activation");
    group.throughput(Throughput::Bytes((3 * 4 * rows * width) as u64));
    group.bench_function("swiglu/512", |b| {
        b.iter(|| cpu.swiglu(rows, width, &gate_up, &mut out).unwrap());
    });
    group.throughput(Throughput::Bytes((5 * 4 * rows * width) as u64));
    group.bench_function("swiglu_backward/512", |b| {
        b.iter(|| {
            cpu.swiglu_backward(rows, width, &gate_up, &out, &mut dgate_up)
                .unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, activation);
criterion_main!(benches);
