//! Linear layers on the emulator against the f64 reference and the CPU, their bits, and their
//! counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/gemm.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::gemm::{Gemm, LinearShape};
use dust_kernels::{Cpu, Cuda, Device, Error, Weight};
use half::bf16;
use reference::{Case, Results, sequential};

/// Rounded, for the device.
fn halves(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&v| bf16::from_f32(v)).collect()
}

/// Both passes. What is bf16 is widened.
fn run(cuda: &Cuda, case: &Case) -> Results {
    let LinearShape {
        rows,
        inputs,
        outputs,
    } = case.shape;
    let (x, w) = (up(cuda, &halves(&case.x)), up(cuda, &halves(&case.w)));
    let (bias, dy) = (up(cuda, &case.bias), up(cuda, &halves(&case.dy)));
    let unset = |len: usize| up(cuda, &vec![bf16::NAN; len]);
    let (mut y, mut dx) = (unset(rows * outputs), unset(rows * inputs));
    let (mut dw, mut dbias) = (up(cuda, &case.dw), up(cuda, &case.bias));
    let weight = Weight::Bf16(&w);
    cuda.linear(case.shape, &x, weight, Some(&bias), &mut y)
        .unwrap();
    cuda.linear_dx(case.shape, &dy, weight, &mut dx).unwrap();
    cuda.linear_dw(case.shape, &x, &dy, &mut dw).unwrap();
    cuda.linear_dbias(case.shape, &dy, &mut dbias).unwrap();
    Results([
        to_f32(&cuda.download(&y).unwrap()),
        to_f32(&cuda.download(&dx).unwrap()),
        cuda.download(&dw).unwrap(),
        cuda.download(&dbias).unwrap(),
    ])
}

/// Against f64. Where the result is bf16, its rounding sets the limit; where it is f32, naive sums in
/// f32 do, and the truncation of tensor cores, a last place every eighth product.
fn check(cuda: &Cuda, what: &str, shape: (usize, usize, usize)) {
    let case = Case::new(shape, 1).in_bf16();
    let got = run(cuda, &case);
    let (want, naive) = (reference::reference(&case), sequential(&case));
    for (i, name) in ["y", "dx", "dw", "dbias"].into_iter().enumerate() {
        let name = format!("{name} of {shape:?}, {what}");
        let (got, want) = (wide(&got.0[i]), &want.0[i]);
        if i < 2 {
            assert_close(&name, &got, &rounded(want), want, 2.0);
            continue;
        }
        let size = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
        let truncation = (case.shape.rows as f64 / 8.0 + 1.0) * 1.2e-7 * size;
        let limit = 2.0 * error(&wide(&naive.0[i]), want) + truncation;
        let error = error(&got, want);
        assert!(error <= limit, "{name}: {error:e}, limit {limit:e}");
    }
}

#[test]
fn agrees_with_f64_under_every_schedule() {
    for_each_schedule(|what, cuda| {
        // One step, then more steps than stages; of each tile.
        for shape in [(3, 8, 16), (9, 328, 72), (18, 328, 72), (70, 168, 136)] {
            check(cuda, what, shape);
        }
    });
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    with_cuda(|cuda, _| {
        for shape in [(1, 112, 992), (7, 8, 8), (111, 24, 264), (260, 40, 112)] {
            check(cuda, "serial", shape);
        }
    });
}

#[test]
fn agrees_with_the_cpu() {
    let case = Case::new((67, 200, 144), 2).in_bf16();
    let got = with_cuda(|cuda, _| run(cuda, &case));
    let cpu = Cpu::with_threads(1);
    let (x, w) = (up(&cpu, &case.x), up(&cpu, &case.w));
    let (bias, dy) = (up(&cpu, &case.bias), up(&cpu, &case.dy));
    let (mut y, mut dx) = (up(&cpu, &case.dy), up(&cpu, &case.x));
    let (mut dw, mut dbias) = (up(&cpu, &case.dw), up(&cpu, &case.bias));
    let weight = Weight::F32(&w);
    cpu.linear(case.shape, &x, weight, Some(&bias), &mut y)
        .unwrap();
    cpu.linear_dx(case.shape, &dy, weight, &mut dx).unwrap();
    cpu.linear_dw(case.shape, &x, &dy, &mut dw).unwrap();
    cpu.linear_dbias(case.shape, &dy, &mut dbias).unwrap();
    for (i, want) in [y, dx, dw, dbias].iter().enumerate() {
        let (got, want) = (wide(&got.0[i]), wide(want));
        if i < 2 {
            assert_close("cpu", &got, &rounded(&want), &want, 2.0);
        } else {
            // Both sum 67 products, in different orders.
            let size = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
            assert!(error(&got, &want) <= 2e-6 * size);
        }
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    with_cuda(|cuda, _| {
        let case = Case::new((75, 136, 72), 3);
        assert!(run(cuda, &case).bits() == run(cuda, &case).bits());
    });
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for_each_schedule(|what, cuda| {
        // The large tile against both others, at the row counts between which the tile changes. The
        // steps of the large one are half as long.
        let (rows, inputs, outputs) = (130, 232, 104);
        let case = Case::new((rows, inputs, outputs), 4);
        let all = run(cuda, &case).bits();
        for (first, count) in [(129, 1), (3, 16), (3, 17), (63, 64), (65, 65)] {
            let mut part = Case::new((count, inputs, outputs), 4);
            part.w.clone_from(&case.w);
            part.bias.clone_from(&case.bias);
            part.x = case.x[first * inputs..][..count * inputs].to_vec();
            part.dy = case.dy[first * outputs..][..count * outputs].to_vec();
            let part = run(cuda, &part).bits();
            for (i, width) in [outputs, inputs].into_iter().enumerate() {
                let alone = &part[i][..];
                let want = &all[i][first * width..][..count * width];
                assert!(alone == want, "{count} rows, {what}");
            }
        }
    });
}

#[test]
fn longer_buffers_keep_what_lies_behind_the_shape() {
    with_cuda(|cuda, _| {
        for rows in [5, 20, 70] {
            let case = Case::new((rows, 24, 40), 5);
            let (x, w) = (up(cuda, &halves(&case.x)), up(cuda, &halves(&case.w)));
            let dy = up(cuda, &halves(&case.dy));
            let seven = |len| vec![bf16::from_f32(7.0); len];
            let mut y = up(cuda, &seven(rows * 40 + 100));
            cuda.linear(case.shape, &x, Weight::Bf16(&w), None, &mut y)
                .unwrap();
            assert_eq!(cuda.download(&y).unwrap()[rows * 40..], seven(100));
            let mut dx = up(cuda, &seven(rows * 24 + 100));
            cuda.linear_dx(case.shape, &dy, Weight::Bf16(&w), &mut dx)
                .unwrap();
            assert_eq!(cuda.download(&dx).unwrap()[rows * 24..], seven(100));
            let mut dw = up(cuda, &vec![7f32; 24 * 40 + 100]);
            cuda.linear_dw(case.shape, &x, &dy, &mut dw).unwrap();
            assert_eq!(cuda.download(&dw).unwrap()[24 * 40..], [7.0; 100]);
        }
    });
}

#[test]
fn empty_dimensions_are_sums_of_nothing() {
    with_cuda(|cuda, _| {
        let empty = cuda.zeros::<bf16>(0).unwrap();
        let none = Weight::Bf16(&empty);
        let shape = |rows, inputs, outputs| LinearShape {
            rows,
            inputs,
            outputs,
        };
        let bias = up(cuda, &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        for rows in [2, 20, 70] {
            let mut y = up(cuda, &vec![bf16::NAN; rows * 8]);
            cuda.linear(shape(rows, 0, 8), &empty, none, Some(&bias), &mut y)
                .unwrap();
            let want = cuda.download(&bias).unwrap().repeat(rows);
            assert_eq!(to_f32(&cuda.download(&y).unwrap()), want);
            cuda.linear_dx(shape(rows, 8, 0), &empty, none, &mut y)
                .unwrap();
            assert_eq!(to_f32(&cuda.download(&y).unwrap()), vec![0.0; rows * 8]);
        }
        let mut dw = up(cuda, &[3f32; 64]);
        cuda.linear_dw(shape(0, 8, 8), &empty, &empty, &mut dw)
            .unwrap();
        assert_eq!(cuda.download(&dw).unwrap(), [3.0; 64]);
    });
}

#[test]
fn bad_arguments_are_refused_by_name() {
    with_cuda(|cuda, _| {
        let shape = |inputs, outputs| LinearShape {
            rows: 3,
            inputs,
            outputs,
        };
        let buf = |len| cuda.zeros::<bf16>(len).unwrap();
        let (x, w) = (buf(24), buf(128));
        let weight = Weight::Bf16(&w);
        let short = cuda.linear(shape(8, 16), &x, weight, None, &mut buf(47));
        assert!(matches!(short, Err(Error::TooShort { name: "y", .. })));
        let wide = Weight::F32(&cuda.zeros(128).unwrap());
        for (shape, weight, word) in [
            (shape(8, 16), wide, "bf16"),
            (shape(4, 16), weight, "inputs"),
            (shape(8, 12), weight, "outputs"),
        ] {
            let result = cuda.linear(shape, &x, weight, None, &mut buf(48));
            let message = result.unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    });
}

#[test]
fn every_product_is_in_mma_and_memory_is_used_well() {
    with_emulator(|cuda, emulator| {
        // Training: two tiles each way.
        let shape = LinearShape {
            rows: 256,
            inputs: 256,
            outputs: 256,
        };
        let n = 256 * 256;
        let (x, w) = (up(cuda, &random(1, n)), up(cuda, &random(2, n)));
        let mut y = cuda.zeros(n).unwrap();
        let mut dw = cuda.zeros(n).unwrap();
        let weight = Weight::Bf16(&w);
        // Two rows and two columns of tiles: each operand is read twice.
        let bytes = 2 * (2 * n + 2 * n);
        let flops = 2 * 256u64.pow(3);
        let tiled = |out: usize| Costs {
            least_bytes: (bytes + out) as u64,
            bytes: 1.0,
            sectors: 0.99,
            conflicts: 0.05,
        };
        let forward = reports_of(emulator, || cuda.linear(shape, &x, weight, None, &mut y));
        tiled(2 * n).check("linear", &forward);
        let dx = reports_of(emulator, || cuda.linear_dx(shape, &x, weight, &mut y));
        tiled(2 * n).check("linear_dx", &dx);
        let grad = reports_of(emulator, || cuda.linear_dw(shape, &x, &w, &mut dw));
        tiled(8 * n).check("linear_dw", &grad);
        for (reports, outside) in [(forward, 0), (dx, 0), (grad, n as u64)] {
            assert_eq!(reports[0].counters.mma_flops, flops);
            assert_eq!(reports[0].counters.flops, outside);
        }

        // Decoding: bound by reading the weights. Of 64 rows, each column of tiles reads the
        // activations again.
        for (rows, reads) in [(8, 1), (64, 4)] {
            let shape = LinearShape { rows, ..shape };
            let mut y = cuda.zeros(rows * 256).unwrap();
            let least = 2 * n + 2 * (reads + 1) * rows * 256;
            let forward = reports_of(emulator, || cuda.linear(shape, &x, weight, None, &mut y));
            Costs::memory_bound(least).check("linear of few rows", &forward);
            let dx = reports_of(emulator, || cuda.linear_dx(shape, &x, weight, &mut y));
            Costs::memory_bound(least).check("linear_dx of few rows", &dx);
        }
    });
}
