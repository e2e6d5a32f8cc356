//! Attention against an f64 reference, and the equality of its paths to the bit.

use dust_kernels::attention::{Attention, Heads, PAGE, PagedBatch, PagedSequence, Segment};
use dust_kernels::cpu::Level;
use dust_kernels::{Cpu, Device, Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::{Cache, Results, heads, naive_f32, naive_f64, scale, segment};

#[path = "reference/attention.rs"]
mod reference;

const SHAPES: [Heads; 5] = [
    heads(9, 3, 64),
    heads(4, 4, 16),
    heads(14, 2, 64),
    heads(4, 1, 128),
    heads(3, 3, 20),
];

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Both passes of the kernel, on outputs that are full of `fill` before.
fn kernel(
    cpu: &Cpu,
    rows: usize,
    h: Heads,
    segments: &[Segment],
    qkv: &[f32],
    dout: &[f32],
    fill: f32,
) -> Results<f32> {
    let run = || -> Result<Results<f32>> {
        let qkv = cpu.upload(qkv)?;
        let dout = cpu.upload(dout)?;
        let mut out = cpu.upload(&vec![fill; rows * h.out_width()])?;
        let mut lse = cpu.upload(&vec![fill; rows * h.q_heads])?;
        let mut delta = cpu.upload(&vec![fill; rows * h.q_heads])?;
        let mut dqkv = cpu.upload(&vec![fill; rows * h.qkv_width()])?;
        cpu.attention(rows, h, scale(h), segments, &qkv, &mut out, &mut lse)?;
        cpu.attention_backward(
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
        )?;
        Ok(Results {
            out: cpu.download(&out)?,
            lse: cpu.download(&lse)?,
            dqkv: cpu.download(&dqkv)?,
        })
    };
    run().unwrap()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Root mean square and greatest error against `want`, where `want` is not exactly 0.
fn errors(got: &[f32], want: &[f64]) -> (f64, f64) {
    let errors = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).abs());
    let (sum, max) = errors.fold((0.0, 0.0), |(sum, max): (f64, f64), e| {
        assert!(e.is_finite());
        (sum + e * e, max.max(e))
    });
    ((sum / want.len() as f64).sqrt(), max)
}

fn assert_close(what: &str, got: &[f32], naive: &[f32], want: &[f64], factor: f64) {
    let size = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
    let floor = 1e-7 * size;
    let (got, naive) = (errors(got, want), errors(naive, want));
    assert!(
        got.0 <= factor * naive.0 + floor && got.1 <= factor * naive.1 + floor,
        "{what}: errors (rms, max) {got:?}, naive {naive:?}, floor {floor:e}"
    );
}

fn check_against_reference(cpu: &Cpu, rows: usize, h: Heads, segments: &[Segment]) {
    let qkv = random(1, rows * h.qkv_width());
    let dout = random(2, rows * h.out_width());
    let want = naive_f64(rows, h, segments, &wide(&qkv), &wide(&dout), |x| x);
    let naive = naive_f32(rows, h, segments, &qkv, &dout, |x| x);
    // Rows that no segment covers stay as they are: 0, as in the reference.
    let got = kernel(cpu, rows, h, segments, &qkv, &dout, 0.0);
    let what = format!("{h:?} {}", cpu.level());
    assert_close(&format!("{what} out"), &got.out, &naive.out, &want.out, 2.0);
    assert_close(&format!("{what} lse"), &got.lse, &naive.lse, &want.lse, 2.0);
    assert_close(
        &format!("{what} dqkv"),
        &got.dqkv,
        &naive.dqkv,
        &want.dqkv,
        3.0,
    );
}

/// Awkward lengths, a gap, and prefixes shared in whole and in part.
fn awkward() -> (usize, Vec<Segment>) {
    let segments = vec![
        segment(0, 1, 0, 0),
        segment(1, 7, 0, 0),
        segment(10, 63, 0, 0),
        segment(73, 64, 0, 0),
        segment(137, 65, 0, 0),
        segment(202, 111, 0, 0),
        segment(313, 7, 137, 65),
        segment(320, 63, 137, 64),
        segment(383, 65, 1, 7),
        segment(448, 70, 137, 65),
    ];
    (520, segments)
}

#[test]
fn agrees_with_f64_on_awkward_lengths_and_shared_prefixes() {
    let (rows, segments) = awkward();
    for h in SHAPES {
        check_against_reference(&Cpu::with_threads(2), rows, h, &segments);
    }
}

#[test]
fn agrees_with_f64_on_a_long_sequence() {
    let segments = [segment(0, 989, 0, 0), segment(989, 3, 0, 989)];
    check_against_reference(&Cpu::with_threads(2), 992, heads(4, 2, 32), &segments);
}

#[test]
fn agrees_with_f64_on_every_level_of_this_machine() {
    let (rows, segments) = awkward();
    for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
        if let Ok(cpu) = Cpu::with_threads(2).with_level(level) {
            check_against_reference(&cpu, rows, heads(3, 1, 20), &segments);
        }
    }
}

#[test]
fn the_reference_gradient_agrees_with_finite_differences() {
    let h = heads(4, 2, 6);
    let rows = 14;
    let segments = [
        segment(0, 5, 0, 0),
        segment(5, 4, 0, 5),
        segment(9, 3, 0, 3),
    ];
    let qkv = wide(&random(3, rows * h.qkv_width()));
    let dout = wide(&random(4, rows * h.out_width()));
    let loss = |qkv: &[f64]| -> f64 {
        let out = naive_f64(rows, h, &segments, qkv, &dout, |x| x).out;
        out.iter().zip(&dout).map(|(a, b)| a * b).sum()
    };
    let gradient = naive_f64(rows, h, &segments, &qkv, &dout, |x| x).dqkv;
    for at in 0..qkv.len() {
        let step = 1e-5;
        let mut moved = qkv.clone();
        moved[at] += step;
        let up = loss(&moved);
        moved[at] -= 2.0 * step;
        let slope = (up - loss(&moved)) / (2.0 * step);
        assert!(
            (slope - gradient[at]).abs() < 1e-7,
            "{at}: slope {slope}, gradient {}",
            gradient[at]
        );
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn rows_outside_of_segments_are_left_alone() {
    let h = heads(4, 2, 16);
    let (rows, segments) = awkward();
    let qkv = random(5, rows * h.qkv_width());
    let dout = random(6, rows * h.out_width());
    let results = kernel(&Cpu::with_threads(2), rows, h, &segments, &qkv, &dout, 7.5);
    let covered = |row: usize| {
        let mut segments = segments.iter();
        segments.any(|s| (s.start..s.start + s.len).contains(&(row as u32)))
    };
    for row in 0..rows {
        let untouched = [
            results.out[row * h.out_width()..][..h.out_width()]
                .iter()
                .all(|&x| x == 7.5),
            results.lse[row * h.q_heads..][..h.q_heads]
                .iter()
                .all(|&x| x == 7.5),
            results.dqkv[row * h.qkv_width()..][..h.qkv_width()]
                .iter()
                .all(|&x| x == 7.5),
        ];
        assert_eq!(untouched, [!covered(row); 3], "row {row}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let (rows, segments) = awkward();
    for h in SHAPES {
        let qkv = random(7, rows * h.qkv_width());
        let dout = random(8, rows * h.out_width());
        let run = |threads| {
            let cpu = Cpu::with_threads(threads);
            let r = kernel(&cpu, rows, h, &segments, &qkv, &dout, 0.0);
            (bits(&r.out), bits(&r.lse), bits(&r.dqkv))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "{h:?}");
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_a_batch() {
    let (rows, segments) = awkward();
    let cpu = Cpu::with_threads(2);
    for h in SHAPES {
        let (w, o) = (h.qkv_width(), h.out_width());
        let mut qkv = random(9, rows * w);
        let dout = random(10, rows * o);
        // Everything around the sequence is NaN, which must not get in.
        let (start, len) = (202, 111);
        let alone = kernel(
            &cpu,
            len,
            h,
            &[segment(0, len as u32, 0, 0)],
            &qkv[start * w..][..len * w],
            &dout[start * o..][..len * o],
            0.0,
        );
        for (at, x) in qkv.iter_mut().enumerate() {
            if !(start * w..(start + len) * w).contains(&at) {
                *x = f32::NAN;
            }
        }
        let batch = kernel(&cpu, rows, h, &segments, &qkv, &dout, 0.0);
        assert_eq!(bits(&alone.out), bits(&batch.out[start * o..][..len * o]));
        let lse = &batch.lse[start * h.q_heads..][..len * h.q_heads];
        assert_eq!(bits(&alone.lse), bits(lse));
        assert_eq!(bits(&alone.dqkv), bits(&batch.dqkv[start * w..][..len * w]));
    }
}

#[test]
fn training_shared_prefix_prefill_and_decode_have_the_same_bits() {
    let (prefix, answers) = (75, [70, 1, 58]);
    for h in SHAPES {
        let (w, o) = (h.qkv_width(), h.out_width());
        // Prefix, then the answers: the rows of the shared-prefix layout.
        let rows = prefix + answers.iter().sum::<usize>();
        let qkv = random(11, rows * w);
        let row_range = |from: usize, len: usize| &qkv[from * w..(from + len) * w];

        let mut segments = vec![segment(0, prefix as u32, 0, 0)];
        let mut start = prefix;
        for len in answers {
            segments.push(segment(start as u32, len as u32, 0, prefix as u32));
            start += len;
        }
        let dout = vec![0.0; rows * o];
        let shared = kernel(&Cpu::with_threads(2), rows, h, &segments, &qkv, &dout, 0.0).out;
        let want = |answer: usize| {
            let s = segments[answer + 1];
            let mut out = shared[..prefix * o].to_vec();
            out.extend(&shared[s.start as usize * o..(s.start + s.len) as usize * o]);
            bits(&out)
        };

        for threads in [1, 2, 5] {
            let cpu = Cpu::with_threads(threads);
            let mut cache = Cache::new(&cpu, h, 3, 200);
            let mut decoded: Vec<Vec<f32>> = vec![Vec::new(); 3];
            for (answer, len) in answers.into_iter().enumerate() {
                let own = row_range(segments[answer + 1].start as usize, len);
                let sequence = [row_range(0, prefix), own].concat();
                let total = prefix + len;

                let whole = [segment(0, total as u32, 0, 0)];
                let dout = vec![0.0; total * o];
                let packed = kernel(&cpu, total, h, &whole, &sequence, &dout, 0.0).out;
                assert_eq!(bits(&packed), want(answer), "{h:?} packed");

                let mut prefill = Cache::new(&cpu, h, 1, 200);
                let out = prefill.call(&[(0, 0, total)], &sequence, 0);
                assert_eq!(bits(&out), want(answer), "{h:?} prefill");

                let mut pieces = Cache::new(&cpu, h, 1, 200);
                let mut out = Vec::new();
                for first in (0..total).step_by(29) {
                    let len = 29.min(total - first);
                    out.extend(pieces.call(
                        &[(0, first, len)],
                        &sequence[first * w..][..len * w],
                        0,
                    ));
                }
                assert_eq!(bits(&out), want(answer), "{h:?} prefill in pieces");

                let first = &sequence[..5 * w];
                decoded[answer].extend(cache.call(&[(answer, 0, 5)], first, 0));
            }
            // Token by token, all answers together in one batch of falling size.
            for token in 5..prefix + 70 {
                let mut calls = Vec::new();
                let mut rows = Vec::new();
                for (answer, len) in answers.into_iter().enumerate() {
                    if token < prefix + len {
                        calls.push((answer, token, 1));
                        let row = match token < prefix {
                            true => token,
                            false => segments[answer + 1].start as usize + token - prefix,
                        };
                        rows.extend(row_range(row, 1));
                    }
                }
                let out = cache.call(&calls, &rows, token % 3);
                for (call, out) in calls.iter().zip(out.chunks(o)) {
                    decoded[call.0].extend(out);
                }
            }
            for (answer, out) in decoded.iter().enumerate() {
                assert_eq!(bits(out), want(answer), "{h:?} decode, {threads} threads");
            }
        }
    }
}

#[test]
fn refuses_what_breaks_the_rules() {
    let cpu = Cpu::with_threads(1);
    let h = heads(4, 2, 8);
    let rows = 10;
    let qkv = cpu.zeros(rows * h.qkv_width()).unwrap();
    let call = |h: Heads, segments: &[Segment], out: usize, lse: usize| {
        let mut out = cpu.zeros(out).unwrap();
        let mut lse = cpu.zeros(lse).unwrap();
        let forward = cpu.attention(rows, h, 1.0, segments, &qkv, &mut out, &mut lse);
        let dout = cpu.zeros(rows * h.out_width()).unwrap();
        let mut delta = cpu.zeros(rows * h.q_heads).unwrap();
        let mut dqkv = cpu.zeros(rows * h.qkv_width()).unwrap();
        let backward = cpu.attention_backward(
            rows, h, 1.0, segments, &qkv, &out, &lse, &dout, &mut delta, &mut dqkv,
        );
        assert_eq!(forward.is_ok(), backward.is_ok());
        forward
    };
    let (out, lse) = (rows * h.out_width(), rows * h.q_heads);
    let good = [
        segment(0, 4, 0, 0),
        segment(4, 3, 0, 4),
        segment(7, 0, 0, 0),
    ];
    assert_eq!(call(h, &good, out, lse), Ok(()));
    assert!(matches!(
        call(h, &good, out - 1, lse),
        Err(Error::TooShort { name: "out", .. })
    ));
    assert!(matches!(
        call(h, &good, out, lse - 1),
        Err(Error::TooShort { name: "lse", .. })
    ));
    for (bad, rule) in [
        (vec![segment(8, 3, 0, 0)], "beyond"),
        (vec![segment(u32::MAX, u32::MAX, 0, 0)], "beyond"),
        (vec![segment(0, 4, 0, 0), segment(3, 2, 0, 0)], "overlap"),
        (vec![segment(3, 2, 0, 0), segment(0, 9, 0, 0)], "overlap"),
        (vec![segment(0, 4, 0, 0), segment(4, 1, 0, 5)], "prefix"),
        (vec![segment(0, 4, 0, 0), segment(4, 1, 1, 2)], "prefix"),
        (vec![segment(4, 1, 0, 2)], "prefix"),
        (
            vec![
                segment(0, 2, 0, 0),
                segment(2, 2, 0, 2),
                segment(4, 1, 2, 2),
            ],
            "prefix",
        ),
    ] {
        let error = call(h, &bad, out, lse).unwrap_err().to_string();
        assert!(error.contains(rule), "{bad:?}: {error}");
    }
    for bad in [heads(0, 1, 8), heads(4, 3, 8), heads(4, 2, 0)] {
        assert!(call(bad, &[], out, lse).is_err(), "{bad:?}");
    }
}

#[test]
fn paged_calls_refuse_what_breaks_the_rules() {
    let cpu = Cpu::with_threads(1);
    let h = heads(4, 2, 8);
    let mut k = cpu.zeros(2 * PAGE * h.kv_width()).unwrap();
    let mut v = cpu.zeros(2 * PAGE * h.kv_width()).unwrap();
    let qkv = cpu.zeros(3 * h.qkv_width()).unwrap();
    for (slots, ok) in [([0, 127, 64], true), ([0, 128, 64], false)] {
        let slots = cpu.upload(&slots).unwrap();
        let result = cpu.cache_write(3, h, &qkv, &slots, &mut k, &mut v);
        assert_eq!(result.is_ok(), ok);
        assert!(cpu.cache_write(4, h, &qkv, &slots, &mut k, &mut v).is_err());
    }
    let pages = cpu.upload(&[1u32, 0, 2]).unwrap();
    let call = |sequences: &[(u32, u32, u32, u32)]| {
        let mut out = cpu.zeros(3 * h.out_width()).unwrap();
        let sequences: Vec<_> = sequences
            .iter()
            .map(|&(q_start, q_len, context, first_page)| PagedSequence {
                q_start,
                q_len,
                context,
                first_page,
            })
            .collect();
        let batch = PagedBatch {
            sequences: &cpu.upload(&sequences).unwrap(),
            count: sequences.len(),
            rows: 3,
            max_q_len: 2,
            max_context: 129,
            pages: &pages,
        };
        cpu.attention_paged(h, 1.0, batch, &qkv, &k, &v, &mut out)
    };
    assert_eq!(call(&[(0, 1, 128, 0), (1, 2, 3, 1), (9, 0, 0, 9)]), Ok(()));
    assert!(matches!(
        call(&[(0, 1, 64, 2)]),
        Err(Error::OutOfRange {
            at: 2,
            value: 2,
            limit: 2,
            ..
        })
    ));
    assert!(matches!(
        call(&[(0, 1, 129, 0)]),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        call(&[(0, 1, 129, 1)]),
        Err(Error::TooShort { name: "pages", .. })
    ));
    for (bad, rule) in [
        ((2, 2, 9, 0), "beyond the 3 rows"),
        ((0, 3, 9, 0), "allows 2 in 129"),
        ((0, 2, 130, 0), "allows 2 in 129"),
        ((0, 2, 1, 0), "2 queries in a context of 1"),
    ] {
        let error = call(&[bad]).unwrap_err().to_string();
        assert!(error.contains(rule), "{bad:?}: {error}");
    }
    assert!(matches!(
        call(&[(0, 2, 2, 0), (1, 1, 2, 1)]),
        Err(Error::Invalid { .. })
    ));
}
