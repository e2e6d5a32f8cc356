//! Sampling: one pass of exponentials a row, then a draw by the inverse of the cumulative
//! distribution in the order of tokens.

mod filter;
mod philox;
mod softmax;

use super::Cpu;
use super::logprob::BLOCK;
use super::pool::SharedMut;
use super::simd::Level;
use crate::Result;
use crate::sampling::{RowSampling, Sampling, check_sample};
use softmax::{Row, mass};

/// What a row becomes.
struct Sample {
    token: u32,
    logprob: f32,
    kept: f32,
}

/// The answer to a row that cannot be sampled.
const REPORT: Sample = Sample {
    token: u32::MAX,
    logprob: f32::NAN,
    kept: 0.0,
};

fn are_valid(params: &RowSampling) -> bool {
    (0.0..f32::INFINITY).contains(&params.temperature)
        && !params.top_p.is_nan()
        && !params.min_p.is_nan()
}

fn sample_row(level: Level, logits: &[f32], params: &RowSampling) -> Sample {
    let greedy = params.temperature == 0.0;
    let inverse = if greedy {
        1.0
    } else {
        1.0 / params.temperature
    };
    let row = match Row::new(level, logits, inverse) {
        Some(row) if are_valid(params) => row,
        _ => return REPORT,
    };
    let u = philox::uniform(params.seed, params.sequence, params.position);
    let mut share = 1.0;
    let token = if greedy {
        first_greatest(&row)
    } else if filter::is_on(params, logits.len()) {
        let kept = filter::kept(&row, params, logits.len());
        let kept_mass = filter::mass(&kept);
        share = (kept_mass / row.total).min(1.0);
        let i = pick(kept.iter().map(|c| c.e), u * kept_mass);
        kept[i].token as usize
    } else {
        draw(&row, u)
    };
    Sample {
        token: token as u32,
        logprob: row.z(token) - row.lse(),
        kept: share as f32,
    }
}

/// The lowest of the tokens with the greatest logit.
fn first_greatest(row: &Row) -> usize {
    let mut scratch = [[0.0; BLOCK]; 2];
    let b = row
        .blocks
        .iter()
        .position(|b| b.max == row.max)
        .unwrap_or(0);
    let (start, z, _) = row.exp(b, row.max, &mut scratch);
    start + z.iter().position(|&z| z == row.max).unwrap_or(0)
}

/// The token at which the cumulative distribution passes `u`.
fn draw(row: &Row, u: f64) -> usize {
    let (b, passed) = pick_with_rest(row.blocks.iter().map(|b| mass(b, row.max)), u * row.total);
    let max = row.blocks[b].max;
    let scale = (f64::from(max) - f64::from(row.max)).exp();
    let mut scratch = [[0.0; BLOCK]; 2];
    let (start, _, e) = row.exp(b, max, &mut scratch);
    start + pick(e.iter().copied(), passed / scale)
}

fn pick(weights: impl Iterator<Item = f32>, at: f64) -> usize {
    pick_with_rest(weights.map(f64::from), at).0
}

/// The first index at which the running sum of the weights exceeds `at`, and `at` less the sum before
/// it. Where rounding keeps the sum below, the last index of a positive weight.
fn pick_with_rest(weights: impl Iterator<Item = f64>, at: f64) -> (usize, f64) {
    let (mut sum, mut last) = (0.0, (0, 0.0));
    for (i, weight) in weights.enumerate() {
        if weight > 0.0 {
            last = (i, at - sum);
        }
        sum += weight;
        if sum > at {
            break;
        }
    }
    last
}

impl Sampling for Cpu {
    fn sample(
        &self,
        rows: usize,
        vocab: usize,
        logits: &Self::Buf<f32>,
        params: &Self::Buf<RowSampling>,
        tokens: &mut Self::Buf<u32>,
        logprob: &mut Self::Buf<f32>,
        kept: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let outputs = [tokens.len(), logprob.len(), kept.len()];
        check_sample(rows, vocab, [logits.len(), params.len()], outputs)?;
        let (logprob, kept) = (SharedMut::new(logprob), SharedMut::new(kept));
        self.pool.chunks_mut(&mut tokens[..rows], 1, |r, token| {
            let sample = sample_row(self.level, &logits[r * vocab..][..vocab], &params[r]);
            token[0] = sample.token;
            // SAFETY: task `r` alone writes element `r`, of either.
            unsafe {
                logprob.slice(r, 1)[0] = sample.logprob;
                kept.slice(r, 1)[0] = sample.kept;
            }
        });
        Ok(())
    }
}
