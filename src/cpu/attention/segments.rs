//! What a list of segments must keep to.

use crate::attention::Segment;
use crate::{Error, Result};

/// Refuses runs `(start, len)` of rows that overlap; returns the end of the last one.
pub(super) fn check_disjoint(
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

/// Refuses segments that break the rules of [`crate::attention::Attention::attention`]; returns for
/// each segment the index of the one that owns its prefix.
pub(super) fn owners(
    op: &'static str,
    rows: usize,
    segments: &[Segment],
) -> Result<Vec<Option<usize>>> {
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
