//! RMSNorm on the emulator against the f64 reference and the CPU, its bits, and its counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[allow(dead_code)] // the CPU's tests use all of it
#[path = "reference/norm.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::attention::Heads;
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::{Cpu, Cuda, Device, Error};
use half::bf16;
use reference::{EPS, naive_f64};

/// What one pass forward and back gives.
struct Output {
    y: Vec<bf16>,
    rstd: Vec<f32>,
    dx: Vec<bf16>,
    dweight: Vec<f32>,
}

fn run(cuda: &Cuda, x: &[bf16], weight: &[f32], dy: &[bf16]) -> Output {
    let shape = NormShape {
        rows: x.len() / weight.len(),
        width: weight.len(),
    };
    let (x, w, dy) = (up(cuda, x), up(cuda, weight), up(cuda, dy));
    let n = shape.rows * shape.width;
    let (mut y, mut dx) = (cuda.zeros(n).unwrap(), cuda.zeros(n).unwrap());
    let mut rstd = cuda.zeros(shape.rows).unwrap();
    let mut dweight = cuda.zeros(shape.width).unwrap();
    cuda.rms_norm(shape, EPS, &x, &w, &mut y, &mut rstd)
        .unwrap();
    cuda.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
        .unwrap();
    Output {
        y: cuda.download(&y).unwrap(),
        rstd: cuda.download(&rstd).unwrap(),
        dx: cuda.download(&dx).unwrap(),
        dweight: cuda.download(&dweight).unwrap(),
    }
}

/// Both passes against f64; a naive computation that rounds its results to bf16 sets the limit.
fn check(cuda: &Cuda, what: &str, rows: usize, width: usize) {
    let (x, dy) = (random(1, rows * width), random(2, rows * width));
    let weight = random_f32(3, width);
    let got = run(cuda, &x, &weight, &dy);
    let want = naive_f64(&wide(&x), &wide(&weight), &wide(&dy));
    let name = |part| format!("{part} of {rows} x {width}, {what}");
    assert_close(&name("y"), &wide(&got.y), &rounded(&want.y), &want.y, 2.0);
    assert_close(
        &name("dx"),
        &wide(&got.dx),
        &rounded(&want.dx),
        &want.dx,
        2.0,
    );
    // These two stay in f32: a few roundings of the largest value.
    let f32_limit = |v: &[f64]| 8.0 * 6e-8 * v.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let rstd = error(&wide(&got.rstd), &want.rstd);
    assert!(rstd <= f32_limit(&want.rstd), "{}: {rstd:e}", name("rstd"));
    let dweight = error(&wide(&got.dweight), &want.dweight);
    assert!(
        dweight <= f32_limit(&want.dweight),
        "{}: {dweight:e}",
        name("dweight")
    );
}

#[test]
fn agrees_with_f64_under_every_schedule() {
    for_each_schedule(|what, cuda| {
        for (rows, width) in [(1, 8), (19, 24), (35, 264)] {
            check(cuda, what, rows, width);
        }
    });
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    with_cuda(|cuda, _| {
        // Below and beyond what registers hold, forward (4096) and backward (8192).
        for (rows, width) in [(111, 576), (7, 1032), (3, 4104), (17, 8200), (2, 12296)] {
            check(cuda, "serial", rows, width);
        }
    });
}

#[test]
fn agrees_with_the_cpu() {
    let shape = NormShape {
        rows: 37,
        width: 576,
    };
    let n = shape.rows * shape.width;
    let (x, dy, weight) = (random(4, n), random(5, n), random_f32(6, shape.width));
    let got = with_cuda(|cuda, _| run(cuda, &x, &weight, &dy));
    let cpu = Cpu::with_threads(1);
    let (x, w, dy) = (
        up(&cpu, &to_f32(&x)),
        up(&cpu, &weight),
        up(&cpu, &to_f32(&dy)),
    );
    let (mut y, mut dx) = (cpu.zeros(n).unwrap(), cpu.zeros(n).unwrap());
    let mut rstd = cpu.zeros(shape.rows).unwrap();
    let mut dweight = cpu.zeros(shape.width).unwrap();
    cpu.rms_norm(shape, EPS, &x, &w, &mut y, &mut rstd).unwrap();
    cpu.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
        .unwrap();
    // Half a unit of bf16's last place, and a little for what f32 left open.
    let near = |what, got: &[f64], want: &[f64], relative: f64, absolute: f64| {
        for (got, want) in got.iter().zip(want) {
            let limit = relative * want.abs() + absolute;
            assert!((got - want).abs() <= limit, "{what}: {got} is not {want}");
        }
    };
    near("y", &wide(&got.y), &wide(&y), 0.004, 1e-6);
    near("dx", &wide(&got.dx), &wide(&dx), 0.004, 1e-6);
    near("rstd", &wide(&got.rstd), &wide(&rstd), 1e-6, 0.0);
    near("dweight", &wide(&got.dweight), &wide(&dweight), 1e-5, 1e-5);
}

#[test]
fn the_residual_sum_is_normalised_as_if_it_were_the_input() {
    with_cuda(|cuda, _| {
        for (rows, width) in [(21, 576), (3, 4104)] {
            let shape = NormShape { rows, width };
            let n = rows * width;
            let (residual, delta) = (random(7, n), random(8, n));
            let add = |(a, b): (&bf16, &bf16)| bf16::from_f32(a.to_f32() + b.to_f32());
            let want_sum: Vec<bf16> = residual.iter().zip(&delta).map(add).collect();
            let weight = random_f32(9, width);
            let want = run(cuda, &want_sum, &weight, &want_sum);
            let (residual, delta, w) = (up(cuda, &residual), up(cuda, &delta), up(cuda, &weight));
            let (mut sum, mut y) = (cuda.zeros(n).unwrap(), cuda.zeros(n).unwrap());
            let mut rstd = cuda.zeros(rows).unwrap();
            cuda.add_rms_norm(
                shape, EPS, &residual, &delta, &w, &mut sum, &mut y, &mut rstd,
            )
            .unwrap();
            assert_eq!(bits(&cuda.download(&sum).unwrap()), bits(&want_sum));
            assert_eq!(bits(&cuda.download(&y).unwrap()), bits(&want.y));
            assert_eq!(bits(&cuda.download(&rstd).unwrap()), bits(&want.rstd));
        }
    });
}

#[test]
fn gradients_are_added() {
    with_cuda(|cuda, _| {
        let shape = NormShape { rows: 5, width: 24 };
        let (x, dy, w) = (random(10, 120), random(11, 120), random_f32(12, 24));
        let once = run(cuda, &x, &w, &dy);
        let (x, dy, w) = (up(cuda, &x), up(cuda, &dy), up(cuda, &w));
        let rstd = up(cuda, &once.rstd);
        let mut dx = up(cuda, &[bf16::from_f32(8.0); 120]);
        let mut dweight = up(cuda, &[8f32; 24]);
        cuda.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
            .unwrap();
        for (got, added) in cuda.download(&dx).unwrap().iter().zip(&once.dx) {
            assert!(
                (got.to_f32() - 8.0 - added.to_f32()).abs() <= 0.05,
                "{got} {added}"
            );
        }
        for (got, added) in cuda.download(&dweight).unwrap().iter().zip(&once.dweight) {
            assert!((got - 8.0 - added).abs() < 4e-6);
        }
    });
}

#[test]
fn bits_depend_on_the_row_alone() {
    with_cuda(|cuda, _| {
        // More rows than a grid has warps for, so that warps take several.
        for (rows, width, picked) in [(2000, 24, 1777), (40, 4104, 39)] {
            let n = rows * width;
            let (x, dy, weight) = (random(13, n), random(14, n), random_f32(15, width));
            let (all, again) = (run(cuda, &x, &weight, &dy), run(cuda, &x, &weight, &dy));
            assert_eq!(bits(&all.y), bits(&again.y));
            assert_eq!(bits(&all.dx), bits(&again.dx));
            assert_eq!(bits(&all.dweight), bits(&again.dweight));
            let row = picked * width..(picked + 1) * width;
            let alone = run(cuda, &x[row.clone()], &weight, &dy[row.clone()]);
            assert_eq!(bits(&alone.y), bits(&all.y[row.clone()]));
            assert_eq!(bits(&alone.dx), bits(&all.dx[row]));
            assert_eq!(bits(&alone.rstd), bits(&all.rstd[picked..=picked]));
        }
    });
}

/// The heads `from .. to` of all packed rows, one after the other.
fn take(h: Heads, packed: &[bf16], from: usize, to: usize) -> Vec<bf16> {
    let rows = packed.chunks(h.qkv_width());
    rows.flat_map(|row| row[from * h.head_dim..to * h.head_dim].to_vec())
        .collect()
}

fn check_heads(cuda: &Cuda, what: &str, rows: usize, h: Heads) {
    let n = rows * h.qkv_width();
    let normed = h.q_heads + h.kv_heads;
    let (qkv, dqkv) = (random(16, n), random(17, n));
    let weights = [random_f32(18, h.head_dim), random_f32(19, h.head_dim)];
    let [qw, kw] = [up(cuda, &weights[0]), up(cuda, &weights[1])];
    let (x, mut d) = (up(cuda, &qkv), up(cuda, &dqkv));
    let (mut out, mut rstd) = (cuda.zeros(n).unwrap(), cuda.zeros(rows * normed).unwrap());
    cuda.qk_norm(rows, h, EPS, &x, &qw, &kw, &mut out, &mut rstd)
        .unwrap();
    let [mut dqw, mut dkw] = [(); 2].map(|()| cuda.zeros(h.head_dim).unwrap());
    cuda.qk_norm_backward(rows, h, &x, &qw, &kw, &rstd, &mut d, &mut dqw, &mut dkw)
        .unwrap();
    let (out, d) = (cuda.download(&out).unwrap(), cuda.download(&d).unwrap());
    let rstd = cuda.download(&rstd).unwrap();
    let dweights = [cuda.download(&dqw).unwrap(), cuda.download(&dkw).unwrap()];

    let values = |packed| take(h, packed, normed, normed + h.kv_heads);
    assert_eq!(values(&out), values(&qkv));
    assert_eq!(values(&d), values(&dqkv));
    let parts = [(0, h.q_heads), (h.q_heads, normed)];
    for (i, (from, to)) in parts.into_iter().enumerate() {
        let want = naive_f64(
            &wide(&take(h, &qkv, from, to)),
            &wide(&weights[i]),
            &wide(&take(h, &dqkv, from, to)),
        );
        let name = |part| format!("{part} of {rows} x {h:?} heads {from}..{to}, {what}");
        let (y, dx) = (wide(&take(h, &out, from, to)), wide(&take(h, &d, from, to)));
        assert_close(&name("y"), &y, &rounded(&want.y), &want.y, 2.0);
        assert_close(&name("dx"), &dx, &rounded(&want.dx), &want.dx, 2.0);
        let size = want.dweight.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let dweight = error(&wide(&dweights[i]), &want.dweight);
        assert!(
            dweight <= 8.0 * 6e-8 * size,
            "{}: {dweight:e}",
            name("dweight")
        );
        let rows = rstd.chunks(normed);
        let part: Vec<f32> = rows.flat_map(|r| r[from..to].to_vec()).collect();
        assert!(error(&wide(&part), &want.rstd) <= 1e-6, "{}", name("rstd"));
    }
}

fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        q_heads,
        kv_heads,
        head_dim,
    }
}

#[test]
fn qk_norm_agrees_with_f64_under_every_schedule() {
    for_each_schedule(|what, cuda| {
        check_heads(cuda, what, 19, heads(3, 1, 64));
        check_heads(cuda, what, 5, heads(2, 2, 24));
    });
}

#[test]
fn qk_norm_agrees_with_f64_on_awkward_shapes() {
    with_cuda(|cuda, _| {
        let shapes = [
            (1, heads(1, 1, 8)),
            (41, heads(9, 3, 64)),
            (17, heads(16, 8, 128)),
            (33, heads(4, 2, 80)),
            (3, heads(2, 1, 256)),
        ];
        for (rows, h) in shapes {
            check_heads(cuda, "serial", rows, h);
        }
    });
}

#[test]
fn nothing_happens_without_rows() {
    with_cuda(|cuda, _| {
        let got = run(cuda, &[], &[1.0; 8], &[]);
        assert_eq!(got.dweight, [0.0; 8]);
    });
}

#[test]
fn refuses_short_buffers_and_odd_widths() {
    with_cuda(|cuda, _| {
        let norm = |width, n, weights| {
            let shape = NormShape { rows: 3, width };
            let (x, weight) = (cuda.zeros(n).unwrap(), cuda.zeros(weights).unwrap());
            let (mut y, mut rstd) = (cuda.zeros(3 * width).unwrap(), cuda.zeros(3).unwrap());
            cuda.rms_norm(shape, EPS, &x, &weight, &mut y, &mut rstd)
        };
        assert_eq!(norm(8, 24, 8), Ok(()));
        let short = |name, len, needed| {
            let op = "rms_norm";
            Err(Error::TooShort {
                op,
                name,
                len,
                needed,
            })
        };
        assert_eq!(norm(8, 23, 8), short("x", 23, 24));
        assert_eq!(norm(8, 24, 7), short("weight", 7, 8));
        let invalid = norm(12, 36, 12).unwrap_err().to_string();
        assert_eq!(
            invalid,
            "rms_norm: `width` must be a multiple of 8, it is 12"
        );
        assert!(matches!(norm(0, 0, 0), Err(Error::Invalid { .. })));
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let shape = NormShape {
            rows: 4096,
            width: 576,
        };
        let NormShape { rows, width } = shape;
        let n = rows * width;
        let (x, dy) = (up(cuda, &random(1, n)), up(cuda, &random(2, n)));
        let w = up(cuda, &random_f32(3, width));
        let [mut y, mut sum, mut dx] = [(); 3].map(|()| cuda.zeros(n).unwrap());
        let (mut rstd, mut dweight) = (cuda.zeros(rows).unwrap(), cuda.zeros(width).unwrap());
        let forward = reports_of(emulator, || {
            cuda.rms_norm(shape, EPS, &x, &w, &mut y, &mut rstd)
        });
        Costs::memory_bound(2 * 2 * n + 4 * (width + rows)).check("rms_norm", &forward);
        let add = reports_of(emulator, || {
            cuda.add_rms_norm(shape, EPS, &x, &dy, &w, &mut sum, &mut y, &mut rstd)
        });
        Costs::memory_bound(4 * 2 * n + 4 * (width + rows)).check("add_rms_norm", &add);
        let backward = reports_of(emulator, || {
            cuda.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
        });
        let least = 4 * 2 * n + 4 * (3 * width + rows);
        Costs::memory_bound(least).check("rms_norm_backward", &backward);

        let (rows, h) = (1024, heads(9, 3, 64));
        let n = rows * h.qkv_width();
        let normed = rows * (h.q_heads + h.kv_heads);
        let (qkv, mut dqkv) = (up(cuda, &random(4, n)), up(cuda, &random(5, n)));
        let [qw, kw] = [up(cuda, &random_f32(6, 64)), up(cuda, &random_f32(7, 64))];
        let (mut out, mut rstd) = (cuda.zeros(n).unwrap(), cuda.zeros(normed).unwrap());
        let [mut dqw, mut dkw] = [(); 2].map(|()| cuda.zeros(64).unwrap());
        let forward = reports_of(emulator, || {
            cuda.qk_norm(rows, h, EPS, &qkv, &qw, &kw, &mut out, &mut rstd)
        });
        Costs::memory_bound(2 * 2 * n + 4 * (normed + 128)).check("qk_norm", &forward);
        let backward = reports_of(emulator, || {
            cuda.qk_norm_backward(
                rows, h, &qkv, &qw, &kw, &rstd, &mut dqkv, &mut dqw, &mut dkw,
            )
        });
        let least = 3 * 2 * 64 * normed + 4 * (normed + 3 * 128);
        Costs::memory_bound(least).check("qk_norm_backward", &backward);
    });
}
