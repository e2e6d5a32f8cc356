//! Where the keys and values of a sequence lie: in packed rows, behind a shared prefix or not, or
//! in pages.

use super::CHUNK;
use crate::attention::{Heads, PAGE, Segment};

/// Where a sequence's rows lie.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Packed(Segment),
    Paged(&'a [u32]),
}

/// Keys and values of one key/value head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    rows: Rows<'a>,
    /// From row to row, in `keys` and in `values`.
    stride: usize,
    /// Where the head begins in a row of `keys`.
    key_at: usize,
    /// Where the head begins in a row of `values`.
    value_at: usize,
    head_dim: usize,
}

/// The rows of one chunk of keys. Entries past the chunk's end repeat the first.
pub(super) struct Chunk {
    pub keys: [*const f32; CHUNK],
    pub values: [*const f32; CHUNK],
    /// From row to row, where that is the same for all of them.
    pub values_stride: Option<usize>,
}

impl<'a> Keys<'a> {
    pub(super) fn packed(qkv: &'a [f32], heads: Heads, segment: Segment, kv_head: usize) -> Self {
        Self {
            keys: qkv,
            values: qkv,
            rows: Rows::Packed(segment),
            stride: heads.qkv_width(),
            key_at: heads.k_offset() + kv_head * heads.head_dim,
            value_at: heads.v_offset() + kv_head * heads.head_dim,
            head_dim: heads.head_dim,
        }
    }

    pub(super) fn paged(
        keys: &'a [f32],
        values: &'a [f32],
        heads: Heads,
        pages: &'a [u32],
        kv_head: usize,
    ) -> Self {
        Self {
            keys,
            values,
            rows: Rows::Paged(pages),
            stride: heads.kv_width(),
            key_at: kv_head * heads.head_dim,
            value_at: kv_head * heads.head_dim,
            head_dim: heads.head_dim,
        }
    }

    /// The row of the key at a position.
    fn row(&self, position: usize) -> usize {
        match self.rows {
            Rows::Packed(segment) => {
                let prefix = segment.prefix_len as usize;
                if position < prefix {
                    segment.prefix_start as usize + position
                } else {
                    segment.start as usize + position - prefix
                }
            }
            Rows::Paged(pages) => pages[position / PAGE] as usize * PAGE + position % PAGE,
        }
    }

    /// The rows of `count` (1 to `CHUNK`) keys from position `first` on.
    pub(super) fn chunk(&self, first: usize, count: usize) -> Chunk {
        let place = |position: usize| {
            let row = self.row(position) * self.stride;
            let key = self.keys[row + self.key_at..][..self.head_dim].as_ptr();
            let value = self.values[row + self.value_at..][..self.head_dim].as_ptr();
            (key, value)
        };
        let (key, value) = place(first);
        let mut chunk = Chunk {
            keys: [key; CHUNK],
            values: [value; CHUNK],
            values_stride: matches!(self.rows, Rows::Paged(_)).then_some(self.stride),
        };
        for i in 1..count {
            (chunk.keys[i], chunk.values[i]) = place(first + i);
        }
        chunk
    }
}
