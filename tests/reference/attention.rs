//! Attention and its gradient by the definition, and shapes to try. Included by the tests of both
//! back ends.

use dust_kernels::attention::{Heads, Segment};

pub const fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        q_heads,
        kv_heads,
        head_dim,
    }
}

pub fn segment(start: u32, len: u32, prefix_start: u32, prefix_len: u32) -> Segment {
    Segment {
        start,
        len,
        prefix_start,
        prefix_len,
    }
}

pub fn scale(heads: Heads) -> f32 {
    1.0 / (heads.head_dim as f32).sqrt()
}

/// Outputs, log-sum-exps and the gradient of `qkv`.
pub struct Results<T> {
    pub out: Vec<T>,
    pub lse: Vec<T>,
    pub dqkv: Vec<T>,
}

macro_rules! naive {
    ($name:ident, $t:ty) => {
        /// `round` is applied to whatever a computation that stores all it computes would store.
        pub fn $name(
            rows: usize,
            h: Heads,
            segments: &[Segment],
            qkv: &[$t],
            dout: &[$t],
            round: impl Fn($t) -> $t,
        ) -> Results<$t> {
            let (d, width) = (h.head_dim, h.qkv_width());
            let scale = scale(h) as $t;
            let mut results = Results {
                out: vec![0.0; rows * h.out_width()],
                lse: vec![0.0; rows * h.q_heads],
                dqkv: vec![0.0; rows * width],
            };
            let dot = |a: &[$t], b: &[$t]| a.iter().zip(b).map(|(a, b)| a * b).sum::<$t>();
            for segment in segments {
                let start = segment.start as usize;
                let prefix = segment.prefix_start..segment.prefix_start + segment.prefix_len;
                for row in start..start + segment.len as usize {
                    let keys: Vec<usize> = prefix
                        .clone()
                        .map(|r| r as usize)
                        .chain(start..=row)
                        .collect();
                    for head in 0..h.q_heads {
                        let q_at = row * width + head * d;
                        let kv = head / h.group() * d;
                        let k_at = |key: usize| key * width + h.k_offset() + kv;
                        let v_at = |key: usize| key * width + h.v_offset() + kv;
                        let q = &qkv[q_at..q_at + d];
                        let scores: Vec<$t> = keys
                            .iter()
                            .map(|&key| round(scale * dot(q, &qkv[k_at(key)..][..d])))
                            .collect();
                        let max = scores.iter().copied().fold(<$t>::NEG_INFINITY, <$t>::max);
                        let sum: $t = scores.iter().map(|s| (s - max).exp()).sum();
                        let line = row * h.q_heads + head;
                        results.lse[line] = max + sum.ln();
                        let p: Vec<$t> = scores
                            .iter()
                            .map(|s| round((s - max).exp() / sum))
                            .collect();
                        let out = &mut results.out[line * d..][..d];
                        for (p, &key) in p.iter().zip(&keys) {
                            for (out, v) in out.iter_mut().zip(&qkv[v_at(key)..][..d]) {
                                *out += p * v;
                            }
                        }
                        out.iter_mut().for_each(|x| *x = round(*x));
                        let dout = &dout[line * d..][..d];
                        let delta = dot(dout, out);
                        for (p, &key) in p.iter().zip(&keys) {
                            let dp = round(dot(dout, &qkv[v_at(key)..][..d]));
                            let ds = round(scale * p * (dp - delta));
                            for i in 0..d {
                                results.dqkv[q_at + i] += ds * qkv[k_at(key) + i];
                                results.dqkv[k_at(key) + i] += ds * qkv[q_at + i];
                                results.dqkv[v_at(key) + i] += p * dout[i];
                            }
                        }
                    }
                }
            }
            results.dqkv.iter_mut().for_each(|x| *x = round(*x));
            results
        }
    };
}
naive!(naive_f64, f64);
naive!(naive_f32, f32);
