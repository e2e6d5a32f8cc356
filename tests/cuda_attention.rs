//! Attention on the emulator: against the f64 reference and the CPU, the equality of its paths to
//! the bit, bad indices, and its counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[allow(dead_code)] // the CPU's tests use all of it
#[path = "reference/attention.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::attention::{Attention, Heads, PAGE, PagedBatch, PagedSequence, Segment};
use dust_kernels::{Cpu, Cuda, Device, Error, Result};
use half::bf16;
use reference::{Cache, Results, heads, naive_f64, scale, segment};

/// Both passes, on outputs that are full of `fill` before; on either back end.
fn run<D: Device + Attention>(
    device: &D,
    rows: usize,
    h: Heads,
    segments: &[Segment],
    qkv: &[D::Elem],
    dout: &[D::Elem],
    fill: D::Elem,
) -> (Vec<D::Elem>, Vec<f32>, Vec<D::Elem>) {
    let (qkv, dout) = (up(device, qkv), up(device, dout));
    let mut out = up(device, &vec![fill; rows * h.out_width()]);
    let mut lse = up(device, &vec![7.5f32; rows * h.q_heads]);
    let mut delta = device.zeros(rows * h.q_heads).unwrap();
    let mut dqkv = up(device, &vec![fill; rows * h.qkv_width()]);
    device
        .attention(rows, h, scale(h), segments, &qkv, &mut out, &mut lse)
        .unwrap();
    device
        .attention_backward(
            rows,
            h,
            scale(h),
            segments,
            &qkv,
            &out,
            &lse,
            &dout,
            &mut delta,
            &mut dqkv,
        )
        .unwrap();
    (
        device.download(&out).unwrap(),
        device.download(&lse).unwrap(),
        device.download(&dqkv).unwrap(),
    )
}

fn inputs(seed: u64, rows: usize, h: Heads) -> (Vec<bf16>, Vec<bf16>) {
    (
        random(seed, rows * h.qkv_width()),
        random(seed + 1, rows * h.out_width()),
    )
}

/// Awkward lengths, a gap, and prefixes shared in whole and in part.
fn awkward() -> (usize, Vec<Segment>) {
    let segments = vec![
        segment(0, 1, 0, 0),
        segment(1, 7, 0, 0),
        segment(10, 66, 0, 0),
        segment(76, 5, 10, 66),
        segment(81, 40, 10, 64),
        segment(121, 3, 1, 7),
        segment(124, 0, 0, 0),
    ];
    (126, segments)
}

/// Both passes against f64, and against the CPU, which gets the same inputs. The limits come from a
/// computation in f64 that stores all it computes as bf16.
fn check(cuda: &Cuda, what: &str, rows: usize, h: Heads, segments: &[Segment]) {
    let (qkv, dout) = inputs(1, rows, h);
    let (out, lse, dqkv) = run(cuda, rows, h, segments, &qkv, &dout, bf16::ZERO);
    let reference = |round: fn(f64) -> f64| {
        let mut results = naive_f64(rows, h, segments, &wide(&qkv), &wide(&dout), round);
        // Rows that no segment covers are left as they are.
        for row in (0..rows).filter(|&row| !covered(segments, row)) {
            results.lse[row * h.q_heads..][..h.q_heads].fill(7.5);
        }
        results
    };
    let want = reference(|x| x);
    let naive = reference(|x| f64::from(bf16::from_f64(x).to_f32()));
    let hold = |side: &str, want: &Results<f64>| {
        let name = |part| format!("{part} of {h:?}, {what}, {side}");
        assert_close(&name("out"), &wide(&out), &naive.out, &want.out, 2.0);
        assert_close(&name("dqkv"), &wide(&dqkv), &naive.dqkv, &want.dqkv, 2.0);
        // The log-sum-exp never passes through bf16.
        let lse_error = error(&wide(&lse), &want.lse);
        assert!(lse_error < 2e-5, "{}: {lse_error:e}", name("lse"));
    };
    hold("f64", &want);
    let cpu = Cpu::with_threads(1);
    let (qkv, dout) = (to_f32(&qkv), to_f32(&dout));
    let (out, lse, dqkv) = run(&cpu, rows, h, segments, &qkv, &dout, 0.0);
    hold(
        "CPU",
        &Results {
            out: wide(&out),
            lse: wide(&lse),
            dqkv: wide(&dqkv),
        },
    );
}

fn covered(segments: &[Segment], row: usize) -> bool {
    let mut segments = segments.iter();
    segments.any(|s| (s.start..s.start + s.len).contains(&(row as u32)))
}

#[test]
fn agrees_with_f64_and_the_cpu_under_every_schedule() {
    let (rows, segments) = awkward();
    // Two chunks of keys: 256 and 4.
    let long = [segment(0, 260, 0, 0)];
    for_each_schedule(|name, cuda| {
        check(cuda, name, rows, heads(3, 1, 64), &segments);
        check(cuda, name, 260, heads(1, 1, 64), &long);
    });
}

#[test]
fn agrees_with_f64_and_the_cpu_on_other_heads() {
    let (rows, segments) = awkward();
    with_cuda(|cuda, _| {
        check(cuda, "serial", rows, heads(2, 2, 128), &segments);
        check(cuda, "serial", rows, heads(4, 2, 64), &segments);
        // Three chunks of keys, the second and third begun by prefixes.
        let long = [
            segment(0, 514, 0, 0),
            segment(514, 3, 0, 513),
            segment(517, 70, 0, 250),
        ];
        check(cuda, "long", 587, heads(1, 1, 128), &long);
    });
}

#[test]
fn rows_outside_of_segments_are_left_alone_and_bits_repeat() {
    let (rows, segments) = awkward();
    let h = heads(2, 1, 128);
    let (qkv, dout) = inputs(5, rows, h);
    let fill = bf16::from_f32(7.5);
    with_cuda(|cuda, _| {
        let (out, lse, dqkv) = run(cuda, rows, h, &segments, &qkv, &dout, fill);
        for row in 0..rows {
            let untouched = [
                out[row * h.out_width()..][..h.out_width()]
                    .iter()
                    .all(|&x| x == fill),
                lse[row * h.q_heads..][..h.q_heads]
                    .iter()
                    .all(|&x| x == 7.5),
                dqkv[row * h.qkv_width()..][..h.qkv_width()]
                    .iter()
                    .all(|&x| x == fill),
            ];
            assert_eq!(untouched, [!covered(&segments, row); 3], "row {row}");
        }
        let again = run(cuda, rows, h, &segments, &qkv, &dout, fill);
        assert_eq!(bits(&out), bits(&again.0));
        assert_eq!(bits(&lse), bits(&again.1));
        assert_eq!(bits(&dqkv), bits(&again.2));
    });
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_a_batch() {
    let (rows, segments) = awkward();
    let (start, len) = (10, 66);
    for h in [heads(3, 1, 64), heads(2, 2, 128)] {
        let (w, o) = (h.qkv_width(), h.out_width());
        let (mut qkv, dout) = inputs(9, rows, h);
        with_cuda(|cuda, _| {
            let own = &qkv[start * w..][..len * w];
            let whole = [segment(0, len as u32, 0, 0)];
            let own_dout = &dout[start * o..][..len * o];
            let alone = run(cuda, len, h, &whole, own, own_dout, bf16::ZERO);
            // Everything around the sequence is NaN, which must not get in.
            let others: Vec<_> = segments
                .iter()
                .filter(|s| s.prefix_start != start as u32)
                .copied()
                .collect();
            for (at, x) in qkv.iter_mut().enumerate() {
                if !(start * w..(start + len) * w).contains(&at) {
                    *x = bf16::NAN;
                }
            }
            let batch = run(cuda, rows, h, &others, &qkv, &dout, bf16::ZERO);
            assert_eq!(bits(&alone.0), bits(&batch.0[start * o..][..len * o]));
            let lse = &batch.1[start * h.q_heads..][..len * h.q_heads];
            assert_eq!(bits(&alone.1), bits(lse));
            assert_eq!(bits(&alone.2), bits(&batch.2[start * w..][..len * w]));
        });
    }
}

/// Prefix and answers in the layout of training, against every other way to compute them.
fn paths_agree(cuda: &Cuda, what: &str, h: Heads, prefix: usize, answers: &[usize]) {
    let (w, o) = (h.qkv_width(), h.out_width());
    let rows = prefix + answers.iter().sum::<usize>();
    let qkv = random(11, rows * w);
    let mut segments = vec![segment(0, prefix as u32, 0, 0)];
    let mut start = prefix;
    for &len in answers {
        segments.push(segment(start as u32, len as u32, 0, prefix as u32));
        start += len;
    }
    let forward = |rows: usize, segments: &[Segment], qkv: &[bf16]| {
        let qkv = up(cuda, qkv);
        let mut out = cuda.zeros(rows * o).unwrap();
        let mut lse = cuda.zeros(rows * h.q_heads).unwrap();
        cuda.attention(rows, h, scale(h), segments, &qkv, &mut out, &mut lse)
            .unwrap();
        cuda.download(&out).unwrap()
    };
    let shared = forward(rows, &segments, &qkv);

    let longest = prefix + answers.iter().max().unwrap();
    let mut cache = Cache::new(cuda, h, answers.len(), longest);
    let mut sequences = Vec::new();
    for (answer, &len) in answers.iter().enumerate() {
        let own = segments[answer + 1].start as usize;
        let sequence = [&qkv[..prefix * w], &qkv[own * w..(own + len) * w]].concat();
        let total = prefix + len;
        let want = [&shared[..prefix * o], &shared[own * o..(own + len) * o]].concat();

        let packed = forward(total, &[segment(0, total as u32, 0, 0)], &sequence);
        assert_eq!(bits(&packed), bits(&want), "{h:?} packed, {what}");
        let whole = Cache::new(cuda, h, 1, total).call(&[(0, 0, total)], &sequence, 0);
        assert_eq!(bits(&whole), bits(&want), "{h:?} prefill, {what}");
        let mut pieces = Cache::new(cuda, h, 1, total);
        for first in (0..total).step_by(37) {
            let len = 37.min(total - first);
            let out = pieces.call(&[(0, first, len)], &sequence[first * w..][..len * w], 0);
            let want = &want[first * o..][..len * o];
            assert_eq!(bits(&out), bits(want), "{h:?} prefill from {first}, {what}");
        }
        // The prompt but for its last two tokens, for the decoding below.
        let (first, calls) = (prefix - 2, [(answer, 0, prefix - 2)]);
        cache.call(&calls, &sequence[..first * w], 0);
        sequences.push((sequence, want));
    }
    // Token by token, all answers in one batch of falling size, beside the prefill of another.
    for token in prefix - 2..longest {
        let mut calls = Vec::new();
        let mut input = Vec::new();
        let mut want: Vec<bf16> = Vec::new();
        for (answer, (sequence, out)) in sequences.iter().enumerate() {
            if token < prefix + answers[answer] {
                calls.push((answer, token, 1));
                input.extend(&sequence[token * w..][..w]);
                want.extend(&out[token * o..][..o]);
            }
        }
        let out = cache.call(&calls, &input, token % 3);
        assert_eq!(bits(&out), bits(&want), "{h:?} decode at {token}, {what}");
    }
    let mut cache = Cache::new(cuda, h, 2, longest);
    let (sequence, want) = &sequences[0];
    cache.call(
        &[(0, 0, 9), (1, 0, 5)],
        &[&sequence[..9 * w], &sequence[..5 * w]].concat(),
        0,
    );
    let input = [&sequence[9 * w..10 * w], &sequence[5 * w..12 * w]].concat();
    let out = cache.call(&[(0, 9, 1), (1, 5, 7)], &input, 1);
    let want = [&want[9 * o..10 * o], &want[5 * o..12 * o]].concat();
    assert_eq!(bits(&out), bits(&want), "{h:?} mixed, {what}");
}

#[test]
fn training_shared_prefix_prefill_and_decode_have_the_same_bits() {
    for_each_schedule(|name, cuda| {
        // Across the end of a tile, and of a chunk.
        paths_agree(cuda, name, heads(3, 1, 64), 62, &[5, 1]);
        paths_agree(cuda, name, heads(1, 1, 64), 254, &[5, 1]);
    });
    with_cuda(|cuda, _| {
        paths_agree(cuda, "serial", heads(4, 2, 128), 127, &[3, 4]);
        paths_agree(cuda, "serial", heads(2, 1, 128), 511, &[3, 2]);
        // More heads than an mma has lines.
        paths_agree(cuda, "serial", heads(18, 1, 64), 64, &[2]);
        paths_agree(cuda, "serial", heads(18, 1, 64), 257, &[1]);
    });
}

/// A sequence of two query rows after a random cache, and its last row alone.
#[test]
fn a_long_context_decodes_to_the_bits_of_prefill() {
    with_cuda(|cuda, _| {
        let h = heads(2, 1, 64);
        // 33 chunks: a lane of the merging warp looks after two.
        let longest = 32 * 256 + 70_usize;
        let pages = longest.div_ceil(PAGE);
        let cached = pages * PAGE * h.kv_width();
        let (k, v) = (up(cuda, &random(1, cached)), up(cuda, &random(2, cached)));
        let qkv = up(cuda, &random(3, 2 * h.qkv_width()));
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        let table = up(cuda, &table);
        for context in [255, 256, 257, 320, 321, 512, 513, longest] {
            let last_row = |q_start: u32| {
                let sequence = PagedSequence {
                    q_start,
                    q_len: 2 - q_start,
                    context: context as u32,
                    first_page: 0,
                };
                let batch = PagedBatch {
                    sequences: &up(cuda, &[sequence]),
                    count: 1,
                    rows: 2,
                    max_q_len: 2,
                    max_context: longest,
                    pages: &table,
                };
                let mut out = cuda.zeros(2 * h.out_width()).unwrap();
                cuda.attention_paged(h, scale(h), batch, &qkv, &k, &v, &mut out)
                    .unwrap();
                bits(&cuda.download(&out).unwrap()[h.out_width()..])
            };
            assert!(last_row(1) == last_row(0), "{context}");
        }
    });
}

#[test]
fn refuses_what_breaks_the_rules() {
    with_cuda(|cuda, _| {
        let h = heads(2, 1, 64);
        let rows = 10;
        let call = |h: Heads, segments: &[Segment], out: usize| {
            let qkv = cuda.zeros(rows * h.qkv_width()).unwrap();
            let (mut out, mut lse) = (cuda.zeros(out).unwrap(), cuda.zeros(rows * 2).unwrap());
            cuda.attention(rows, h, 1.0, segments, &qkv, &mut out, &mut lse)
        };
        let good = [segment(0, 4, 0, 0), segment(4, 3, 0, 4)];
        assert_eq!(call(h, &good, rows * 128), Ok(()));
        assert_eq!(call(h, &[], rows * 128), Ok(()));
        assert!(matches!(
            call(h, &good, rows * 128 - 1),
            Err(Error::TooShort { name: "out", .. })
        ));
        for (h, segments, rule) in [
            (heads(2, 1, 32), &good[..], "64 and 128"),
            (heads(2, 1, 64), &[segment(8, 3, 0, 0)], "beyond"),
            (heads(2, 1, 64), &[segment(4, 1, 0, 2)], "prefix"),
            (heads(1, 2, 64), &[], "multiple"),
        ] {
            let error = call(h, segments, rows * 128).unwrap_err().to_string();
            assert!(error.contains(rule), "{error}");
        }
    });
}

/// What a paged call of one sequence reports.
fn paged(cuda: &Cuda, sequence: (u32, u32, u32, u32), pages: &[u32]) -> Result<()> {
    let h = heads(2, 1, 64);
    let (q_start, q_len, context, first_page) = sequence;
    let sequence = PagedSequence {
        q_start,
        q_len,
        context,
        first_page,
    };
    let batch = PagedBatch {
        sequences: &up(cuda, &[PagedSequence::default(), sequence]),
        count: 2,
        rows: 3,
        max_q_len: 2,
        max_context: 129,
        pages: &up(cuda, pages),
    };
    let qkv = up(cuda, &vec![bf16::ONE; 3 * h.qkv_width()]);
    let cache = up(cuda, &vec![bf16::ONE; 2 * PAGE * h.kv_width()]);
    let mut out = cuda.zeros(3 * h.out_width())?;
    cuda.attention_paged(h, 1.0, batch, &qkv, &cache, &cache, &mut out)?;
    cuda.download(&out)?;
    Ok(())
}

#[test]
fn bad_indices_are_reported_and_memory_is_left_alone() {
    with_cuda(|cuda, _| {
        let pages = [1, 0, 2];
        assert_eq!(paged(cuda, (2, 1, 128, 0), &pages), Ok(()));
        assert_eq!(paged(cuda, (1, 2, 128, 0), &pages), Ok(()));
        assert_eq!(paged(cuda, (9, 0, 999, 9), &pages), Ok(()));
        for (sequence, name, at, value, limit) in [
            ((0, 1, 64, 2), "pages", 2, 2, 2),
            ((0, 2, 129, 0), "pages", 2, 2, 2),
            ((0, 1, 129, 0), "pages", 2, 2, 2),
            ((0, 1, 129, 1), "first_page", 1, 1, 1),
            ((0, 1, 1, u32::MAX), "first_page", 1, u32::MAX as usize, 3),
            ((0, 1, 130, 0), "context", 1, 130, 130),
            ((0, 3, 9, 0), "q_len", 1, 3, 3),
            ((0, 2, 1, 0), "q_len", 1, 2, 2),
            ((3, 1, 9, 0), "q_start", 1, 3, 3),
            ((u32::MAX, 1, 9, 0), "q_start", 1, u32::MAX as usize, 3),
        ] {
            let want = Error::OutOfRange {
                op: "attention_paged",
                name,
                at,
                value,
                limit,
            };
            assert_eq!(paged(cuda, sequence, &pages), Err(want), "{sequence:?}");
        }
        // The report is taken: the device goes on.
        assert_eq!(paged(cuda, (2, 1, 128, 0), &pages), Ok(()));

        let h = heads(2, 1, 64);
        let qkv = up(cuda, &vec![bf16::ONE; 3 * h.qkv_width()]);
        let mut k = cuda.zeros(2 * PAGE * h.kv_width()).unwrap();
        let mut v = cuda.zeros(2 * PAGE * h.kv_width()).unwrap();
        let slots = up(cuda, &[0u32, 128, 127]);
        cuda.cache_write(3, h, &qkv, &slots, &mut k, &mut v)
            .unwrap();
        let error = cuda.download(&k).unwrap_err();
        assert!(
            matches!(
                error,
                Error::OutOfRange {
                    op: "cache_write",
                    name: "slots",
                    at: 1,
                    value: 128,
                    limit: 128,
                }
            ),
            "{error}"
        );
        let k = cuda.download(&k).unwrap();
        let written = |slot: usize| k[slot * 64..][..64].iter().all(|&x| x == bf16::ONE);
        assert!(written(0) && written(127) && !written(1) && !written(126));
        assert!(
            cuda.cache_write(4, h, &qkv, &slots, &mut v, &mut cuda.zeros(1).unwrap())
                .is_err()
        );
    });
}

#[test]
fn a_captured_decode_serves_later_steps() {
    with_cuda(|cuda, _| {
        let h = heads(2, 1, 64);
        let qkv = up(cuda, &random(1, 2 * h.qkv_width()));
        // Six pages a sequence: up to two chunks.
        let cache = up(cuda, &random(2, 12 * PAGE * h.kv_width()));
        let pages = up(cuda, &[3u32, 1, 10, 0, 2, 8, 5, 11, 4, 9, 7, 6]);
        let mut sequences = cuda.zeros(2).unwrap();
        let step = |contexts: [u32; 2]| {
            let sequence = |i: usize| PagedSequence {
                q_start: i as u32,
                q_len: 1,
                context: contexts[i],
                first_page: 6 * i as u32,
            };
            [sequence(0), sequence(1)]
        };
        let attend = |sequences: &_, out: &mut _| {
            let batch = PagedBatch {
                sequences,
                count: 2,
                rows: 2,
                max_q_len: 1,
                max_context: 6 * PAGE,
                pages: &pages,
            };
            cuda.attention_paged(h, scale(h), batch, &qkv, &cache, &cache, out)
                .unwrap();
        };
        let steps = [[1, 64], [65, 384], [257, 128], [256, 300], [100, 3]].map(step);
        let want = steps.map(|step| {
            cuda.write(&mut sequences, 0, &step).unwrap();
            let mut out = cuda.zeros(2 * h.out_width()).unwrap();
            attend(&sequences, &mut out);
            bits(&cuda.download(&out).unwrap())
        });
        let mut out = cuda.zeros::<bf16>(2 * h.out_width()).unwrap();
        let graph = cuda.record(|| {
            attend(&sequences, &mut out);
            Ok::<_, Error>(())
        });
        let graph = graph.unwrap().unwrap();
        for (step, want) in steps.iter().zip(want) {
            cuda.write(&mut sequences, 0, step).unwrap();
            // SAFETY: the buffers are alive.
            unsafe { cuda.replay(&graph) }.unwrap();
            assert_eq!(bits(&cuda.download(&out).unwrap()), want);
        }
    });
}

#[test]
fn multiply_adds_are_in_mma_and_memory_is_used_well() {
    with_emulator(|cuda, emulator| {
        for head_dim in [64, 128] {
            let h = heads(2, 1, head_dim);
            let rows = 128;
            let segments = [segment(0, rows as u32, 0, 0)];
            let (qkv, dout) = inputs(3, rows, h);
            let (qkv, dout) = (up(cuda, &qkv), up(cuda, &dout));
            let mut out = cuda.zeros(rows * h.out_width()).unwrap();
            let mut lse = cuda.zeros(rows * h.q_heads).unwrap();
            let mut delta = cuda.zeros(rows * h.q_heads).unwrap();
            let mut dqkv = cuda.zeros(rows * h.qkv_width()).unwrap();
            let mut reports = reports_of(emulator, || {
                cuda.attention(rows, h, scale(h), &segments, &qkv, &mut out, &mut lse)
            });
            reports.extend(reports_of(emulator, || {
                cuda.attention_backward(
                    rows,
                    h,
                    scale(h),
                    &segments,
                    &qkv,
                    &out,
                    &lse,
                    &dout,
                    &mut delta,
                    &mut dqkv,
                )
            }));
            // 4 tiles of 32 rows see 1, 1, 2, 2 chunks of keys.
            let product = 2 * 6 * 64 * 64 * head_dim as u64;
            // The lines from each of 2 chunks of keys on.
            let transposed = 2 * (256 + 128) * 64 * head_dim as u64;
            for (kernel, mma_flops) in [
                ("attention_forward", 2 * product),
                ("attention_delta", 0),
                ("attention_dq", 3 * product),
                ("attention_dkv", 4 * transposed),
            ] {
                let report = reports.iter().find(|r| r.kernel.starts_with(kernel));
                let report = report.unwrap();
                let counters = &report.counters;
                assert_eq!(counters.mma_flops, mma_flops, "{kernel} {head_dim}");
                if mma_flops > 0 {
                    assert!(counters.flops * 10 < mma_flops, "{kernel} {head_dim}");
                }
                assert_eq!(report.findings, []);
                assert!(counters.sector_use() >= 0.9, "{kernel} {head_dim}");
                let conflicts = counters.bank_conflicts as f64;
                let wavefronts = counters.shared_wavefronts as f64;
                assert!(conflicts <= 0.05 * wavefronts, "{kernel} {head_dim}");
                assert_eq!((counters.local_bytes, counters.atomics), (0, 0));
            }
        }
    });
}

#[test]
fn decode_moves_the_least_bytes() {
    with_emulator(|cuda, emulator| {
        // Seven query heads to a key/value head, as Qwen2.5-0.5B has, have the most states.
        let shapes = [heads(7, 1, 64), heads(6, 2, 64), heads(7, 1, 128)];
        for (h, context) in shapes
            .map(|h| [(h, 100_usize), (h, 512), (h, 700)])
            .concat()
        {
            let (count, pages) = (2, context.div_ceil(PAGE));
            let cached = count * pages * PAGE * h.kv_width();
            let (k, v) = (up(cuda, &random(1, cached)), up(cuda, &random(2, cached)));
            let table: Vec<u32> = (0..(count * pages) as u32).collect();
            let sequence = |i: usize| PagedSequence {
                q_start: i as u32,
                q_len: 1,
                context: context as u32,
                first_page: (i * pages) as u32,
            };
            let batch = PagedBatch {
                sequences: &up(cuda, &[sequence(0), sequence(1)]),
                count,
                rows: count,
                max_q_len: 1,
                max_context: context,
                pages: &up(cuda, &table),
            };
            let qkv = up(cuda, &random(3, count * h.qkv_width()));
            let mut out = cuda.zeros(count * h.out_width()).unwrap();
            let reports = reports_of(emulator, || {
                cuda.attention_paged(h, scale(h), batch, &qkv, &k, &v, &mut out)
            });
            let names = ["attention_decode", "attention_merge"];
            let names = names.map(|name| format!("{name}_{}", h.head_dim));
            let found: Vec<_> = reports.iter().map(|r| r.kernel.as_str()).collect();
            assert_eq!(found, names);
            // Keys and values, queries and outputs, sequences and page numbers once.
            let rows = count * (2 * context * h.kv_width() + 2 * h.out_width());
            let least = 2 * rows + count * (16 + 4 * pages);
            let what = format!("decode of {context}, {h:?}");
            Costs::memory_bound(least).check(&what, &reports);
            let counters = &reports[0].counters;
            assert!(counters.flops * 10 < counters.mma_flops, "{what}");
        }
    });
}
