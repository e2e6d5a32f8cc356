//! Gather and scatter of 512 tokens at the size of SmolLM2-135M; bytes are those read and written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::embedding::Embedding;
use dust_kernels::{Cpu, Device, Weight};
use half::bf16;

fn embedding(c: &mut Criterion) {
    let cpu = Cpu::new();
    let (rows, width, vocab) = (512, 576, 49152u32);
    let tokens: Vec<u32> = (0..rows as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % vocab)
        .collect();
    let tokens = cpu.upload(&tokens).unwrap();
    let table = cpu.zeros::<bf16>(vocab as usize * width).unwrap();
    let mut dtable = cpu.zeros(vocab as usize * width).unwrap();
    let mut out = cpu.zeros(rows * width).unwrap();
    let mut group = c.benchmark_group("embedding");
    group.throughput(Throughput::Bytes((6 * rows * width) as u64));
    group.bench_function("embed/bf16/512", |b| {
        b.iter(|| {
            cpu.embed(rows, width, &tokens, Weight::Bf16(&table), &mut out)
                .unwrap()
        });
    });
    group.throughput(Throughput::Bytes((12 * rows * width) as u64));
    group.bench_function("embed_backward/512", |b| {
        b.iter(|| {
            cpu.embed_backward(rows, width, &tokens, &out, &mut dtable)
                .unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, embedding);
criterion_main!(benches);
