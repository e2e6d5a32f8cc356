//! Launches of `kernels/logprob.cu`.

use super::gemm::{LARGE, Tile, by_rows};
use super::launch::{Fault, Grid, Kernels, check_width, device_error, dim};
use super::{Cuda, CudaBuffer, bf16_weight};
use crate::logprob::{
    HeadShape, Logprob, check_logits, check_logprob, check_logprob_backward, inverse_temperature,
};
use crate::{Buffer, Result, Weight};
use cudarc::driver::result;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use half::bf16;

/// `Middle` and `Small` of `logprob.cu`, twice as wide as those of linear layers.
const MIDDLE: Tile = Tile {
    rows: 64,
    columns: 128,
    threads: 128,
    shared: 48 << 10,
};
const SMALL: Tile = Tile {
    rows: 16,
    columns: 128,
    threads: 128,
    shared: 72 << 10,
};

/// Logits that one state reduces, and the bytes of a state.
pub(super) const UNIT: usize = 128;
pub(super) const STATE: usize = 16;
/// Threads of a block that merges a row's states.
pub(super) const FINISH_THREADS: usize = 256;
/// Rows whose states are held at once: 37 MiB with 151,936 tokens.
const STATE_ROWS: usize = 2048;
/// Rows and tokens of the logits' gradients that are held at once, as bf16: 32 MiB. They set where
/// sums are cut; a multiple of the tile and of [`UNIT`].
const ROWS: usize = 2048;
const TOKENS: usize = 8192;
/// Threads of a block that copies a row.
const COPY_THREADS: usize = 128;

/// Where the parts of the backward pass's scratch memory begin, in bytes.
struct Scratch {
    active: usize,
    count: usize,
    x: usize,
    sums: usize,
    dz: usize,
    end: usize,
}

impl Scratch {
    fn new(shape: HeadShape) -> Self {
        let (rows, tokens) = chunk(shape);
        let aligned = |bytes: usize| bytes.saturating_add(255) & !255;
        let active = 0;
        let count = aligned(shape.rows.saturating_mul(4));
        let x = count + 256;
        let sums = x.saturating_add(aligned(rows.saturating_mul(2 * shape.hidden)));
        let dz = sums.saturating_add(aligned(rows.saturating_mul(4 * shape.hidden)));
        let end = dz.saturating_add(2 * rows * tokens);
        Self {
            active,
            count,
            x,
            sums,
            dz,
            end,
        }
    }
}

/// Rows and tokens of a chunk of the backward pass.
fn chunk(shape: HeadShape) -> (usize, usize) {
    (
        shape.rows.min(ROWS),
        shape.vocab.next_multiple_of(UNIT).min(TOKENS),
    )
}

fn check_hidden(op: &'static str, shape: HeadShape) -> Result<i32> {
    check_width(op, "hidden", shape.hidden)?;
    // The kernels add a tile's width to them.
    dim(op, "rows", shape.rows.saturating_add(UNIT))?;
    dim(op, "vocab", shape.vocab.saturating_add(UNIT))?;
    dim(op, "hidden", shape.hidden)
}

impl Kernels {
    /// Bytes of scratch memory of [`Kernels::logprob`].
    pub fn logprob_scratch(shape: HeadShape) -> usize {
        let units = shape.vocab.div_ceil(UNIT);
        shape.rows.min(STATE_ROWS).saturating_mul(units * STATE)
    }

    /// [`Logprob::logprob`] on device pointers, with `1 / temperature`.
    ///
    /// # Errors
    /// A hidden width that is no multiple of 8; what the driver reports. A target outside of the
    /// vocabulary is noted in `fault`, and its row's log-probability is NaN.
    ///
    /// # Safety
    /// This value's context is current and `stream` belongs to it. `x` holds `rows * hidden` bf16,
    /// `head` `vocab * hidden`, `targets` `rows` u32, `logprob`, `lse` and `entropy` `rows` f32 each,
    /// `scratch` as many bytes as [`Kernels::logprob_scratch`] says; all are aligned to 16 bytes and
    /// live until the work is done, and what is written overlaps nothing.
    pub unsafe fn logprob(
        &self,
        stream: CUstream,
        shape: HeadShape,
        inverse_temperature: f32,
        x: CUdeviceptr,
        head: CUdeviceptr,
        targets: CUdeviceptr,
        logprob: CUdeviceptr,
        lse: CUdeviceptr,
        entropy: CUdeviceptr,
        fault: Fault,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        let hidden = check_hidden("logprob", shape)?;
        let units = shape.vocab.div_ceil(UNIT);
        let (vocab, count) = (shape.vocab as i32, units as i32);
        for first in (0..shape.rows).step_by(STATE_ROWS) {
            let here = STATE_ROWS.min(shape.rows - first);
            let rows = here as i32;
            let row = |address: CUdeviceptr| address + 4 * first as CUdeviceptr;
            let x = x + (2 * first * shape.hidden) as CUdeviceptr;
            let (targets, logprob) = (row(targets), row(logprob));
            let (lse, entropy) = (row(lse), row(entropy));
            // SAFETY: by the caller; the first kernel leaves each target's z in `logprob`, and a state
            // for each row and unit in `scratch`, which the second reads.
            unsafe {
                self.launch(
                    stream,
                    "logprob_states",
                    LARGE.grid(here, shape.vocab),
                    &[
                        &x,
                        &head,
                        &targets,
                        &inverse_temperature,
                        &scratch,
                        &logprob,
                        &rows,
                        &hidden,
                        &vocab,
                        &count,
                    ],
                )?;
                self.launch(
                    stream,
                    "logprob_finish",
                    Grid::new(here, FINISH_THREADS),
                    &[
                        &scratch,
                        &targets,
                        &logprob,
                        &lse,
                        &entropy,
                        &count,
                        &(vocab as u32),
                        &(first as u32),
                        &fault,
                    ],
                )?;
            }
        }
        Ok(())
    }

    /// Bytes of scratch memory of [`Kernels::logprob_backward`].
    pub fn logprob_backward_scratch(shape: HeadShape) -> usize {
        Scratch::new(shape).end
    }

    /// [`Logprob::logprob_backward`] on device pointers, with `1 / temperature`; `dhead` may be 0.
    ///
    /// # Errors
    /// As [`Kernels::logprob`].
    ///
    /// # Safety
    /// As [`Kernels::logprob`]; `lse` and `dlogprob` hold `rows` f32, `dx` `rows * hidden` bf16,
    /// `dhead`, unless 0, `vocab * hidden` f32, `scratch` as many bytes as
    /// [`Kernels::logprob_backward_scratch`] says.
    pub unsafe fn logprob_backward(
        &self,
        stream: CUstream,
        shape: HeadShape,
        inverse_temperature: f32,
        x: CUdeviceptr,
        head: CUdeviceptr,
        targets: CUdeviceptr,
        lse: CUdeviceptr,
        dlogprob: CUdeviceptr,
        dx: CUdeviceptr,
        dhead: CUdeviceptr,
        fault: Fault,
        scratch: CUdeviceptr,
    ) -> Result<()> {
        const OP: &str = "logprob_backward";
        let hidden = check_hidden(OP, shape)?;
        if shape.rows == 0 || shape.hidden == 0 {
            return Ok(());
        }
        let layout = Scratch::new(shape);
        let part = |at: usize| scratch + at as CUdeviceptr;
        let (active, count) = (part(layout.active), part(layout.count));
        let (gathered, sums, dz) = (part(layout.x), part(layout.sums), part(layout.dz));
        let (rows, vocab) = (shape.rows as i32, shape.vocab as u32);
        let (most, stride) = chunk(shape);
        let copy = Grid::new(most, COPY_THREADS);
        // SAFETY: by the caller; the parts of `scratch` lie side by side, as `Scratch` says. Chunks lie
        // inside of the rows and the vocabulary.
        unsafe {
            result::memset_d8_async(dx, 0, 2 * shape.rows * shape.hidden, stream)
                .map_err(|e| device_error(OP, e))?;
            self.launch(
                stream,
                "logprob_active",
                Grid::new(1, 1024),
                &[&dlogprob, &targets, &active, &count, &rows, &vocab, &fault],
            )?;
            for first in (0..shape.rows).step_by(ROWS) {
                let (first, rows, stride) = (first as i32, most as i32, stride as i32);
                self.launch(
                    stream,
                    "logprob_gather",
                    copy,
                    &[&x, &active, &count, &gathered, &first, &rows, &hidden],
                )?;
                for token in (0..shape.vocab).step_by(TOKENS) {
                    let span = TOKENS.min(shape.vocab - token);
                    let head = head + (2 * token * shape.hidden) as CUdeviceptr;
                    let (tokens, add) = (span as i32, i32::from(token > 0));
                    let from = token as i32;
                    self.launch(
                        stream,
                        "logprob_gradient",
                        LARGE.grid(most, span),
                        &[
                            &gathered,
                            &head,
                            &targets,
                            &lse,
                            &dlogprob,
                            &active,
                            &count,
                            &inverse_temperature,
                            &dz,
                            &first,
                            &rows,
                            &from,
                            &tokens,
                            &hidden,
                            &stride,
                        ],
                    )?;
                    self.launch(
                        stream,
                        "logprob_dx",
                        LARGE.grid(most, shape.hidden),
                        &[
                            &dz, &head, &count, &sums, &first, &rows, &tokens, &hidden, &stride,
                            &add,
                        ],
                    )?;
                    if dhead != 0 {
                        let dhead = dhead + (4 * token * shape.hidden) as CUdeviceptr;
                        self.launch(
                            stream,
                            "logprob_dhead",
                            LARGE.grid(span, shape.hidden),
                            &[
                                &dz, &gathered, &count, &dhead, &first, &rows, &tokens, &hidden,
                                &stride,
                            ],
                        )?;
                    }
                }
                self.launch(
                    stream,
                    "logprob_scatter",
                    copy,
                    &[&sums, &active, &count, &dx, &first, &rows, &hidden],
                )?;
            }
        }
        Ok(())
    }

    /// [`Logprob::logits`] on device pointers.
    ///
    /// # Errors
    /// A hidden width that is no multiple of 8; what the driver reports.
    ///
    /// # Safety
    /// As [`Kernels::logprob`]; `logits` holds `rows * vocab` f32 and overlaps nothing.
    pub unsafe fn logits(
        &self,
        stream: CUstream,
        shape: HeadShape,
        x: CUdeviceptr,
        head: CUdeviceptr,
        logits: CUdeviceptr,
    ) -> Result<()> {
        let hidden = check_hidden("logits", shape)?;
        let tiles = [
            ("logits_small", SMALL),
            ("logits_middle", MIDDLE),
            ("logits_large", LARGE),
        ];
        let (entry, tile) = by_rows(shape.rows, tiles);
        let (rows, vocab) = (shape.rows as i32, shape.vocab as i32);
        let grid = tile.grid(shape.rows, shape.vocab);
        // SAFETY: by the caller.
        unsafe {
            self.launch(
                stream,
                entry,
                grid,
                &[&x, &head, &logits, &rows, &hidden, &vocab],
            )
        }
    }
}

impl Logprob for Cuda {
    fn logprob(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &CudaBuffer<bf16>,
        head: Weight<'_, Self>,
        targets: &CudaBuffer<u32>,
        logprob: &mut CudaBuffer<f32>,
        lse: &mut CudaBuffer<f32>,
        entropy: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        const OP: &str = "logprob";
        let inverse = inverse_temperature(OP, temperature)?;
        let inputs = [x.len(), head.len(), targets.len()];
        check_logprob(shape, inputs, [logprob.len(), lse.len(), entropy.len()])?;
        let head = bf16_weight(OP, head)?;
        let mut turn = self.turn(OP, &[x, head, targets, logprob, lse, entropy])?;
        let scratch = turn.scratch(Kernels::logprob_scratch(shape))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.logprob(
                turn.stream,
                shape,
                inverse,
                x.address(),
                head.address(),
                targets.address(),
                logprob.address(),
                lse.address(),
                entropy.address(),
                turn.fault("targets"),
                scratch,
            )
        }
    }

    fn logprob_backward(
        &self,
        shape: HeadShape,
        temperature: f32,
        x: &CudaBuffer<bf16>,
        head: Weight<'_, Self>,
        targets: &CudaBuffer<u32>,
        lse: &CudaBuffer<f32>,
        dlogprob: &CudaBuffer<f32>,
        dx: &mut CudaBuffer<bf16>,
        dhead: Option<&mut CudaBuffer<f32>>,
    ) -> Result<()> {
        const OP: &str = "logprob_backward";
        let inverse = inverse_temperature(OP, temperature)?;
        let inputs = [x.len(), head.len(), targets.len()];
        let gradients = [lse.len(), dlogprob.len(), dx.len()];
        let dhead_len = dhead.as_ref().map(|d| d.len());
        check_logprob_backward(shape, inputs, gradients, dhead_len)?;
        let head = bf16_weight(OP, head)?;
        let mut turn = self.turn(OP, &[x, head, targets, lse, dlogprob, dx, &dhead])?;
        let scratch = turn.scratch(Kernels::logprob_backward_scratch(shape))?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.logprob_backward(
                turn.stream,
                shape,
                inverse,
                x.address(),
                head.address(),
                targets.address(),
                lse.address(),
                dlogprob.address(),
                dx.address(),
                dhead.map_or(0, |d| d.address()),
                turn.fault("targets"),
                scratch,
            )
        }
    }

    fn logits(
        &self,
        shape: HeadShape,
        x: &CudaBuffer<bf16>,
        head: Weight<'_, Self>,
        logits: &mut CudaBuffer<f32>,
    ) -> Result<()> {
        const OP: &str = "logits";
        check_logits(shape, x.len(), head.len(), logits.len())?;
        let head = bf16_weight(OP, head)?;
        let turn = self.turn(OP, &[x, head, logits])?;
        // SAFETY: the lengths are checked, the buffers are distinct and live on this stream.
        unsafe {
            turn.kernels.logits(
                turn.stream,
                shape,
                x.address(),
                head.address(),
                logits.address(),
            )
        }
    }
}
