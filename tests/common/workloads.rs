//! One call of every operation on a fixed shape, counted: what the committed tables show.
//!
//! A new operation adds a function here and its line in [`all`].

use super::cuda::{random, random_f32, reports_of, up};
use cuda_emulator::{Emulator, LaunchReport};
use dust_kernels::activation::Activation;
use dust_kernels::attention::Heads;
use dust_kernels::embedding::Embedding;
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::rope::Rope;
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
    embedding(cuda, &mut counter);
    norm(cuda, &mut counter);
    rope(cuda, &mut counter);
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
    for (rows, width) in [(4096, 576), (1024, 2048)] {
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
