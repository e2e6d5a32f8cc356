//! Sampling one row of 49,152 tokens on one core, plain and filtered; logits as spread out as those
//! of a language model (standard deviation 3), and flat ones, where filters have most to do.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::sampling::{RowSampling, Sampling};
use dust_kernels::{Cpu, Device};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn sampling(c: &mut Criterion) {
    let cpu = Cpu::with_threads(1);
    let vocab = 49152;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // The sum of twelve uniform numbers is normal enough.
    let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    let spread: Vec<f32> = (0..vocab).map(|_| 3.0 * normal()).collect();
    let flat: Vec<f32> = spread.iter().map(|x| x / 10.0).collect();
    let mut tokens = cpu.zeros::<u32>(1).unwrap();
    let (mut logprob, mut kept) = (cpu.zeros(1).unwrap(), cpu.zeros(1).unwrap());
    let plain = RowSampling::default();
    let mut group = c.benchmark_group("sampling");
    group.throughput(Throughput::Elements(vocab as u64));
    for (shape, logits) in [("spread", &spread), ("flat", &flat)] {
        let logits = cpu.upload(logits).unwrap();
        for (name, filter) in [
            ("plain", plain),
            (
                "greedy",
                RowSampling {
                    temperature: 0.0,
                    ..plain
                },
            ),
            ("top_k=50", RowSampling { top_k: 50, ..plain }),
            (
                "top_p=0.95",
                RowSampling {
                    top_p: 0.95,
                    ..plain
                },
            ),
            (
                "min_p=0.05",
                RowSampling {
                    min_p: 0.05,
                    ..plain
                },
            ),
        ] {
            let mut position = 0;
            group.bench_function(format!("{name}/{shape}"), |b| {
                b.iter(|| {
                    position += 1;
                    let params = cpu.upload(&[RowSampling { position, ..filter }]).unwrap();
                    cpu.sample(
                        1,
                        vocab,
                        &logits,
                        &params,
                        &mut tokens,
                        &mut logprob,
                        &mut kept,
                    )
                    .unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, sampling);
criterion_main!(benches);
