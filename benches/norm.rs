//! RMSNorm of 2048 rows of 576, the width of SmolLM2-135M. Throughput is in bytes read and written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::{Cpu, Device, Result};

const SHAPE: NormShape = NormShape {
    rows: 2048,
    width: 576,
};
const EPS: f32 = 1e-5;

fn norm(c: &mut Criterion) {
    let cpu = Cpu::new();
    let n = SHAPE.rows * SHAPE.width;
    let mut group = c.benchmark_group("norm");
    let mut run = || -> Result<()> {
        let x: Vec<f32> = (0..n).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
        let (x, delta) = (cpu.upload(&x)?, cpu.upload(&x)?);
        let weight = cpu.upload(&vec![0.5f32; SHAPE.width])?;
        let (mut sum, mut y) = (cpu.zeros(n)?, cpu.zeros(n)?);
        let mut rstd = cpu.zeros(SHAPE.rows)?;
        let mut dweight = cpu.zeros(SHAPE.width)?;
        let bytes = |arrays: usize| Throughput::Bytes((arrays * n * size_of::<f32>()) as u64);
        group.throughput(bytes(2));
        group.bench_function("rms_norm", |b| {
            b.iter(|| cpu.rms_norm(SHAPE, EPS, &x, &weight, &mut y, &mut rstd))
        });
        group.throughput(bytes(4));
        group.bench_function("add_rms_norm", |b| {
            b.iter(|| {
                cpu.add_rms_norm(SHAPE, EPS, &x, &delta, &weight, &mut sum, &mut y, &mut rstd)
            })
        });
        group.bench_function("rms_norm_backward", |b| {
            b.iter(|| {
                cpu.rms_norm_backward(SHAPE, &delta, &x, &weight, &rstd, &mut y, &mut dweight)
            })
        });
        Ok(())
    };
    run().expect("memory for the benchmark");
    group.finish();
}

criterion_group!(benches, norm);
criterion_main!(benches);
