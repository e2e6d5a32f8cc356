//! Attention and its gradient by the definition, shapes to try, and the building of paged calls.
//! Included by the tests of both back ends.

use dust_kernels::attention::{Attention, Heads, PAGE, PagedBatch, PagedSequence, Segment};
use dust_kernels::{Device, Float};

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

/// A key/value cache with scattered pages, full of NaN where nothing was written.
pub struct Cache<'a, D: Device> {
    device: &'a D,
    heads: Heads,
    k: D::Buf<D::Elem>,
    v: D::Buf<D::Elem>,
    pages: Vec<u32>,
    per_sequence: usize,
}

impl<'a, D: Device + Attention> Cache<'a, D> {
    pub fn new(device: &'a D, heads: Heads, sequences: usize, tokens: usize) -> Self {
        let per_sequence = tokens.div_ceil(PAGE);
        let count = sequences * per_sequence;
        let stale = vec![D::Elem::from_f32(f32::NAN); count * PAGE * heads.kv_width()];
        Self {
            device,
            heads,
            k: device.upload(&stale).unwrap(),
            v: device.upload(&stale).unwrap(),
            // Page numbers backwards, so that no sequence's pages are in order.
            pages: (0..count as u32).rev().collect(),
            per_sequence,
        }
    }

    /// Writes rows of a call and attends: `(sequence, first token, tokens)` one after the other,
    /// in a call that has room for `spare` more of everything.
    pub fn call(
        &mut self,
        calls: &[(usize, usize, usize)],
        qkv: &[D::Elem],
        spare: usize,
    ) -> Vec<D::Elem> {
        let (device, h) = (self.device, self.heads);
        let mut slots = Vec::new();
        let mut sequences = Vec::new();
        for &(sequence, first, len) in calls {
            let first_page = sequence * self.per_sequence;
            sequences.push(PagedSequence {
                q_start: slots.len() as u32,
                q_len: len as u32,
                context: (first + len) as u32,
                first_page: first_page as u32,
            });
            slots.extend((first..first + len).map(|token| {
                self.pages[first_page + token / PAGE] * PAGE as u32 + (token % PAGE) as u32
            }));
        }
        let most = |of: fn(&PagedSequence) -> u32| sequences.iter().map(of).max().unwrap() as usize;
        let (max_q_len, max_context) = (most(|s| s.q_len), most(|s| s.context));
        let rows = slots.len();
        // Sequences without queries, which a batch that is not full ends in.
        sequences.resize(sequences.len() + spare, PagedSequence::default());
        let batch = PagedBatch {
            sequences: &device.upload(&sequences).unwrap(),
            count: sequences.len(),
            rows,
            max_q_len: max_q_len + spare,
            max_context: max_context + PAGE * spare,
            pages: &device.upload(&self.pages).unwrap(),
        };
        let qkv = device.upload(qkv).unwrap();
        let slots = device.upload(&slots).unwrap();
        device
            .cache_write(rows, h, &qkv, &slots, &mut self.k, &mut self.v)
            .unwrap();
        let mut out = device.zeros(rows * h.out_width()).unwrap();
        device
            .attention_paged(h, scale(h), batch, &qkv, &self.k, &self.v, &mut out)
            .unwrap();
        device.download(&out).unwrap()
    }
}
