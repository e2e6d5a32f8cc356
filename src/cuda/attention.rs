//! Launches of `kernels/attention_*.cu`.
//!
//! Heads of 64 and 128 elements. Keys out of sight count as zeros, so a NaN or an infinity in a value
//! may also reach earlier rows of its own sequence (never another sequence); on the CPU it does not.

use super::launch::{Fault, Grid, Kernels, dim};
use super::{Cuda, CudaBuffer};
use crate::attention::{
    Attention, Heads, PAGE, PagedBatch, Segment, check_attention, check_attention_backward,
    check_cache_write, check_paged,
};
use crate::{Buffer, Error, Result};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

/// Lines (query heads of query rows) of a block, as in `kernels/include/attention.cuh`.
const LINES: usize = 64;
const WARPS: usize = 4;
const THREADS: usize = 32 * WARPS;
/// Lines of an mma, which one warp takes in decode.
const WARP_LINES: usize = 16;
/// Keys of a tile: those of a page.
const KEYS: usize = PAGE;
/// Keys of a chunk, which one warp reduces in decode.
const CHUNK_KEYS: usize = 4 * KEYS;
/// Tiles of keys or values in the ring that they pass through in decode.
const RING_TILES: usize = 3;
/// Lines of a tile that the kernel for the gradients of keys and values reads.
const READ_LINES: usize = 32;
/// Blocks of a grid's second and third dimension.
const GRID_LIMIT: usize = 65_535;

/// The sequences of a paged call on device pointers, see [`PagedBatch`].
#[derive(Debug, Clone, Copy)]
pub struct PagedPointers {
    /// `count` times [`crate::attention::PagedSequence`].
    pub sequences: CUdeviceptr,
    /// How many.
    pub count: usize,
    /// Packed rows of queries and outputs.
    pub rows: usize,
    /// At least every sequence's `q_len`.
    pub max_q_len: usize,
    /// At least every sequence's `context`.
    pub max_context: usize,
    /// Page numbers, `u32`.
    pub pages: CUdeviceptr,
    /// How many.
    pub page_count: usize,
    /// Pages of the cache.
    pub cache_pages: usize,
    /// Where sequences that break a bound and pages outside of the cache are noted.
    pub faults: PagedFaults,
}

/// Notes of a paged call, by what is wrong: the index of the sequence (or of the page number), the
/// value and its limit are noted.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct PagedFaults {
    /// More queries than `max_q_len` or than the context.
    pub q_len: Fault,
    /// A context above `max_context`.
    pub context: Fault,
    /// Queries beyond `rows`.
    pub q_start: Fault,
    /// Page numbers beyond `page_count`.
    pub first_page: Fault,
    /// A page outside of the cache.
    pub page: Fault,
}

/// `struct Paged` of `attention_paged.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Paged {
    sequences: CUdeviceptr,
    pages: CUdeviceptr,
    qkv: CUdeviceptr,
    k_cache: CUdeviceptr,
    v_cache: CUdeviceptr,
    out: CUdeviceptr,
    values: CUdeviceptr,
    sums: CUdeviceptr,
    rows: u32,
    max_q_len: u32,
    max_context: u32,
    page_count: u32,
    cache_pages: u32,
    q_heads: i32,
    kv_heads: i32,
    scale_log2: f32,
    faults: PagedFaults,
}

/// `struct Backward` of `attention_backward.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Backward {
    segments: CUdeviceptr,
    qkv: CUdeviceptr,
    dout: CUdeviceptr,
    lse: CUdeviceptr,
    delta: CUdeviceptr,
    dqkv: CUdeviceptr,
    count: i32,
    q_heads: i32,
    kv_heads: i32,
    scale: f32,
}

/// The entry for a head size.
fn by_size(
    op: &'static str,
    heads: Heads,
    [small, large]: [&'static str; 2],
) -> Result<&'static str> {
    heads.check(op)?;
    match heads.head_dim {
        64 => Ok(small),
        128 => Ok(large),
        other => Err(Error::invalid(
            op,
            format!("the CUDA kernels have heads of 64 and 128 elements, not {other}"),
        )),
    }
}

/// Bytes of a tile of `rows` rows.
fn tile_bytes(heads: Heads, rows: usize) -> usize {
    2 * rows * heads.head_dim
}

/// A grid of blocks for `per_sequence` tiles or chunks of each of `count` sequences.
fn grid(
    op: &'static str,
    per_sequence: usize,
    heads: usize,
    count: usize,
    threads: usize,
    shared: usize,
) -> Result<Grid> {
    if count > GRID_LIMIT || heads > GRID_LIMIT {
        return Err(Error::invalid(
            op,
            format!("{count} sequences of {heads} key/value heads; at most {GRID_LIMIT} of each"),
        ));
    }
    Ok(Grid {
        blocks: [per_sequence, heads, count],
        threads,
        shared,
    })
}

/// Tiles of `rows` rows of a sequence.
fn tiles(op: &'static str, heads: Heads, rows: usize) -> Result<usize> {
    let lines = rows.saturating_mul(heads.group());
    dim(op, "rows of a sequence", lines.saturating_add(LINES))?;
    Ok(lines.div_ceil(LINES))
}

impl Kernels {
    /// [`Attention::attention`] on device pointers. `max_len` is at least every segment's `len`.
    ///
    /// # Errors
    /// A head size that is neither 64 nor 128; what the driver reports.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `segments` holds `count`
    /// [`Segment`]s that keep to the rules of [`Attention::attention`], the other buffers as much
    /// as it says, bf16 and f32 (`lse`); all are aligned to 16 bytes and live until the work is
    /// done. `out` and `lse` overlap nothing.
    pub unsafe fn attention(
        &self,
        stream: CUstream,
        heads: Heads,
        scale: f32,
        segments: CUdeviceptr,
        count: usize,
        max_len: usize,
        qkv: CUdeviceptr,
        out: CUdeviceptr,
        lse: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "attention";
        let entry = by_size(OP, heads, ["attention_forward_64", "attention_forward_128"])?;
        let shared = 4 * tile_bytes(heads, LINES);
        let tiles = tiles(OP, heads, max_len)?;
        let grid = grid(OP, tiles, heads.kv_heads, count, THREADS, shared)?;
        let (q_heads, kv_heads) = head_counts(OP, heads)?;
        let scale_log2 = scale * std::f32::consts::LOG2_E;
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                entry,
                grid,
                &[
                    &segments,
                    &qkv,
                    &out,
                    &lse,
                    &q_heads,
                    &kv_heads,
                    &scale_log2,
                ],
            )
        }
    }

    /// [`Attention::attention_backward`] on device pointers. `max_len` is at least every segment's
    /// `len`.
    ///
    /// # Errors
    /// As [`Kernels::attention`].
    ///
    /// # Safety
    /// As [`Kernels::attention`]; `out` and `lse` are what it wrote, `delta` and `dqkv` overlap
    /// nothing.
    pub unsafe fn attention_backward(
        &self,
        stream: CUstream,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: CUdeviceptr,
        count: usize,
        max_len: usize,
        qkv: CUdeviceptr,
        out: CUdeviceptr,
        lse: CUdeviceptr,
        dout: CUdeviceptr,
        delta: CUdeviceptr,
        dqkv: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "attention_backward";
        let queries = by_size(OP, heads, ["attention_dq_64", "attention_dq_128"])?;
        let keys = by_size(OP, heads, ["attention_dkv_64", "attention_dkv_128"])?;
        let (q_heads, kv_heads) = head_counts(OP, heads)?;
        let tiles = tiles(OP, heads, max_len)?;
        let tile = tile_bytes(heads, LINES);
        let queries_grid = grid(OP, tiles, heads.kv_heads, count, THREADS, 4 * tile)?;
        let shared = 2 * tile + 4 * tile_bytes(heads, READ_LINES);
        let key_tiles = max_len.div_ceil(KEYS);
        let keys_grid = grid(OP, key_tiles, heads.kv_heads, count, THREADS, shared)?;
        let lanes = heads.head_dim / 8;
        let lines = rows.saturating_mul(heads.q_heads);
        let delta_grid = Grid::new(lines.saturating_mul(lanes).div_ceil(256), 256);
        let call = Backward {
            segments,
            qkv,
            dout,
            lse,
            delta,
            dqkv,
            count: count as i32,
            q_heads,
            kv_heads,
            scale,
        };
        // SAFETY: by the caller; each launch reads what the one before wrote, in stream order.
        unsafe {
            let (lines, lanes) = (lines as i64, lanes as i32);
            self.launch(
                stream,
                "attention_delta",
                delta_grid,
                &[&lines, &lanes, &out, &dout, &delta],
            )?;
            self.launch(stream, queries, queries_grid, &[&call])?;
            self.launch(stream, keys, keys_grid, &[&call])
        }
    }

    /// [`Attention::cache_write`] on device pointers; `cache_pages` pages in either cache.
    ///
    /// # Errors
    /// As [`Kernels::attention`].
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `qkv` and the caches hold as
    /// much bf16 as [`Attention::cache_write`] says, `slots` `rows` `u32`; all are aligned to 16
    /// bytes and live until the work is done, no slot appears twice, and the caches overlap nothing.
    pub unsafe fn cache_write(
        &self,
        stream: CUstream,
        rows: usize,
        heads: Heads,
        cache_pages: usize,
        qkv: CUdeviceptr,
        slots: CUdeviceptr,
        k_cache: CUdeviceptr,
        v_cache: CUdeviceptr,
        bad_slot: Fault,
    ) -> Result<()> {
        const OP: &str = "cache_write";
        by_size(OP, heads, [OP; 2])?;
        let chunks = |elements: usize| dim(OP, "heads", elements / 8);
        let (kv_chunks, row_chunks) = (chunks(heads.kv_width())?, chunks(heads.qkv_width())?);
        let slot_count = index_limit(cache_pages.saturating_mul(PAGE));
        let blocks = rows.saturating_mul(2 * kv_chunks as usize).div_ceil(256);
        let keys = qkv + 2 * heads.k_offset() as CUdeviceptr;
        let rows = dim(OP, "rows", rows)?;
        // SAFETY: by the caller; `keys` are those of the first row.
        unsafe {
            self.launch(
                stream,
                OP,
                Grid::new(blocks, 256),
                &[
                    &rows,
                    &kv_chunks,
                    &row_chunks,
                    &slot_count,
                    &keys,
                    &slots,
                    &k_cache,
                    &v_cache,
                    &bad_slot,
                ],
            )
        }
    }

    /// Bytes of scratch memory of [`Kernels::attention_paged`].
    pub fn attention_paged_scratch(heads: Heads, count: usize, max_context: usize) -> usize {
        paged_states(heads, count, max_context).saturating_mul(4 * (heads.head_dim + 2))
    }

    /// [`Attention::attention_paged`] on device pointers.
    ///
    /// # Errors
    /// As [`Kernels::attention`].
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `batch` says what its pointers
    /// hold; `qkv` holds `batch.rows` packed rows, `out` as many output rows, the caches
    /// `batch.cache_pages` pages, all bf16, and `scratch` as many bytes as
    /// [`Kernels::attention_paged_scratch`] says. All are aligned to 16 bytes and live until the
    /// work is done; `out` and `scratch` overlap nothing, and no two sequences have a query row in
    /// common.
    pub unsafe fn attention_paged(
        &self,
        stream: CUstream,
        heads: Heads,
        scale: f32,
        batch: PagedPointers,
        qkv: CUdeviceptr,
        k_cache: CUdeviceptr,
        v_cache: CUdeviceptr,
        out: CUdeviceptr,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "attention_paged";
        let prefill = by_size(OP, heads, ["attention_prefill_64", "attention_prefill_128"])?;
        let decode = by_size(OP, heads, ["attention_decode_64", "attention_decode_128"])?;
        let merge = by_size(OP, heads, ["attention_merge_64", "attention_merge_128"])?;
        let (q_heads, kv_heads) = head_counts(OP, heads)?;
        let count = batch.count;
        let bound = |name, n| dim(OP, name, n).map(|n| n as u32);
        let max_context = bound("max_context", batch.max_context.saturating_add(CHUNK_KEYS))?;
        let values_bytes =
            paged_states(heads, count, batch.max_context).saturating_mul(4 * heads.head_dim);
        let call = Paged {
            sequences: batch.sequences,
            pages: batch.pages,
            qkv,
            k_cache,
            v_cache,
            out,
            values: scratch,
            sums: scratch + values_bytes as CUdeviceptr,
            rows: bound("rows", batch.rows)?,
            max_q_len: bound("max_q_len", batch.max_q_len)?,
            max_context: max_context - CHUNK_KEYS as u32,
            page_count: index_limit(batch.page_count),
            cache_pages: index_limit(batch.cache_pages),
            q_heads,
            kv_heads,
            scale_log2: scale * std::f32::consts::LOG2_E,
            faults: batch.faults,
        };
        let tile = tile_bytes(heads, KEYS);
        if batch.max_q_len > 1 {
            let tiles = tiles(OP, heads, batch.max_q_len)?;
            let grid = grid(OP, tiles, heads.kv_heads, count, THREADS, 4 * tile)?;
            // SAFETY: by the caller.
            unsafe { self.launch(stream, prefill, grid, &[&call])? };
        }
        let chunks = chunks(batch.max_context);
        let shared = RING_TILES * tile + tile_bytes(heads, WARP_LINES);
        let tiles = heads.kv_heads * heads.group().div_ceil(WARP_LINES);
        let decode_grid = grid(OP, chunks, tiles, count, 32, shared)?;
        let merge_grid = grid(OP, heads.q_heads.div_ceil(WARPS), count, 1, THREADS, 0)?;
        // SAFETY: by the caller; the second kernel reads the states that the first wrote.
        unsafe {
            self.launch(stream, decode, decode_grid, &[&call])?;
            self.launch(stream, merge, merge_grid, &[&call])
        }
    }
}

/// Chunks of a paged call's longest context: one at least, so that sequences are checked whatever
/// their bounds.
fn chunks(max_context: usize) -> usize {
    max_context.div_ceil(CHUNK_KEYS).max(1)
}

/// Chunk states of a paged call.
fn paged_states(heads: Heads, count: usize, max_context: usize) -> usize {
    let lines = count.saturating_mul(heads.q_heads);
    lines.saturating_mul(chunks(max_context))
}

fn head_counts(op: &'static str, heads: Heads) -> Result<(i32, i32)> {
    Ok((
        dim(op, "q_heads", heads.q_heads)?,
        dim(op, "kv_heads", heads.kv_heads)?,
    ))
}

/// The first index that is not allowed, for indices of 32 bits.
fn index_limit(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The longest segment.
fn max_len(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.len).max().unwrap_or(0) as usize
}

impl Attention for Cuda {
    fn attention(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<bf16>,
        lse: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        const OP: &str = "attention";
        check_attention(rows, heads, segments, [qkv.len(), out.len(), lse.len()])?;
        let mut turn = self.turn(OP, &[qkv, out, lse])?;
        let scratch = turn.scratch(size_of_val(segments))?;
        // SAFETY: scratch memory of that size.
        unsafe { turn.write(scratch, bytemuck::cast_slice(segments))? };
        // SAFETY: lengths and segments are checked, the buffers are distinct and live on this
        // stream.
        unsafe {
            turn.kernels.attention(
                turn.stream,
                heads,
                scale,
                scratch,
                segments.len(),
                max_len(segments),
                qkv.address(),
                out.address(),
                lse.address(),
            )
        }
    }

    fn attention_backward(
        &self,
        rows: usize,
        heads: Heads,
        scale: f32,
        segments: &[Segment],
        qkv: &CudaBuffer<bf16>,
        out: &CudaBuffer<bf16>,
        lse: &CudaBuffer<f32>,
        dout: &CudaBuffer<bf16>,
        delta: &mut CudaBuffer<f32>,
        dqkv: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "attention_backward";
        let inputs = [qkv.len(), out.len(), lse.len()];
        let lens = [inputs, [dout.len(), delta.len(), dqkv.len()]];
        check_attention_backward(rows, heads, segments, lens)?;
        let mut turn = self.turn(OP, &[qkv, out, lse, dout, delta, dqkv])?;
        let scratch = turn.scratch(size_of_val(segments))?;
        // SAFETY: scratch memory of that size.
        unsafe { turn.write(scratch, bytemuck::cast_slice(segments))? };
        // SAFETY: lengths and segments are checked, the buffers are distinct and live on this
        // stream.
        unsafe {
            turn.kernels.attention_backward(
                turn.stream,
                rows,
                heads,
                scale,
                scratch,
                segments.len(),
                max_len(segments),
                qkv.address(),
                out.address(),
                lse.address(),
                dout.address(),
                delta.address(),
                dqkv.address(),
            )
        }
    }

    fn cache_write(
        &self,
        rows: usize,
        heads: Heads,
        qkv: &CudaBuffer<bf16>,
        slots: &CudaBuffer<u32>,
        k_cache: &mut CudaBuffer<bf16>,
        v_cache: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "cache_write";
        let lens = [qkv.len(), slots.len(), k_cache.len(), v_cache.len()];
        let pages = check_cache_write(rows, heads, lens)?;
        let mut turn = self.turn(OP, &[qkv, slots, k_cache, v_cache])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream; of two
        // equal slots, which only a broken page table has, either row may win.
        unsafe {
            turn.kernels.cache_write(
                turn.stream,
                rows,
                heads,
                pages,
                qkv.address(),
                slots.address(),
                k_cache.address(),
                v_cache.address(),
                turn.fault("slots"),
            )
        }
    }

    fn attention_paged(
        &self,
        heads: Heads,
        scale: f32,
        batch: PagedBatch<'_, Cuda>,
        qkv: &CudaBuffer<bf16>,
        k_cache: &CudaBuffer<bf16>,
        v_cache: &CudaBuffer<bf16>,
        out: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        const OP: &str = "attention_paged";
        let lens = [qkv.len(), k_cache.len(), v_cache.len(), out.len()];
        let cache_pages = check_paged(heads, batch, lens)?;
        if batch.count == 0 {
            return Ok(());
        }
        let mut turn = self.turn(
            OP,
            &[batch.sequences, batch.pages, qkv, k_cache, v_cache, out],
        )?;
        let bytes = Kernels::attention_paged_scratch(heads, batch.count, batch.max_context);
        let scratch = turn.scratch(bytes)?;
        let pointers = PagedPointers {
            sequences: batch.sequences.address(),
            count: batch.count,
            rows: batch.rows,
            max_q_len: batch.max_q_len,
            max_context: batch.max_context,
            pages: batch.pages.address(),
            page_count: batch.pages.len(),
            cache_pages,
            faults: PagedFaults {
                q_len: turn.fault("q_len"),
                context: turn.fault("context"),
                q_start: turn.fault("q_start"),
                first_page: turn.fault("first_page"),
                page: turn.fault("pages"),
            },
        };
        // SAFETY: the lengths are checked, the kernels keep within them whatever the sequences say,
        // the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.attention_paged(
                turn.stream,
                heads,
                scale,
                pointers,
                qkv.address(),
                k_cache.address(),
                v_cache.address(),
                out.address(),
                scratch,
            )
        }
    }
}
