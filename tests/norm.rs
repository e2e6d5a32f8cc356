//! RMSNorm against an f64 reference, and its bits.

use dust_kernels::attention::Heads;
use dust_kernels::cpu::Level;
use dust_kernels::norm::{Norm, NormShape};
use dust_kernels::{Cpu, Device, Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::{EPS, Results, naive_f32, naive_f64};

#[path = "reference/norm.rs"]
mod reference;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn levels() -> impl Iterator<Item = Cpu> {
    [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon]
        .into_iter()
        .filter_map(|level| Cpu::with_threads(2).with_level(level).ok())
}

/// Both passes, from gradients that are 0 before.
fn kernel(cpu: &Cpu, x: &[f32], weight: &[f32], dy: &[f32]) -> Result<Results<f32>> {
    let shape = NormShape {
        rows: x.len() / weight.len(),
        width: weight.len(),
    };
    let (x, w, dy) = (cpu.upload(x)?, cpu.upload(weight)?, cpu.upload(dy)?);
    let (mut y, mut dx) = (cpu.zeros(x.len())?, cpu.zeros(x.len())?);
    let (mut rstd, mut dweight) = (cpu.zeros(shape.rows)?, cpu.zeros(shape.width)?);
    cpu.rms_norm(shape, EPS, &x, &w, &mut y, &mut rstd)?;
    cpu.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)?;
    Ok(Results {
        y: cpu.download(&y)?,
        rstd: cpu.download(&rstd)?,
        dx: cpu.download(&dx)?,
        dweight: cpu.download(&dweight)?,
    })
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn assert_close(what: &str, got: &[f32], naive: &[f32], want: &[f64], factor: f64) {
    assert_eq!(got.len(), want.len());
    let error = |x: &[f32]| {
        let errors = x.iter().zip(want).map(|(&x, w)| (f64::from(x) - w).abs());
        errors.fold(0.0, |max: f64, e| if e <= max { max } else { e })
    };
    let size = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
    let (got, limit) = (error(got), factor * error(naive) + 1.2e-7 * size);
    assert!(got <= limit, "{what}: error {got:e}, limit {limit:e}");
}

#[test]
fn agrees_with_f64() {
    for cpu in levels() {
        for (rows, width) in [(1, 1), (7, 3), (63, 64), (17, 20), (111, 576), (3, 989)] {
            let (x, dy) = (random(1, rows * width), random(2, rows * width));
            let weight = random(3, width);
            let want = naive_f64(&wide(&x), &wide(&weight), &wide(&dy));
            let naive = naive_f32(&x, &weight, &dy);
            let got = kernel(&cpu, &x, &weight, &dy).unwrap();
            let what = |part| format!("{part} of {rows} x {width}, {}", cpu.level());
            assert_close(&what("y"), &got.y, &naive.y, &want.y, 2.0);
            assert_close(&what("rstd"), &got.rstd, &naive.rstd, &want.rstd, 2.0);
            assert_close(&what("dx"), &got.dx, &naive.dx, &want.dx, 3.0);
            let dweight = what("dweight");
            assert_close(&dweight, &got.dweight, &naive.dweight, &want.dweight, 3.0);
        }
    }
}

#[test]
fn the_reference_gradient_agrees_with_finite_differences() {
    let (rows, width) = (3, 7);
    let (x, weight) = (wide(&random(4, rows * width)), wide(&random(5, width)));
    let dy = wide(&random(6, rows * width));
    let loss = |x: &[f64], weight: &[f64]| -> f64 {
        let y = naive_f64(x, weight, &dy).y;
        y.iter().zip(&dy).map(|(a, b)| a * b).sum()
    };
    let want = naive_f64(&x, &weight, &dy);
    let step = 1e-5;
    let slope = |values: &[f64], at: usize, loss: &dyn Fn(&[f64]) -> f64| {
        let mut moved = values.to_vec();
        moved[at] += step;
        let up = loss(&moved);
        moved[at] -= 2.0 * step;
        (up - loss(&moved)) / (2.0 * step)
    };
    for at in 0..x.len() {
        let slope = slope(&x, at, &|x| loss(x, &weight));
        assert!((slope - want.dx[at]).abs() < 1e-7);
    }
    for at in 0..width {
        let slope = slope(&weight, at, &|weight| loss(&x, weight));
        assert!((slope - want.dweight[at]).abs() < 1e-7);
    }
}

#[test]
fn the_residual_sum_is_normalised_as_if_it_were_the_input() {
    let cpu = Cpu::with_threads(2);
    let shape = NormShape {
        rows: 37,
        width: 100,
    };
    let n = shape.rows * shape.width;
    let (residual, delta) = (random(7, n), random(8, n));
    let weight = cpu.upload(&random(9, shape.width)).unwrap();
    let want_sum: Vec<f32> = residual.iter().zip(&delta).map(|(a, b)| a + b).collect();
    let x = cpu.upload(&want_sum).unwrap();
    let (mut want, mut want_rstd) = (cpu.zeros(n).unwrap(), cpu.zeros(shape.rows).unwrap());
    cpu.rms_norm(shape, EPS, &x, &weight, &mut want, &mut want_rstd)
        .unwrap();
    let (residual, delta) = (cpu.upload(&residual).unwrap(), cpu.upload(&delta).unwrap());
    let (mut sum, mut y) = (cpu.zeros(n).unwrap(), cpu.zeros(n).unwrap());
    let mut rstd = cpu.zeros(shape.rows).unwrap();
    cpu.add_rms_norm(
        shape, EPS, &residual, &delta, &weight, &mut sum, &mut y, &mut rstd,
    )
    .unwrap();
    assert_eq!(bits(&sum), bits(&want_sum));
    assert_eq!(bits(&y), bits(&want));
    assert_eq!(bits(&rstd), bits(&want_rstd));
}

#[test]
fn gradients_are_added() {
    let cpu = Cpu::with_threads(2);
    let shape = NormShape { rows: 5, width: 20 };
    let (x, dy, w) = (random(10, 100), random(11, 100), random(12, 20));
    let once = kernel(&cpu, &x, &w, &dy).unwrap();
    let (x, dy, w) = (
        cpu.upload(&x).unwrap(),
        cpu.upload(&dy).unwrap(),
        cpu.upload(&w).unwrap(),
    );
    let rstd = cpu.upload(&once.rstd).unwrap();
    let mut dx = cpu.upload(&[8.0; 100]).unwrap();
    let mut dweight = cpu.upload(&[8.0; 20]).unwrap();
    cpu.rms_norm_backward(shape, &dy, &x, &w, &rstd, &mut dx, &mut dweight)
        .unwrap();
    for (got, added) in dx.iter().zip(&once.dx) {
        assert!((got - 8.0 - added).abs() < 4e-6);
    }
    for (got, added) in dweight.iter().zip(&once.dweight) {
        assert!((got - 8.0 - added).abs() < 4e-6);
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_batch() {
    let (rows, width) = (203, 72);
    let (x, dy) = (random(13, rows * width), random(14, rows * width));
    let weight = random(15, width);
    let run = |threads| kernel(&Cpu::with_threads(threads), &x, &weight, &dy).unwrap();
    let one = run(1);
    for threads in [2, 5] {
        let many = run(threads);
        assert_eq!(bits(&one.y), bits(&many.y));
        assert_eq!(bits(&one.dx), bits(&many.dx));
        assert_eq!(bits(&one.dweight), bits(&many.dweight));
    }
    let row = 101 * width..102 * width;
    let alone = kernel(
        &Cpu::with_threads(1),
        &x[row.clone()],
        &weight,
        &dy[row.clone()],
    )
    .unwrap();
    assert_eq!(bits(&alone.y), bits(&one.y[row.clone()]));
    assert_eq!(bits(&alone.dx), bits(&one.dx[row]));
    assert_eq!(alone.rstd[0].to_bits(), one.rstd[101].to_bits());
}

/// The heads `from .. to` of all packed rows, one after the other.
fn take(h: Heads, packed: &[f32], from: usize, to: usize) -> Vec<f32> {
    let rows = packed.chunks(h.qkv_width());
    rows.flat_map(|row| row[from * h.head_dim..to * h.head_dim].to_vec())
        .collect()
}

#[test]
fn qk_norm_is_the_norm_of_each_head() {
    for (threads, cpu) in levels().chain([1, 5].map(Cpu::with_threads)).enumerate() {
        for (q_heads, kv_heads, head_dim) in [(9, 3, 64), (4, 4, 16), (3, 1, 20)] {
            let h = Heads {
                q_heads,
                kv_heads,
                head_dim,
            };
            let rows = 41;
            let n = rows * h.qkv_width();
            let (qkv, dqkv) = (random(16, n), random(17, n));
            let (q_weight, k_weight) = (random(18, head_dim), random(19, head_dim));
            let normed = q_heads + kv_heads;

            let x = cpu.upload(&qkv).unwrap();
            let (qw, kw) = (
                cpu.upload(&q_weight).unwrap(),
                cpu.upload(&k_weight).unwrap(),
            );
            let mut out = cpu.zeros(n).unwrap();
            let mut rstd = cpu.zeros(rows * normed).unwrap();
            cpu.qk_norm(rows, h, EPS, &x, &qw, &kw, &mut out, &mut rstd)
                .unwrap();
            let mut d = cpu.upload(&dqkv).unwrap();
            let mut dqw = cpu.zeros(head_dim).unwrap();
            let mut dkw = cpu.zeros(head_dim).unwrap();
            cpu.qk_norm_backward(rows, h, &x, &qw, &kw, &rstd, &mut d, &mut dqw, &mut dkw)
                .unwrap();

            let values = (normed, normed + kv_heads);
            assert_eq!(
                take(h, &out, values.0, values.1),
                take(h, &qkv, values.0, values.1)
            );
            assert_eq!(
                take(h, &d, values.0, values.1),
                take(h, &dqkv, values.0, values.1)
            );
            for (from, to, weight, dweight) in [
                (0, q_heads, &q_weight, &dqw),
                (q_heads, normed, &k_weight, &dkw),
            ] {
                let (x, dy) = (take(h, &qkv, from, to), take(h, &dqkv, from, to));
                let want = naive_f64(&wide(&x), &wide(weight), &wide(&dy));
                let naive = naive_f32(&x, weight, &dy);
                let what = |part| format!("{part} of {h:?} heads {from}..{to}, case {threads}");
                assert_close(&what("y"), &take(h, &out, from, to), &naive.y, &want.y, 2.0);
                assert_close(
                    &what("dx"),
                    &take(h, &d, from, to),
                    &naive.dx,
                    &want.dx,
                    3.0,
                );
                let name = what("dweight");
                assert_close(&name, dweight, &naive.dweight, &want.dweight, 3.0);
                let rstd: Vec<f32> = rstd
                    .chunks(normed)
                    .flat_map(|row| row[from..to].to_vec())
                    .collect();
                assert_close(&what("rstd"), &rstd, &naive.rstd, &want.rstd, 2.0);
            }
        }
    }
}

#[test]
fn refuses_short_buffers_and_rows_of_nothing() {
    let cpu = Cpu::with_threads(1);
    let shape = NormShape { rows: 3, width: 4 };
    let buffer = |n: usize| cpu.zeros::<f32>(n).unwrap();
    let call = |x, weight, y, rstd| {
        let (x, weight) = (buffer(x), buffer(weight));
        cpu.rms_norm(shape, EPS, &x, &weight, &mut buffer(y), &mut buffer(rstd))
    };
    assert_eq!(call(12, 4, 12, 3), Ok(()));
    for (x, weight, y, rstd, short) in [
        (11, 4, 12, 3, "x"),
        (12, 3, 12, 3, "weight"),
        (12, 4, 11, 3, "y"),
        (12, 4, 12, 2, "rstd"),
    ] {
        match call(x, weight, y, rstd) {
            Err(Error::TooShort { name, .. }) => assert_eq!(name, short),
            other => panic!("{short}: {other:?}"),
        }
    }
    let nothing = NormShape { rows: 3, width: 0 };
    let (x, w) = (buffer(0), buffer(0));
    assert!(matches!(
        cpu.rms_norm(nothing, EPS, &x, &w, &mut buffer(0), &mut buffer(3)),
        Err(Error::Invalid { .. })
    ));
    let h = Heads {
        q_heads: 3,
        kv_heads: 2,
        head_dim: 4,
    };
    assert!(matches!(
        cpu.qk_norm(
            1,
            h,
            EPS,
            &buffer(28),
            &w,
            &w,
            &mut buffer(28),
            &mut buffer(5)
        ),
        Err(Error::Invalid { .. })
    ));
}
