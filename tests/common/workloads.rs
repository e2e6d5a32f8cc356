//! One call of every operation on a fixed shape: what the committed tables count and the benchmark
//! of the CUDA back end times.
//!
//! A new operation adds a function here and its line in [`each`].
#![allow(dead_code)] // the benchmark counts nothing

use super::cuda::{random, random_f32, reports_of, up};
use cuda_emulator::{Emulator, LaunchReport};
use dust_kernels::activation::Activation;
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::attention::{Attention, Heads, PAGE, PagedBatch, PagedSequence, Segment};
use dust_kernels::embedding::Embedding;
use dust_kernels::gemm::{Gemm, LinearShape};
use dust_kernels::grpo::{AdvantageConfig, Grpo, GrpoConfig};
use dust_kernels::logprob::{HeadShape, Logprob};
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::ranking::{Ranking, RankingReward};
use dust_kernels::rope::Rope;
use dust_kernels::sampling::{RowSampling, Sampling};
use dust_kernels::{Cuda, Device, Result, Weight};
use half::bf16;

/// A call that was counted.
pub struct Workload {
    /// The operation and its shape.
    pub name: String,
    /// Bytes that any implementation must load and store.
    pub least_bytes: usize,
    /// Its launches.
    pub reports: Vec<LaunchReport>,
}

/// What is done with a call: its name, its least bytes, and the call, which may be repeated.
type Visit<'a> = &'a mut dyn FnMut(String, usize, &mut dyn FnMut() -> Result<()>);

/// Hands out calls.
pub struct Counter<'a> {
    visit: Visit<'a>,
}

impl Counter<'_> {
    fn call(&mut self, name: String, least_bytes: usize, mut run: impl FnMut() -> Result<()>) {
        (self.visit)(name, least_bytes, &mut run);
    }
}

/// Every operation, run once and counted.
pub fn all(cuda: &Cuda, emulator: &Emulator) -> Vec<Workload> {
    let mut done = Vec::new();
    each(cuda, &mut |name, least_bytes, run| {
        let reports = reports_of(emulator, run);
        done.push(Workload {
            name,
            least_bytes,
            reports,
        });
    });
    done
}

/// Every operation.
pub fn each(cuda: &Cuda, visit: Visit<'_>) {
    let mut counter = Counter { visit };
    activation(cuda, &mut counter);
    adamw(cuda, &mut counter);
    attention(cuda, &mut counter);
    embedding(cuda, &mut counter);
    gemm(cuda, &mut counter);
    grpo(cuda, &mut counter);
    logprob(cuda, &mut counter);
    norm(cuda, &mut counter);
    ranking(cuda, &mut counter);
    rope(cuda, &mut counter);
    sampling(cuda, &mut counter);
}

fn bf16s(cuda: &Cuda, n: usize) -> <Cuda as Device>::Buf<bf16> {
    up(cuda, &random(n as u64, n))
}

fn f32s(cuda: &Cuda, n: usize) -> <Cuda as Device>::Buf<f32> {
    up(cuda, &random_f32(n as u64, n))
}

const HEADS: Heads = Heads {
    q_heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const HEADS_NAME: &str = "(9 + 3 + 3) heads of 64";

fn activation(cuda: &Cuda, counter: &mut Counter) {
    let (rows, width) = (256, 1536);
    let n = rows * width;
    let (gate_up, dout) = (bf16s(cuda, 2 * n), bf16s(cuda, n));
    let (mut out, mut d) = (cuda.zeros(n).unwrap(), cuda.zeros(2 * n).unwrap());
    let shape = format!("{rows} x {width}");
    counter.call(format!("swiglu, {shape}"), 3 * 2 * n, || {
        cuda.swiglu(rows, width, &gate_up, &mut out)
    });
    counter.call(format!("swiglu_backward, {shape}"), 5 * 2 * n, || {
        cuda.swiglu_backward(rows, width, &gate_up, &dout, &mut d)
    });
}

fn adamw(cuda: &Cuda, counter: &mut Counter) {
    let n = 256 * 1024;
    let (grad, mut param) = (f32s(cuda, n), f32s(cuda, n));
    let [mut m, mut v] = [(); 2].map(|()| cuda.zeros(n).unwrap());
    let mut copy = cuda.zeros(n).unwrap();
    let (mut norm, mut scale) = (cuda.zeros(1).unwrap(), up(cuda, &[1f32]));
    let mut squares = cuda.zeros(1).unwrap();
    counter.call(format!("sum_of_squares, {n}"), 4 * n + 4, || {
        cuda.sum_of_squares(n, &grad, &mut squares, 0)
    });
    counter.call("clip_scale, 1".into(), 3 * 4, || {
        cuda.clip_scale(1, 1.0, &squares, &mut norm, &mut scale)
    });
    let config = AdamWConfig::default();
    let least = (4 * 4 + 3 * 4 + 2) * n + 4;
    counter.call(format!("adamw, {n}"), least, || {
        let copy = Some(&mut copy);
        cuda.adamw(&config, n, &scale, &grad, &mut param, &mut m, &mut v, copy)
    });
}

fn attention(cuda: &Cuda, counter: &mut Counter) {
    let wide = Heads {
        q_heads: 4,
        kv_heads: 2,
        head_dim: 128,
    };
    // Qwen2.5-0.5B's.
    let grouped = Heads {
        q_heads: 14,
        kv_heads: 2,
        head_dim: 64,
    };
    for (h, name) in [
        (HEADS, HEADS_NAME),
        (grouped, "(14 + 2 + 2) heads of 64"),
        (wide, "(4 + 2 + 2) heads of 128"),
    ] {
        let scale = 1.0 / (h.head_dim as f32).sqrt();
        // A prompt of 128 tokens and two answers of 64.
        let (rows, lines) = (256, 256 * h.q_heads);
        let answer = |start| Segment {
            start,
            len: 64,
            prefix_start: 0,
            prefix_len: 128,
        };
        let prompt = Segment {
            len: 128,
            ..Segment::default()
        };
        let segments = [prompt, answer(128), answer(192)];
        let (inputs, outputs) = (rows * h.qkv_width(), rows * h.out_width());
        let (qkv, dout) = (bf16s(cuda, inputs), bf16s(cuda, outputs));
        let mut out = cuda.zeros(outputs).unwrap();
        let [mut lse, mut delta] = [(); 2].map(|()| cuda.zeros(lines).unwrap());
        let mut dqkv = cuda.zeros(inputs).unwrap();
        let least = 2 * (inputs + outputs) + 4 * lines;
        counter.call(format!("attention, {rows} x {name}"), least, || {
            cuda.attention(rows, h, scale, &segments, &qkv, &mut out, &mut lse)
        });
        let least = 2 * (2 * inputs + 2 * outputs) + 4 * lines;
        counter.call(
            format!("attention_backward, {rows} x {name}"),
            least,
            || {
                cuda.attention_backward(
                    rows, h, scale, &segments, &qkv, &out, &lse, &dout, &mut delta, &mut dqkv,
                )
            },
        );

        let (sequences, context) = (4, 512);
        let pages = sequences * context / PAGE;
        let cached = sequences * context * h.kv_width();
        let [mut k, mut v] = [(); 2].map(|()| bf16s(cuda, cached));
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        let slots: Vec<u32> = (0..rows as u32).collect();
        let (table, slots) = (up(cuda, &table), up(cuda, &slots));
        let least = rows * (4 + 2 * 2 * 2 * h.kv_width());
        counter.call(format!("cache_write, {rows} x {name}"), least, || {
            cuda.cache_write(rows, h, &qkv, &slots, &mut k, &mut v)
        });
        for (what, q_len) in [("prefill", 32), ("decode", 1)] {
            let sequence = |i| PagedSequence {
                q_start: (i * q_len) as u32,
                q_len: q_len as u32,
                context: context as u32,
                first_page: (i * context / PAGE) as u32,
            };
            let list: Vec<_> = (0..sequences).map(sequence).collect();
            let batch = PagedBatch {
                sequences: &up(cuda, &list),
                count: sequences,
                rows: sequences * q_len,
                max_q_len: q_len,
                max_context: context,
                pages: &table,
            };
            let call =
                format!("attention_paged, {what}, {sequences} x {q_len} of {context} x {name}");
            let least = 2 * (2 * cached + 2 * batch.rows * h.out_width());
            counter.call(call, least, || {
                cuda.attention_paged(h, scale, batch, &qkv, &k, &v, &mut out)
            });
        }
    }
}

fn embedding(cuda: &Cuda, counter: &mut Counter) {
    let (rows, width, vocab) = (1024, 2048, 1500);
    let n = rows * width;
    // 7 and 1500 have no common factor, so that the tokens below are all different.
    let tokens: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
    let (tokens, table) = (up(cuda, &tokens), bf16s(cuda, vocab * width));
    let (mut out, dout) = (cuda.zeros(n).unwrap(), bf16s(cuda, n));
    let shape = format!("{rows} x {width} of {vocab}");
    counter.call(format!("embed, {shape}"), 2 * 2 * n + 4 * rows, || {
        cuda.embed(rows, width, &tokens, Weight::Bf16(&table), &mut out)
    });
    let mut sums = cuda.zeros::<f32>(vocab * width).unwrap();
    let least = (2 + 8) * n + 4 * rows;
    counter.call(format!("embed_backward, {shape}"), least, || {
        cuda.embed_backward(rows, width, &tokens, &dout, &mut sums)
    });
    let mut sums = cuda.zeros::<bf16>(vocab * width).unwrap();
    let least = (2 + 4) * n + 4 * rows;
    counter.call(format!("scatter_add_rows, {shape}"), least, || {
        cuda.scatter_add_rows(rows, width, &tokens, &dout, &mut sums)
    });
}

fn gemm(cuda: &Cuda, counter: &mut Counter) {
    let (inputs, outputs) = (512, 256);
    let weights = inputs * outputs;
    let w = bf16s(cuda, weights);
    let weight = Weight::Bf16(&w);
    // Training, and decoding of many and of few.
    for rows in [256, 64, 8] {
        let shape = LinearShape {
            rows,
            inputs,
            outputs,
        };
        let (x, dy) = (bf16s(cuda, rows * inputs), bf16s(cuda, rows * outputs));
        let mut y = cuda.zeros(rows * outputs).unwrap();
        let mut dx = cuda.zeros(rows * inputs).unwrap();
        let least = 2 * (weights + rows * (inputs + outputs));
        let size = format!("{rows} x {inputs} -> {outputs}");
        counter.call(format!("linear, {size}"), least, || {
            cuda.linear(shape, &x, weight, None, &mut y)
        });
        counter.call(format!("linear_dx, {size}"), least, || {
            cuda.linear_dx(shape, &dy, weight, &mut dx)
        });
        if rows < 256 {
            continue;
        }
        let mut dw = cuda.zeros(weights).unwrap();
        let least = 2 * rows * (inputs + outputs) + 8 * weights;
        counter.call(format!("linear_dw, {size}"), least, || {
            cuda.linear_dw(shape, &x, &dy, &mut dw)
        });
        let mut dbias = cuda.zeros(outputs).unwrap();
        let least = 2 * rows * outputs + 8 * outputs;
        counter.call(format!("linear_dbias, {size}"), least, || {
            cuda.linear_dbias(shape, &dy, &mut dbias)
        });
    }
}

fn grpo(cuda: &Cuda, counter: &mut Counter) {
    let (groups, size) = (256, 64);
    let n = groups * size;
    let (rewards, mut advantages) = (f32s(cuda, n), cuda.zeros(n).unwrap());
    counter.call(format!("advantages, {groups} x {size}"), 8 * n, || {
        let config = AdvantageConfig::default();
        cuda.advantages(groups, size, config, &rewards, &mut advantages)
    });
    let (sequences, length) = (16, 1024);
    let tokens = sequences * length;
    let offsets: Vec<u32> = (0..=sequences).map(|s| (s * length) as u32).collect();
    let offsets = up(cuda, &offsets);
    let weights = f32s(cuda, sequences);
    let (new, old, reference) = (f32s(cuda, tokens), f32s(cuda, tokens), f32s(cuda, tokens));
    let mut d = cuda.zeros(tokens).unwrap();
    let mut stats = cuda.zeros(sequences).unwrap();
    let config = GrpoConfig {
        kl_coef: 0.1,
        ..Default::default()
    };
    let least = 16 * tokens + 4 + sequences * (3 * 4 + 32);
    let name = format!("grpo_loss, {sequences} x {length} tokens");
    counter.call(name, least, || {
        cuda.grpo_loss(
            &config,
            sequences,
            tokens,
            &offsets,
            &weights,
            &advantages,
            &new,
            &old,
            Some(&reference),
            &mut d,
            &mut stats,
        )
    });
}

fn logprob(cuda: &Cuda, counter: &mut Counter) {
    let (hidden, vocab) = (512, 1000);
    let weights = vocab * hidden;
    let head = bf16s(cuda, weights);
    let head = Weight::Bf16(&head);
    let shape = |rows| HeadShape {
        rows,
        hidden,
        vocab,
    };
    let rows = 128;
    let size = format!("{rows} x {hidden} -> {vocab}");
    let x = bf16s(cuda, rows * hidden);
    let targets: Vec<u32> = (0..rows as u32).collect();
    let (targets, dlogprob) = (up(cuda, &targets), f32s(cuda, rows));
    let [mut logprob, mut lse, mut entropy] = [(); 3].map(|()| cuda.zeros(rows).unwrap());
    let least = 2 * (weights + rows * hidden) + 4 * 4 * rows;
    counter.call(format!("logprob, {size}"), least, || {
        cuda.logprob(
            shape(rows),
            1.0,
            &x,
            head,
            &targets,
            &mut logprob,
            &mut lse,
            &mut entropy,
        )
    });
    let mut dx = cuda.zeros(rows * hidden).unwrap();
    let mut dhead = cuda.zeros(weights).unwrap();
    let least = (2 + 8) * weights + 2 * 2 * rows * hidden + 3 * 4 * rows;
    counter.call(format!("logprob_backward, {size}"), least, || {
        cuda.logprob_backward(
            shape(rows),
            1.0,
            &x,
            head,
            &targets,
            &lse,
            &dlogprob,
            &mut dx,
            Some(&mut dhead),
        )
    });
    for rows in [128, 64, 8] {
        let mut logits = cuda.zeros(rows * vocab).unwrap();
        let least = 2 * (weights + rows * hidden) + 4 * rows * vocab;
        counter.call(
            format!("logits, {rows} x {hidden} -> {vocab}"),
            least,
            || cuda.logits(shape(rows), &x, head, &mut logits),
        );
    }
}

fn norm(cuda: &Cuda, counter: &mut Counter) {
    for (rows, width) in [(4096, 576), (3072, 2048)] {
        let shape = NormShape { rows, width };
        let n = rows * width;
        let (x, dy, w) = (bf16s(cuda, n), bf16s(cuda, n), f32s(cuda, width));
        let [mut y, mut sum, mut dx] = [(); 3].map(|()| cuda.zeros(n).unwrap());
        let (mut rstd, mut dweight) = (cuda.zeros(rows).unwrap(), cuda.zeros(width).unwrap());
        let once = 4 * (width + rows);
        let size = format!("{rows} x {width}");
        counter.call(format!("rms_norm, {size}"), 2 * 2 * n + once, || {
            cuda.rms_norm(shape, 1e-5, &x, &w, &mut y, &mut rstd)
        });
        counter.call(format!("add_rms_norm, {size}"), 4 * 2 * n + once, || {
            cuda.add_rms_norm(shape, 1e-5, &x, &dy, &w, &mut sum, &mut y, &mut rstd)
        });
        let least = 4 * 2 * n + once + 2 * 4 * width;
        counter.call(format!("rms_norm_backward, {size}"), least, || {
            cuda.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
        });
    }
    let h = HEADS;
    let rows = 1024;
    let n = rows * h.qkv_width();
    let normed = rows * (h.q_heads + h.kv_heads);
    let (qkv, mut dqkv) = (bf16s(cuda, n), bf16s(cuda, n));
    let (q, k) = (f32s(cuda, h.head_dim), f32s(cuda, h.head_dim));
    let (mut out, mut rstd) = (cuda.zeros(n).unwrap(), cuda.zeros(normed).unwrap());
    let [mut dq, mut dk] = [(); 2].map(|()| cuda.zeros(h.head_dim).unwrap());
    let once = 4 * (normed + 2 * h.head_dim);
    counter.call(
        format!("qk_norm, {rows} x {HEADS_NAME}"),
        2 * 2 * n + once,
        || cuda.qk_norm(rows, h, 1e-5, &qkv, &q, &k, &mut out, &mut rstd),
    );
    let least = 3 * 2 * h.head_dim * normed + once + 2 * 4 * 2 * h.head_dim;
    counter.call(
        format!("qk_norm_backward, {rows} x {HEADS_NAME}"),
        least,
        || cuda.qk_norm_backward(rows, h, &qkv, &q, &k, &rstd, &mut dqkv, &mut dq, &mut dk),
    );
}

fn ranking(cuda: &Cuda, counter: &mut Counter) {
    let (lists, items) = (64, 64);
    let n = lists * items;
    // 37 and 64 have no common factor: each list is a permutation.
    let order: Vec<u32> = (0..n).map(|i| (i * 37 % items) as u32).collect();
    let labels: Vec<f32> = (0..n).map(|i| (i % 3 == 0) as u32 as f32).collect();
    let (order, labels, scores) = (up(cuda, &order), up(cuda, &labels), f32s(cuda, n));
    let (mut one, mut d) = (cuda.zeros(lists).unwrap(), cuda.zeros(n).unwrap());
    let shape = format!("{lists} x {items}");
    let least = 8 * n + 4 * lists;
    counter.call(format!("ranking_reward (NDCG), {shape}"), least, || {
        let kind = RankingReward::Ndcg;
        cuda.ranking_reward(lists, items, kind, 0.0, &order, &labels, &mut one)
    });
    let least = 12 * n + 4 * lists;
    counter.call(format!("plackett_luce_loss, {shape}"), least, || {
        cuda.plackett_luce_loss(lists, items, 1.0, &scores, &order, &mut one, &mut d)
    });
    counter.call(format!("pairwise_logistic_loss, {shape}"), least, || {
        cuda.pairwise_logistic_loss(lists, items, 1.0, &scores, &labels, &mut one, &mut d)
    });
}

fn rope(cuda: &Cuda, counter: &mut Counter) {
    let rows = 1024;
    let positions: Vec<u32> = (0..rows as u32).collect();
    let positions = up(cuda, &positions);
    let (cos, sin) = (f32s(cuda, rows * 32), f32s(cuda, rows * 32));
    let mut qkv = bf16s(cuda, rows * HEADS.qkv_width());
    let least = rows * (2 * 2 * HEADS.v_offset() + 4 + 2 * 4 * 32);
    counter.call(format!("rope, {rows} x {HEADS_NAME}"), least, || {
        cuda.rope(rows, HEADS, &positions, &cos, &sin, false, &mut qkv)
    });
}

/// Logits of rows whose probabilities follow Zipf's law with exponent 1.5, as a language model's do
/// roughly: 0.95 of the mass is on some 240 tokens.
pub fn zipf(rows: usize, vocab: usize) -> Vec<f32> {
    let rank = |i: usize| 1 + i % vocab * 100_003 % vocab;
    (0..rows * vocab)
        .map(|i| -1.5 * (rank(i) as f32).ln())
        .collect()
}

fn sampling(cuda: &Cuda, counter: &mut Counter) {
    // Qwen's vocabulary.
    let (rows, vocab) = (4, 151_936);
    let (zipf, flat) = (up(cuda, &zipf(rows, vocab)), f32s(cuda, rows * vocab));
    let plain = RowSampling::default();
    let top_p = RowSampling {
        top_p: 0.95,
        ..plain
    };
    let both = RowSampling { top_k: 20, ..top_p };
    for (name, params, logits) in [
        ("plain", plain, &zipf),
        ("top-k 20 and top-p 0.95", both, &zipf),
        ("top-p 0.95", top_p, &zipf),
        ("top-p 0.95 of flat rows", top_p, &flat),
    ] {
        let params = up(cuda, &[params; 4]);
        let mut tokens = cuda.zeros(rows).unwrap();
        let [mut logprob, mut kept] = [(); 2].map(|()| cuda.zeros(rows).unwrap());
        let least = rows * (4 * vocab + 32 + 12);
        counter.call(format!("sample, {name}, {rows} x {vocab}"), least, || {
            cuda.sample(
                rows,
                vocab,
                logits,
                &params,
                &mut tokens,
                &mut logprob,
                &mut kept,
            )
        });
    }
}
