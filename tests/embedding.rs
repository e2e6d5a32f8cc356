//! Gathers and scatters against plain loops, bit for bit.

use dust_kernels::embedding::Embedding;
use dust_kernels::{Cpu, Device, Error, Weight};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Row widths and row counts nobody tunes for.
const SIZES: [usize; 4] = [1, 7, 111, 989];
const VOCAB: usize = 13;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| rng.random_range(0..VOCAB as u32))
        .collect()
}

#[test]
fn rows_are_copied_exactly() {
    for threads in [1, 2, 5] {
        let cpu = Cpu::with_threads(threads);
        for rows in SIZES {
            for width in SIZES {
                let table = random(1, VOCAB * width);
                let half: Vec<bf16> = table.iter().map(|&x| bf16::from_f32(x)).collect();
                let tokens = tokens(2, rows);
                let want: Vec<f32> = tokens
                    .iter()
                    .flat_map(|&t| table[t as usize * width..][..width].to_vec())
                    .collect();
                let want_half: Vec<f32> =
                    want.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
                let tokens = cpu.upload(&tokens).unwrap();
                let table = cpu.upload(&table).unwrap();
                let half = cpu.upload(&half).unwrap();
                // One element more than needed, which must stay as it is.
                let mut out = cpu.zeros::<f32>(rows * width + 1).unwrap();
                out[rows * width] = 7.0;
                cpu.embed(rows, width, &tokens, Weight::F32(&table), &mut out)
                    .unwrap();
                assert_eq!(out[..rows * width], want);
                cpu.embed(rows, width, &tokens, Weight::Bf16(&half), &mut out)
                    .unwrap();
                assert_eq!(out[..rows * width], want_half);
                cpu.gather_rows(rows, width, &tokens, &table, &mut out)
                    .unwrap();
                assert_eq!(out[..rows * width], want);
                assert_eq!(out[rows * width], 7.0);
            }
        }
    }
}

#[test]
fn scatters_add_in_the_order_of_the_rows() {
    for threads in [1, 2, 5] {
        let cpu = Cpu::with_threads(threads);
        for rows in SIZES {
            for width in SIZES {
                let start = random(3, VOCAB * width);
                let dense = random(4, rows * width);
                let index = tokens(5, rows);
                let mut want = start.clone();
                for (i, &t) in index.iter().enumerate() {
                    for c in 0..width {
                        want[t as usize * width + c] += dense[i * width + c];
                    }
                }
                let index = cpu.upload(&index).unwrap();
                let dense = cpu.upload(&dense).unwrap();
                let mut table = cpu.upload(&start).unwrap();
                cpu.embed_backward(rows, width, &index, &dense, &mut table)
                    .unwrap();
                assert_eq!(table[..], want, "{threads} threads, {rows} x {width}");
                let mut table = cpu.upload(&start).unwrap();
                cpu.scatter_add_rows(rows, width, &index, &dense, &mut table)
                    .unwrap();
                assert_eq!(table[..], want, "{threads} threads, {rows} x {width}");
            }
        }
    }
}

#[test]
fn scatter_is_the_transpose_of_gather() {
    // <gather(x), y> = <x, scatter(y)>, which is what makes one the gradient of the other.
    let (rows, width) = (111, 7);
    let cpu = Cpu::with_threads(2);
    let x = random(6, VOCAB * width);
    let y = random(7, rows * width);
    let index = cpu.upload(&tokens(8, rows)).unwrap();
    let mut gathered = cpu.zeros(rows * width).unwrap();
    cpu.gather_rows(rows, width, &index, &cpu.upload(&x).unwrap(), &mut gathered)
        .unwrap();
    let mut scattered = cpu.zeros(VOCAB * width).unwrap();
    cpu.scatter_add_rows(
        rows,
        width,
        &index,
        &cpu.upload(&y).unwrap(),
        &mut scattered,
    )
    .unwrap();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum()
    };
    assert!((dot(&gathered, &y) - dot(&x, &scattered)).abs() < 1e-4);
}

#[test]
fn bad_arguments_are_refused_and_nothing_is_written() {
    let cpu = Cpu::with_threads(1);
    let index = cpu.upload(&[0u32, 2]).unwrap();
    let table = cpu.upload(&[1.0f32; 6]).unwrap(); // 3 rows of 2
    let dense = cpu.upload(&[1.0f32; 4]).unwrap();
    let mut out = cpu.zeros::<f32>(4).unwrap();

    let error = cpu
        .embed(3, 2, &index, Weight::F32(&table), &mut out)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "tokens",
                len: 2,
                needed: 3,
                ..
            }
        ),
        "{error}"
    );
    let error = cpu.gather_rows(2, 3, &index, &table, &mut out).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooShort {
                name: "out",
                needed: 6,
                ..
            }
        ),
        "{error}"
    );
    let error = cpu
        .embed(usize::MAX, 2, &index, Weight::F32(&table), &mut out)
        .unwrap_err();
    assert!(matches!(error, Error::TooShort { .. }), "{error}");

    let high = cpu.upload(&[0u32, 3]).unwrap();
    let error = cpu
        .embed(2, 2, &high, Weight::F32(&table), &mut out)
        .unwrap_err();
    let want = Error::OutOfRange {
        op: "embed",
        name: "tokens",
        at: 1,
        value: 3,
        limit: 3,
    };
    assert_eq!(error, want);
    assert_eq!(out[..], [0.0; 4]);
    let mut gradient = cpu.zeros::<f32>(6).unwrap();
    let error = cpu
        .embed_backward(2, 2, &high, &dense, &mut gradient)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::OutOfRange {
                op: "embed_backward",
                ..
            }
        ),
        "{error}"
    );
    let error = cpu
        .scatter_add_rows(2, 2, &high, &dense, &mut gradient)
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::OutOfRange {
                op: "scatter_add_rows",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(gradient[..], [0.0; 6]);

    // No rows and no columns are nothing to do.
    cpu.embed(0, 2, &index, Weight::F32(&table), &mut out)
        .unwrap();
    cpu.embed(2, 0, &index, Weight::F32(&table), &mut out)
        .unwrap();
    cpu.scatter_add_rows(2, 0, &index, &dense, &mut gradient)
        .unwrap();
}
