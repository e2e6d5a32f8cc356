//! What the arguments of attention must keep to, on every back end.

use super::{Heads, PAGE, PagedBatch, Segment};
use crate::error::check_len;
use crate::{Buffer, Device, Error, Result};

const FORWARD: &str = "attention";
const BACKWARD: &str = "attention_backward";

/// Checks a forward call on buffers of these lengths; as [`owners`].
pub(crate) fn check_attention(
    rows: usize,
    heads: Heads,
    segments: &[Segment],
    [qkv, out, lse]: [usize; 3],
) -> Result<Vec<Option<usize>>> {
    heads.check(FORWARD)?;
    check_len(FORWARD, "qkv", qkv, rows.saturating_mul(heads.qkv_width()))?;
    check_len(FORWARD, "out", out, rows.saturating_mul(heads.out_width()))?;
    check_len(FORWARD, "lse", lse, rows.saturating_mul(heads.q_heads))?;
    owners(FORWARD, rows, segments)
}

/// Checks a backward call on buffers of these lengths; as [`owners`].
pub(crate) fn check_attention_backward(
    rows: usize,
    heads: Heads,
    segments: &[Segment],
    [[qkv, out, lse], [dout, delta, dqkv]]: [[usize; 3]; 2],
) -> Result<Vec<Option<usize>>> {
    heads.check(BACKWARD)?;
    let outputs = rows.saturating_mul(heads.out_width());
    let lines = rows.saturating_mul(heads.q_heads);
    let inputs = rows.saturating_mul(heads.qkv_width());
    check_len(BACKWARD, "qkv", qkv, inputs)?;
    check_len(BACKWARD, "out", out, outputs)?;
    check_len(BACKWARD, "lse", lse, lines)?;
    check_len(BACKWARD, "dout", dout, outputs)?;
    check_len(BACKWARD, "delta", delta, lines)?;
    check_len(BACKWARD, "dqkv", dqkv, inputs)?;
    owners(BACKWARD, rows, segments)
}

/// Checks the lengths of a cache write; returns the number of whole pages that both caches hold.
pub(crate) fn check_cache_write(
    rows: usize,
    heads: Heads,
    [qkv, slots, k_cache, v_cache]: [usize; 4],
) -> Result<usize> {
    const OP: &str = "cache_write";
    heads.check(OP)?;
    check_len(OP, "qkv", qkv, rows.saturating_mul(heads.qkv_width()))?;
    check_len(OP, "slots", slots, rows)?;
    Ok(cache_pages(heads, k_cache, v_cache))
}

/// Checks the lengths of a paged call; returns the number of whole pages that both caches hold.
pub(crate) fn check_paged<D: Device>(
    heads: Heads,
    batch: PagedBatch<'_, D>,
    [qkv, k_cache, v_cache, out]: [usize; 4],
) -> Result<usize> {
    const OP: &str = "attention_paged";
    heads.check(OP)?;
    let rows = batch.rows;
    check_len(OP, "sequences", batch.sequences.len(), batch.count)?;
    check_len(OP, "qkv", qkv, rows.saturating_mul(heads.qkv_width()))?;
    check_len(OP, "out", out, rows.saturating_mul(heads.out_width()))?;
    Ok(cache_pages(heads, k_cache, v_cache))
}

fn cache_pages(heads: Heads, k_cache: usize, v_cache: usize) -> usize {
    k_cache.min(v_cache) / heads.kv_width() / PAGE
}

/// Refuses runs `(start, len)` of rows that overlap; returns the end of the last one.
pub(crate) fn check_disjoint(
    op: &'static str,
    runs: impl Iterator<Item = (usize, usize)>,
) -> Result<usize> {
    let mut runs: Vec<_> = runs.enumerate().filter(|(_, run)| run.1 > 0).collect();
    runs.sort_by_key(|(_, run)| run.0);
    for pair in runs.windows(2) {
        let ((first, (start, len)), (second, (next, _))) = (pair[0], pair[1]);
        if next < start + len {
            return Err(Error::invalid(
                op,
                format!("sequences {first} and {second} overlap at row {next}"),
            ));
        }
    }
    Ok(runs.last().map_or(0, |(_, (start, len))| start + len))
}

/// Refuses segments that break the rules of [`super::Attention::attention`]; returns for
/// each segment the index of the one that owns its prefix.
fn owners(op: &'static str, rows: usize, segments: &[Segment]) -> Result<Vec<Option<usize>>> {
    let runs = segments.iter().map(|s| (s.start as usize, s.len as usize));
    let end = check_disjoint(op, runs)?;
    if end > rows {
        return Err(Error::invalid(
            op,
            format!("a segment ends at row {end}, beyond the {rows} rows"),
        ));
    }
    let mut free: Vec<usize> = (0..segments.len())
        .filter(|&i| segments[i].prefix_len == 0 && segments[i].len > 0)
        .collect();
    free.sort_by_key(|&i| segments[i].start);
    let owner = |(index, segment): (usize, &Segment)| {
        if segment.prefix_len == 0 {
            return Ok(None);
        }
        free.binary_search_by_key(&segment.prefix_start, |&i| segments[i].start)
            .ok()
            .map(|at| free[at])
            .filter(|&i| segment.prefix_len <= segments[i].len)
            .map(Some)
            .ok_or_else(|| {
                Error::invalid(
                    op,
                    format!(
                        "segment {index}: its prefix of {} rows from {} on is not the beginning \
                         of a segment without a prefix",
                        segment.prefix_len, segment.prefix_start
                    ),
                )
            })
    };
    segments.iter().enumerate().map(owner).collect()
}
