//! Attention in the shapes of SmolLM2-135M: 9 query heads, 3 key/value heads of 64.
//!
//! Throughput is in floating-point operations for training and prefill (causal half only; the
//! backward pass counts 5 products to the forward's 2), in bytes of cache read for decode.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::attention::{Attention, Heads, PAGE, PagedBatch, PagedSequence, Segment};
use dust_kernels::{Cpu, Device};

const HEADS: Heads = Heads {
    q_heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const SCALE: f32 = 0.125;

/// Values from -1 to 1 without order.
fn values(len: usize) -> Vec<f32> {
    let hash = |i: usize| (i as u32).wrapping_mul(2_654_435_761) >> 8;
    (0..len)
        .map(|i| hash(i) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

fn training(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut group = c.benchmark_group("attention");
    for (sequences, len) in [(1, 512), (4, 512)] {
        let rows = sequences * len;
        let segments: Vec<_> = (0..sequences)
            .map(|i| Segment {
                start: (i * len) as u32,
                len: len as u32,
                ..Segment::default()
            })
            .collect();
        let mut run = || -> dust_kernels::Result<()> {
            let qkv = cpu.upload(&values(rows * HEADS.qkv_width()))?;
            let dout = cpu.upload(&values(rows * HEADS.out_width()))?;
            let mut out = cpu.zeros(rows * HEADS.out_width())?;
            let mut lse = cpu.zeros(rows * HEADS.q_heads)?;
            let mut delta = cpu.zeros(rows * HEADS.q_heads)?;
            let mut dqkv = cpu.zeros(rows * HEADS.qkv_width())?;
            let pairs = sequences * len * (len + 1) / 2 * HEADS.q_heads;
            let product = 2 * pairs * HEADS.head_dim;
            let size = format!("{sequences}x{len}");
            group.throughput(Throughput::Elements(2 * product as u64));
            group.bench_function(format!("forward {size}"), |b| {
                b.iter(|| cpu.attention(rows, HEADS, SCALE, &segments, &qkv, &mut out, &mut lse))
            });
            group.throughput(Throughput::Elements(5 * product as u64));
            group.bench_function(format!("backward {size}"), |b| {
                b.iter(|| {
                    cpu.attention_backward(
                        rows, HEADS, SCALE, &segments, &qkv, &out, &lse, &dout, &mut delta,
                        &mut dqkv,
                    )
                })
            });
            Ok(())
        };
        run().expect("memory for the benchmark");
    }
    group.finish();
}

fn decode(c: &mut Criterion) {
    let cpu = Cpu::new();
    let mut group = c.benchmark_group("attention decode");
    for (batch, context) in [(1, 600), (16, 128), (16, 600)] {
        let per_sequence = usize::div_ceil(context, PAGE);
        let pages = batch * per_sequence;
        let mut run = || -> dust_kernels::Result<()> {
            let k = cpu.upload(&values(pages * PAGE * HEADS.kv_width()))?;
            let v = cpu.upload(&values(pages * PAGE * HEADS.kv_width()))?;
            let table: Vec<u32> = (0..pages as u32).collect();
            let table = cpu.upload(&table)?;
            let qkv = cpu.upload(&values(batch * HEADS.qkv_width()))?;
            let mut out = cpu.zeros(batch * HEADS.out_width())?;
            let sequences: Vec<_> = (0..batch)
                .map(|i| PagedSequence {
                    q_start: i as u32,
                    q_len: 1,
                    context: context as u32,
                    first_page: (i * per_sequence) as u32,
                })
                .collect();
            let sequences = PagedBatch {
                sequences: &cpu.upload(&sequences)?,
                count: batch,
                rows: batch,
                max_q_len: 1,
                max_context: context,
                pages: &table,
            };
            let bytes = batch * context * 2 * HEADS.kv_width() * size_of::<f32>();
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(format!("{batch}x{context}"), |b| {
                b.iter(|| cpu.attention_paged(HEADS, SCALE, sequences, &qkv, &k, &v, &mut out))
            });
            Ok(())
        };
        run().expect("memory for the benchmark");
    }
    group.finish();
}

criterion_group!(benches, training, decode);
criterion_main!(benches);
