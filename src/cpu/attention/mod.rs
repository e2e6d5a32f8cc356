//! Attention on the CPU: checks, and the split into independent tasks.
//!
//! A task is a block of query rows of one sequence and one key/value head with all query heads of
//! its group, so that each key is read once for the group. The tasks with the most keys come first,
//! which lets the threads finish together.

mod backward;
mod forward;
mod keys;
mod tile;

use super::pool::SharedMut;
use super::{Cpu, CpuBuf};
use crate::attention::{
    Attention, Heads, PAGE, PagedBatch, Segment, check_attention, check_attention_backward,
    check_cache_write, check_disjoint, check_paged,
};
use crate::error::{check_indices, check_len};
use crate::{Error, Result};
use backward::{Gradients, Reader, RowDots, key_gradient, query_gradient};
use forward::{Block, block_rows};
use keys::Keys;
use tile::padded;

/// Keys of a chunk of the canonical reduction; a page holds exactly one.
const CHUNK: usize = PAGE;

impl Cpu {
    /// Runs the blocks and writes outputs and log-sum-exps. No two of them have a row and a head in
    /// common.
    fn attend(&self, mut blocks: Vec<Block>, out: &mut [f32], lse: Option<&mut [f32]>) {
        blocks.sort_by_key(|block| std::cmp::Reverse(block.context() * block.rows));
        let out = SharedMut::new(out);
        let lse = lse.map(SharedMut::new);
        self.pool.run(blocks.len(), |task| {
            let block = blocks[task];
            let Heads {
                q_heads, head_dim, ..
            } = block.heads;
            let group = block.heads.group();
            let width = padded(head_dim);
            block.forward(self.level, |outputs, sums| {
                for row in 0..block.rows {
                    let at = (block.row + row) * q_heads + block.kv_head * group;
                    // SAFETY: this task alone writes these heads of this row.
                    let out = unsafe { out.slice(at * head_dim, group * head_dim) };
                    let outputs = outputs[row * group * width..].chunks_exact(width);
                    for (out, output) in out.chunks_exact_mut(head_dim).zip(outputs) {
                        out.copy_from_slice(&output[..head_dim]);
                    }
                    if let Some(lse) = &lse {
                        // SAFETY: as above.
                        let lse = unsafe { lse.slice(at, group) };
                        lse.copy_from_slice(&sums[row * group..][..group]);
                    }
                }
            });
        });
    }
}

/// Cuts a sequence's query rows into blocks, for every key/value head.
fn push_blocks<'a>(
    blocks: &mut Vec<Block<'a>>,
    heads: Heads,
    scale: f32,
    qkv: &'a [f32],
    row: usize,
    rows: usize,
    position: usize,
    keys: impl Fn(usize) -> Keys<'a>,
) {
    let step = block_rows(heads);
    for kv_head in 0..heads.kv_heads {
        for from in (0..rows).step_by(step) {
            blocks.push(Block {
                heads,
                scale,
                qkv,
                keys: keys(kv_head),
                row: row + from,
                rows: step.min(rows - from),
                position: position + from,
                kv_head,
            });
        }
    }
}

/// The blocks of a packed batch.
fn packed_blocks<'a>(
    heads: Heads,
    scale: f32,
    segments: &[Segment],
    qkv: &'a [f32],
) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    for &segment in segments {
        push_blocks(
            &mut blocks,
            heads,
            scale,
            qkv,
            segment.start as usize,
            segment.len as usize,
            segment.prefix_len as usize,
            |kv_head| Keys::packed(qkv, heads, segment, kv_head),
        );
    }
    blocks
}

impl Attention for Cpu {
    fn attention(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
        lse: &mut CpuBuf<f32>,
    ) -> Result<()> {
        check_attention(rows, heads, segments, [qkv.len(), out.len(), lse.len()])?;
        self.attend(packed_blocks(heads, scale, segments, qkv), out, Some(lse));
        Ok(())
    }

    fn attention_backward(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &CpuBuf<f32>,
        out: &CpuBuf<f32>,
        lse: &CpuBuf<f32>,
        dout: &CpuBuf<f32>,
        delta: &mut CpuBuf<f32>,
        dqkv: &mut CpuBuf<f32>,
    ) -> Result<()> {
        let inputs = [qkv.len(), out.len(), lse.len()];
        let lens = [inputs, [dout.len(), delta.len(), dqkv.len()]];
        let owners = check_attention_backward(rows, heads, segments, lens)?;
        let lines = rows * heads.q_heads;

        let Heads { head_dim, .. } = heads;
        let (group, width) = (heads.group(), padded(head_dim));
        let run = CHUNK * heads.q_heads;
        self.pool
            .chunks_mut(&mut delta[..lines], run, |task, delta| {
                let at = task * run * head_dim;
                let len = delta.len() * head_dim;
                self.level.dispatch(RowDots {
                    head_dim,
                    dout: &dout[at..at + len],
                    out: &out[at..at + len],
                    delta,
                });
            });
        let gradients = Gradients { dout, lse, delta };

        let dqkv = SharedMut::new(dqkv);
        // Rows of `padded(head_dim)` values to heads of packed rows.
        let write = |from: &[f32], row: usize, at: usize, heads_written: usize| {
            // SAFETY: of all tasks, one alone writes these heads of this row.
            let to = unsafe { dqkv.slice(row * heads.qkv_width() + at, heads_written * head_dim) };
            for (to, from) in to.chunks_exact_mut(head_dim).zip(from.chunks_exact(width)) {
                to.copy_from_slice(&from[..head_dim]);
            }
        };

        let mut blocks = packed_blocks(heads, scale, segments, qkv);
        blocks.sort_by_key(|block| std::cmp::Reverse(block.context() * block.rows));
        self.pool.run(blocks.len(), |task| {
            let block = blocks[task];
            query_gradient(self.level, block, gradients, |dq| {
                for row in 0..block.rows {
                    let at = block.kv_head * group * head_dim;
                    write(&dq[row * group * width..], block.row + row, at, group);
                }
            });
        });

        let mut tasks = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            let len = segment.len as usize;
            for first in (0..len).step_by(CHUNK) {
                let count = CHUNK.min(len - first);
                let own = Reader {
                    row: segment.start as usize + first,
                    rows: len - first,
                    causal: true,
                    keys: count,
                };
                let others = segments.iter().zip(&owners);
                let others = others.filter(|(user, owner)| {
                    **owner == Some(index) && user.prefix_len as usize > first
                });
                let others = others.map(|(user, _)| Reader {
                    row: user.start as usize,
                    rows: user.len as usize,
                    causal: false,
                    keys: count.min(user.prefix_len as usize - first),
                });
                let readers: Vec<Reader> = std::iter::once(own).chain(others).collect();
                let cost: usize = readers.iter().map(|reader| reader.rows).sum();
                tasks.push((cost, *segment, first, count, readers));
            }
        }
        tasks.sort_by_key(|task| std::cmp::Reverse(task.0));
        self.pool.run(tasks.len() * heads.kv_heads, |task| {
            let kv_head = task % heads.kv_heads;
            let (_, segment, first, count, readers) = &tasks[task / heads.kv_heads];
            let model = Block {
                heads,
                scale,
                qkv,
                keys: Keys::packed(qkv, heads, *segment, kv_head),
                row: 0,
                rows: 0,
                position: 0,
                kv_head,
            };
            let position = segment.prefix_len as usize + first;
            key_gradient(
                self.level,
                model,
                gradients,
                position,
                *count,
                readers,
                |dk, dv| {
                    for key in 0..*count {
                        let row = segment.start as usize + first + key;
                        let at = kv_head * head_dim;
                        write(&dk[key * width..], row, heads.k_offset() + at, 1);
                        write(&dv[key * width..], row, heads.v_offset() + at, 1);
                    }
                },
            );
        });
        Ok(())
    }

    fn cache_write(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &CpuBuf<f32>,
        slots: &CpuBuf<u32>,
        k_cache: &mut CpuBuf<f32>,
        v_cache: &mut CpuBuf<f32>,
    ) -> Result<()> {
        const OP: &str = "cache_write";
        let width = heads.kv_width();
        let lens = [qkv.len(), slots.len(), k_cache.len(), v_cache.len()];
        let limit = check_cache_write(rows, heads, lens)? * PAGE;
        check_indices(OP, "slots", &slots[..rows], limit)?;
        for (row, &slot) in qkv.chunks_exact(heads.qkv_width()).zip(&slots[..rows]) {
            let (keys, values) = row[heads.k_offset()..].split_at(width);
            let to = slot as usize * width;
            k_cache[to..to + width].copy_from_slice(keys);
            v_cache[to..to + width].copy_from_slice(values);
        }
        Ok(())
    }

    fn attention_paged(
        &self,
        heads: Heads,
        scale: f32,
        batch: PagedBatch<'_, Cpu>,
        qkv: &CpuBuf<f32>,
        k_cache: &CpuBuf<f32>,
        v_cache: &CpuBuf<f32>,
        out: &mut CpuBuf<f32>,
    ) -> Result<()> {
        const OP: &str = "attention_paged";
        let PagedBatch { rows, pages, .. } = batch;
        let lens = [qkv.len(), k_cache.len(), v_cache.len(), out.len()];
        let limit = check_paged(heads, batch, lens)?;
        let sequences = &batch.sequences[..batch.count];
        let runs = sequences
            .iter()
            .map(|s| (s.q_start as usize, s.q_len as usize));
        let end = check_disjoint(OP, runs)?;
        if end > rows {
            return Err(Error::invalid(
                OP,
                format!("a sequence's queries end at row {end}, beyond the {rows} rows"),
            ));
        }
        let mut blocks = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let (q_len, context) = (sequence.q_len as usize, sequence.context as usize);
            if q_len > context {
                return Err(Error::invalid(
                    OP,
                    format!("sequence {index} has {q_len} queries in a context of {context}"),
                ));
            }
            if q_len == 0 {
                continue;
            }
            let (max_q_len, max_context) = (batch.max_q_len, batch.max_context);
            if q_len > max_q_len || context > max_context {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "sequence {index} has {q_len} queries in a context of {context}, the \
                         batch allows {max_q_len} in {max_context}"
                    ),
                ));
            }
            let first = sequence.first_page as usize;
            let end = first + context.div_ceil(PAGE);
            check_len(OP, "pages", pages.len(), end)?;
            let run = &pages[first..end];
            if let Some(at) = run.iter().position(|&page| page as usize >= limit) {
                return Err(Error::OutOfRange {
                    op: OP,
                    name: "pages",
                    at: first + at,
                    value: run[at] as usize,
                    limit,
                });
            }
            push_blocks(
                &mut blocks,
                heads,
                scale,
                qkv,
                sequence.q_start as usize,
                q_len,
                context - q_len,
                |kv_head| Keys::paged(k_cache, v_cache, heads, run, kv_head),
            );
        }
        self.attend(blocks, out, None);
        Ok(())
    }
}
