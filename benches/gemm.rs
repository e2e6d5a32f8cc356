//! Linear layers at the sizes of SmolLM2-135M: FLOP/s at many rows, weight bytes/s at one row.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::gemm::{Gemm, LinearShape};
use dust_kernels::{Cpu, Device, Weight};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// (name, outputs, inputs).
const LAYERS: [(&str, usize, usize); 4] = [
    ("qkv", 960, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("head", 49152, 576),
];

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn linear(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (name, outputs, inputs) in LAYERS {
        let host = random(&mut rng, outputs * inputs);
        let halves: Vec<bf16> = host.iter().map(|&x| bf16::from_f32(x)).collect();
        let (f32s, bf16s) = (cpu.upload(&host).unwrap(), cpu.upload(&halves).unwrap());
        for (rows, format) in [
            (1, "f32"),
            (1, "bf16"),
            (4, "bf16"),
            (8, "bf16"),
            (16, "f32"),
            (16, "bf16"),
            (512, "f32"),
            (512, "bf16"),
        ] {
            let shape = LinearShape {
                rows,
                inputs,
                outputs,
            };
            let x = cpu.upload(&random(&mut rng, rows * inputs)).unwrap();
            let mut y = cpu.zeros(rows * outputs).unwrap();
            let (w, bytes) = match format {
                "f32" => (Weight::F32(&f32s), 4),
                _ => (Weight::Bf16(&bf16s), 2),
            };
            let mut group = c.benchmark_group(format!("linear/{format}/{name}"));
            group.sample_size(10);
            group.throughput(if rows == 1 {
                Throughput::Bytes((bytes * outputs * inputs) as u64)
            } else {
                Throughput::Elements((2 * rows * outputs * inputs) as u64)
            });
            group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                b.iter(|| cpu.linear(shape, &x, w, None, &mut y).unwrap());
            });
        }
    }
}

fn gradients(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (name, outputs, inputs) in &LAYERS[..3] {
        let (outputs, inputs, rows) = (*outputs, *inputs, 512);
        let shape = LinearShape {
            rows,
            inputs,
            outputs,
        };
        let w = cpu.upload(&random(&mut rng, outputs * inputs)).unwrap();
        let x = cpu.upload(&random(&mut rng, rows * inputs)).unwrap();
        let dy = cpu.upload(&random(&mut rng, rows * outputs)).unwrap();
        let mut dx = cpu.zeros(rows * inputs).unwrap();
        let mut dw = cpu.zeros(outputs * inputs).unwrap();
        let mut group = c.benchmark_group(format!("linear_gradients/{name}"));
        group.sample_size(10);
        group.throughput(Throughput::Elements((2 * rows * outputs * inputs) as u64));
        group.bench_function("dx", |b| {
            b.iter(|| cpu.linear_dx(shape, &dy, Weight::F32(&w), &mut dx).unwrap());
        });
        group.bench_function("dw", |b| {
            b.iter(|| cpu.linear_dw(shape, &x, &dy, &mut dw).unwrap());
        });
    }
}

criterion_group!(benches, linear, gradients);
criterion_main!(benches);
