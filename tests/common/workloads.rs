//! One call of every operation on a fixed shape, counted: what the committed tables show.
//!
//! A new operation adds a function here and its line in [`all`].

use super::cuda::{random, random_f32, reports_of, up};
use cuda_emulator::{Emulator, LaunchReport};
use dust_kernels::activation::Activation;
use dust_kernels::adamw::{AdamW, AdamWConfig};
use dust_kernels::attention::{Attention, CHUNK, Heads, PagedBatch, PagedSequence, Segment};
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

/// Runs calls and keeps their reports.
pub struct Counter<'a> {
    emulator: &'a Emulator,
    done: Vec<Workload>,
}

impl Counter<'_> {
    fn call(&mut self, name: String, least_bytes: usize, run: impl FnOnce() -> Result<()>) {
        let reports = reports_of(self.emulator, run);
        self.done.push(Workload {
            name,
            least_bytes,
            reports,
        });
    }
}

/// Every operation.
pub fn all(cuda: &Cuda, emulator: &Emulator) -> Vec<Workload> {
    let mut counter = Counter {
        emulator,
        done: Vec::new(),
    };
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
    counter.done
}

fn bf16s(cuda: &Cuda, n: usize) -> <Cuda as Device>::Buf<bf16> {
    up(cuda, &random(n as u64, n))
}

fn f32s(cuda: &Cuda, n: usize) -> <Cuda as Device>::Buf<f32> {
    up(cuda, &random_f32(n as u64, n))
}

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

const HEADS: Heads = Heads {
    q_heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const HEADS_NAME: &str = "(9 + 3 + 3) heads of 64";

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

fn adamw(cuda: &Cuda, counter: &mut Counter) {
    let len = 1 << 18;
    let grad = f32s(cuda, len);
    let [mut param, mut m, mut v] = [(); 3].map(|()| cuda.zeros(len).unwrap());
    let mut copy = cuda.zeros(len).unwrap();
    let [mut squares, mut norm, mut scale] = [(); 3].map(|()| cuda.zeros(1).unwrap());
    counter.call(format!("sum_of_squares, {len}"), 4 * len, || {
        cuda.sum_of_squares(len, &grad, &mut squares, 0)
    });
    counter.call("clip_scale, 1".into(), 3 * 4, || {
        cuda.clip_scale(1, 1.0, &squares, &mut norm, &mut scale)
    });
    // Gradient, parameter and two moments read; parameter, moments and the copy written.
    let config = AdamWConfig::default();
    counter.call(format!("adamw, {len}"), (4 * 7 + 2) * len + 4, || {
        let copy = Some(&mut copy);
        cuda.adamw(
            &config, len, &scale, &grad, &mut param, &mut m, &mut v, copy,
        )
    });
}

fn attention(cuda: &Cuda, counter: &mut Counter) {
    for head_dim in [64, 128] {
        let h = Heads {
            q_heads: 4,
            kv_heads: 2,
            head_dim,
        };
        let (rows, scale) = (256, (head_dim as f32).sqrt().recip());
        let segments = [Segment {
            len: rows as u32,
            ..Segment::default()
        }];
        let (packed, values, lines) =
            (rows * h.qkv_width(), rows * h.out_width(), rows * h.q_heads);
        let (qkv, dout) = (bf16s(cuda, packed), bf16s(cuda, values));
        let (mut out, mut lse) = (cuda.zeros(values).unwrap(), cuda.zeros(lines).unwrap());
        let (mut delta, mut dqkv) = (cuda.zeros(lines).unwrap(), cuda.zeros(packed).unwrap());
        let size = format!("(4 + 2 + 2) heads of {head_dim}");
        let least = 2 * (packed + values) + 4 * lines;
        counter.call(format!("attention, {rows} x {size}"), least, || {
            cuda.attention(rows, h, scale, &segments, &qkv, &mut out, &mut lse)
        });
        let least = 2 * (2 * packed + 2 * values) + 4 * lines;
        counter.call(
            format!("attention_backward, {rows} x {size}"),
            least,
            || {
                cuda.attention_backward(
                    rows, h, scale, &segments, &qkv, &out, &lse, &dout, &mut delta, &mut dqkv,
                )
            },
        );

        let (count, context) = (4, 192);
        let cached = count * context * h.kv_width();
        let (mut k, mut v) = (bf16s(cuda, cached), bf16s(cuda, cached));
        let slots: Vec<u32> = (0..rows as u32).collect();
        let slots = up(cuda, &slots);
        let least = 2 * 2 * 2 * rows * h.kv_width() + 4 * rows;
        counter.call(format!("cache_write, {rows} x {size}"), least, || {
            cuda.cache_write(rows, h, &qkv, &slots, &mut k, &mut v)
        });
        let pages: Vec<u32> = (0..(cached / h.kv_width() / CHUNK) as u32).collect();
        let pages = up(cuda, &pages);
        for q_len in [1, 64] {
            let sequence = |i: usize| PagedSequence {
                q_start: (i * q_len) as u32,
                q_len: q_len as u32,
                context: context as u32,
                first_page: (i * context / CHUNK) as u32,
            };
            let sequences: Vec<PagedSequence> = (0..count).map(sequence).collect();
            let batch = PagedBatch {
                sequences: &up(cuda, &sequences),
                count,
                rows: count * q_len,
                max_q_len: q_len,
                max_context: context,
                pages: &pages,
            };
            let name = format!("attention_paged, {count} x {q_len} of {context} x {size}");
            let least = 2 * 2 * cached + 2 * 2 * count * q_len * h.out_width();
            counter.call(name, least, || {
                cuda.attention_paged(h, scale, batch, &qkv, &k, &v, &mut out)
            });
        }
    }
}

fn gemm(cuda: &Cuda, counter: &mut Counter) {
    for rows in [256, 8] {
        let (inputs, outputs) = (512, 512);
        let shape = LinearShape {
            rows,
            inputs,
            outputs,
        };
        let (x, dy) = (bf16s(cuda, rows * inputs), bf16s(cuda, rows * outputs));
        let (w, bias) = (bf16s(cuda, inputs * outputs), f32s(cuda, outputs));
        let (mut y, mut dx) = (
            up(cuda, &random(1, rows * outputs)),
            up(cuda, &random(2, rows * inputs)),
        );
        let size = format!("{rows} x {inputs} to {outputs}");
        let (ins, outs, weights) = (rows * inputs, rows * outputs, inputs * outputs);
        let least = 2 * (ins + outs + weights);
        counter.call(format!("linear, {size}"), least + 4 * outputs, || {
            cuda.linear(shape, &x, Weight::Bf16(&w), Some(&bias), &mut y)
        });
        counter.call(format!("linear_dx, {size}"), least, || {
            cuda.linear_dx(shape, &dy, Weight::Bf16(&w), &mut dx)
        });
        if rows < 256 {
            continue;
        }
        let (mut dw, mut dbias) = (f32s(cuda, weights), f32s(cuda, outputs));
        counter.call(
            format!("linear_dw, {size}"),
            2 * (ins + outs) + 8 * weights,
            || cuda.linear_dw(shape, &x, &dy, &mut dw),
        );
        counter.call(
            format!("linear_dbias, {size}"),
            2 * outs + 8 * outputs,
            || cuda.linear_dbias(shape, &dy, &mut dbias),
        );
    }
}

fn grpo(cuda: &Cuda, counter: &mut Counter) {
    let (groups, size) = (1024, 8);
    let rewards = f32s(cuda, groups * size);
    let mut advantages = cuda.zeros(groups * size).unwrap();
    let least = 2 * 4 * groups * size;
    counter.call(format!("advantages, {groups} x {size}"), least, || {
        cuda.advantages(
            groups,
            size,
            AdvantageConfig::default(),
            &rewards,
            &mut advantages,
        )
    });
    let (sequences, length) = (64, 256);
    let tokens = sequences * length;
    let offsets: Vec<u32> = (0..=sequences).map(|s| (s * length) as u32).collect();
    let (offsets, weights) = (up(cuda, &offsets), f32s(cuda, sequences));
    let [new, old, reference] = [0, 1, 2].map(|seed| up(cuda, &random_f32(seed, tokens)));
    let mut dlogprob = cuda.zeros(tokens).unwrap();
    let mut stats = cuda.zeros(sequences).unwrap();
    let config = GrpoConfig {
        kl_coef: 0.001,
        ..GrpoConfig::default()
    };
    let least = 4 * 4 * tokens + (4 + 4 + 4 + 32) * sequences;
    counter.call(format!("grpo_loss, {sequences} x {length}"), least, || {
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
            &mut dlogprob,
            &mut stats,
        )
    });
}

fn logprob(cuda: &Cuda, counter: &mut Counter) {
    let shape = HeadShape {
        rows: 256,
        hidden: 256,
        vocab: 1024,
    };
    let HeadShape {
        rows,
        hidden,
        vocab,
    } = shape;
    let (x, head) = (bf16s(cuda, rows * hidden), bf16s(cuda, vocab * hidden));
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 1024).collect();
    let (targets, dlogprob) = (up(cuda, &targets), f32s(cuda, rows));
    let [mut logprob, mut lse, mut entropy] = [(); 3].map(|()| cuda.zeros(rows).unwrap());
    let (mut dx, mut dhead) = (
        cuda.zeros(rows * hidden).unwrap(),
        f32s(cuda, vocab * hidden),
    );
    let size = |rows| format!("{rows} x {hidden} to {vocab}");
    let least = 2 * hidden * (rows + vocab) + 4 * 4 * rows;
    let weight = Weight::Bf16(&head);
    counter.call(format!("logprob, {}", size(rows)), least, || {
        cuda.logprob(
            shape,
            1.0,
            &x,
            weight,
            &targets,
            &mut logprob,
            &mut lse,
            &mut entropy,
        )
    });
    let least = 2 * hidden * (2 * rows + vocab) + 8 * hidden * vocab + 12 * rows;
    counter.call(format!("logprob_backward, {}", size(rows)), least, || {
        let dhead = Some(&mut dhead);
        cuda.logprob_backward(
            shape, 1.0, &x, weight, &targets, &lse, &dlogprob, &mut dx, dhead,
        )
    });
    for rows in [128, 4] {
        let shape = HeadShape { rows, ..shape };
        let mut logits = cuda.zeros(rows * vocab).unwrap();
        let least = 2 * hidden * (rows + vocab) + 4 * rows * vocab;
        counter.call(format!("logits, {}", size(rows)), least, || {
            cuda.logits(shape, &x, weight, &mut logits)
        });
    }
}

fn ranking(cuda: &Cuda, counter: &mut Counter) {
    let (lists, items) = (1024, 8);
    let n = lists * items;
    let order: Vec<u32> = (0..n)
        .map(|i| ((i % items + i / items) % items) as u32)
        .collect();
    let labels: Vec<f32> = (0..n).map(|i| (i % 3 % 2) as f32).collect();
    let (order, labels, scores) = (up(cuda, &order), up(cuda, &labels), f32s(cuda, n));
    let (mut each, mut dscores) = (cuda.zeros(lists).unwrap(), cuda.zeros(n).unwrap());
    let size = format!("{lists} x {items}");
    let kind = RankingReward::PairwiseAccuracy;
    counter.call(
        format!("ranking_reward, {size}"),
        4 * (2 * n + lists),
        || cuda.ranking_reward(lists, items, kind, -1.0, &order, &labels, &mut each),
    );
    let least = 4 * (3 * n + lists);
    counter.call(format!("plackett_luce_loss, {size}"), least, || {
        cuda.plackett_luce_loss(lists, items, 1.0, &scores, &order, &mut each, &mut dscores)
    });
    counter.call(format!("pairwise_logistic_loss, {size}"), least, || {
        cuda.pairwise_logistic_loss(lists, items, 1.0, &scores, &labels, &mut each, &mut dscores)
    });
}

fn sampling(cuda: &Cuda, counter: &mut Counter) {
    let (rows, vocab) = (4, 16384);
    let logits = f32s(cuda, rows * vocab);
    let mut tokens = cuda.zeros(rows).unwrap();
    let (mut logprob, mut kept) = (cuda.zeros(rows).unwrap(), cuda.zeros(rows).unwrap());
    let filtered = RowSampling {
        top_p: 0.95,
        top_k: 50,
        ..RowSampling::default()
    };
    for (name, row) in [
        ("plain", RowSampling::default()),
        ("top-k, top-p", filtered),
    ] {
        let params = up(cuda, &vec![row; rows]);
        let least = 4 * rows * vocab + (32 + 12) * rows;
        counter.call(format!("sample, {rows} x {vocab}, {name}"), least, || {
            cuda.sample(
                rows,
                vocab,
                &logits,
                &params,
                &mut tokens,
                &mut logprob,
                &mut kept,
            )
        });
    }
}
