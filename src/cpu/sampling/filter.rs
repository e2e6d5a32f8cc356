//! Which tokens the filters keep, without sorting the vocabulary.
//!
//! Order tokens by falling `z`, equal ones by rising token: top-k, top-p and min-p each keep a
//! prefix of that order. Only tokens above a threshold are looked at; the threshold falls until
//! they are enough. Among them the last one kept is found by halving: select the median, sum the
//! upper half, go on in the half where the boundary lies.

use super::softmax::Row;
use crate::cpu::logprob::BLOCK;
use crate::sampling::RowSampling;
use std::cmp::Ordering;

/// A token that may be kept, with `e = exp(z - max)`.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) token: u32,
    z: f32,
    pub(super) e: f32,
}

impl Candidate {
    /// Most probable first, lowest token first among equals.
    fn order(&self, other: &Self) -> Ordering {
        let falling = other.z.partial_cmp(&self.z).unwrap_or(Ordering::Equal);
        falling.then(self.token.cmp(&other.token))
    }
}

/// Distances below the greatest `z`, in nats, down to which tokens are looked at, in turn.
const REACH: [f32; 5] = [2.0, 5.0, 10.0, 20.0, f32::INFINITY];
/// So few candidates are sorted.
const FEW: usize = 16;

/// Whether a filter is on at all.
pub(super) fn is_on(params: &RowSampling, vocab: usize) -> bool {
    top_k(params, vocab).is_some() || params.top_p < 1.0 || params.min_p > 0.0
}

fn top_k(params: &RowSampling, vocab: usize) -> Option<usize> {
    let k = params.top_k as usize;
    (0 < k && k < vocab).then_some(k)
}

/// The tokens that the filters keep, in the order of tokens; at least one.
pub(super) fn kept(row: &Row, params: &RowSampling, vocab: usize) -> Vec<Candidate> {
    let top_k = top_k(params, vocab);
    for reach in REACH {
        if let Some(kept) = filter(row, params, top_k, reach) {
            return kept;
        }
    }
    candidates(row, f32::INFINITY)
}

/// `None` where the filters would keep tokens that are further than `reach` below the greatest.
fn filter(
    row: &Row,
    params: &RowSampling,
    top_k: Option<usize>,
    reach: f32,
) -> Option<Vec<Candidate>> {
    let mut kept = candidates(row, reach);
    let all = reach == f32::INFINITY;
    let mut mass = row.total;
    if let Some(k) = top_k {
        if kept.len() < k {
            return None;
        }
        let end = prefix_end(&kept, k, f64::INFINITY);
        kept.retain(|c| c.order(&end).is_le());
        mass = self::mass(&kept);
    }
    if params.top_p < 1.0 {
        let target = f64::from(params.top_p) * mass;
        if !all && self::mass(&kept) < target {
            return None;
        }
        let end = prefix_end(&kept, usize::MAX, target);
        kept.retain(|c| c.order(&end).is_le());
    } else if top_k.is_none() && !all && (-reach).exp() > 0.99 * params.min_p {
        return None;
    }
    // The most probable token has an `e` of exactly 1.
    let least = params.min_p.min(1.0);
    kept.retain(|c| c.e >= least);
    Some(kept)
}

/// The tokens at most `reach` below the greatest `z`, in the order of tokens.
fn candidates(row: &Row, reach: f32) -> Vec<Candidate> {
    let floor = row.max - reach;
    let mut scratch = [[0.0; BLOCK]; 2];
    let mut found = Vec::new();
    for (b, block) in row.blocks.iter().enumerate() {
        if block.max >= floor {
            let (start, z, e) = row.exp(b, row.max, &mut scratch);
            for (i, (&z, &e)) in z.iter().zip(e).enumerate() {
                if z >= floor {
                    let token = (start + i) as u32;
                    found.push(Candidate { token, z, e });
                }
            }
        }
    }
    found
}

/// The sum of the candidates' exponentials.
pub(super) fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().fold(0.0, |sum, c| sum + f64::from(c.e))
}

/// The last candidate of the shortest prefix, in falling order, that holds `count` of them or a mass
/// of `target`; the very last where none does.
fn prefix_end(candidates: &[Candidate], mut count: usize, mut target: f64) -> Candidate {
    let mut order = candidates.to_vec();
    let mut rest = &mut order[..];
    while rest.len() > FEW {
        let half = rest.len() / 2;
        rest.select_nth_unstable_by(half, Candidate::order);
        let (upper, lower) = rest.split_at_mut(half);
        let upper_mass = mass(upper);
        if half >= count || upper_mass >= target {
            rest = upper;
        } else {
            count -= half;
            target -= upper_mass;
            rest = lower;
        }
    }
    rest.sort_unstable_by(Candidate::order);
    for c in &rest[..] {
        count = count.saturating_sub(1);
        target -= f64::from(c.e);
        if count == 0 || target <= 0.0 {
            return *c;
        }
    }
    rest[rest.len() - 1]
}
