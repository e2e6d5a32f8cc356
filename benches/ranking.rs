//! Rewards and losses of 1024 rankings of 8 items.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dust_kernels::ranking::{Ranking, RankingReward};
use dust_kernels::{Cpu, Device};

fn ranking(c: &mut Criterion) {
    let cpu = Cpu::new();
    let (lists, items) = (1024, 8);
    let order: Vec<u32> = (0..lists * items).map(|i| (i * 3 % items) as u32).collect();
    let order = cpu.upload(&order).unwrap();
    let labels: Vec<f32> = (0..lists * items)
        .map(|i| (i % 3 == 0) as u8 as f32)
        .collect();
    let labels = cpu.upload(&labels).unwrap();
    let scores: Vec<f32> = (0..lists * items).map(|i| (i % 11) as f32 * 0.3).collect();
    let scores = cpu.upload(&scores).unwrap();
    let mut out = cpu.zeros(lists).unwrap();
    let mut dscores = cpu.zeros(lists * items).unwrap();
    let mut group = c.benchmark_group("ranking");
    group.throughput(Throughput::Elements(lists as u64));
    group.bench_function("ndcg/1024x8", |b| {
        let kind = RankingReward::Ndcg;
        b.iter(|| {
            cpu.ranking_reward(lists, items, kind, 0.0, &order, &labels, &mut out)
                .unwrap()
        });
    });
    group.bench_function("plackett_luce/1024x8", |b| {
        b.iter(|| {
            cpu.plackett_luce_loss(lists, items, 1.0, &scores, &order, &mut out, &mut dscores)
                .unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, ranking);
criterion_main!(benches);
