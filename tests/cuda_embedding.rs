//! Gathers and scatters on the emulator against plain loops, bit for bit, bad indices, counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}

use common::cuda::*;
use dust_kernels::embedding::Embedding;
use dust_kernels::{Cpu, Cuda, Device, Error, Weight};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 13;

fn tokens(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| rng.random_range(0..vocab as u32))
        .collect()
}

fn check_gather(cuda: &Cuda, rows: usize, width: usize) {
    let table = random(1, VOCAB * width);
    let index = tokens(2, rows, VOCAB);
    let row = |&t: &u32| table[t as usize * width..][..width].to_vec();
    let want: Vec<bf16> = index
        .iter()
        .flat_map(row)
        .chain([bf16::from_f32(7.0)])
        .collect();
    let (table, index) = (up(cuda, &table), up(cuda, &index));
    // One element more than needed, which must stay as it is.
    let mut out = up(cuda, &vec![bf16::from_f32(7.0); rows * width + 1]);
    cuda.embed(rows, width, &index, Weight::Bf16(&table), &mut out)
        .unwrap();
    assert_eq!(
        bits(&cuda.download(&out).unwrap()),
        bits(&want),
        "{rows} x {width}"
    );
    let mut out = up(cuda, &vec![bf16::from_f32(7.0); rows * width + 1]);
    cuda.gather_rows(rows, width, &index, &table, &mut out)
        .unwrap();
    assert_eq!(
        bits(&cuda.download(&out).unwrap()),
        bits(&want),
        "{rows} x {width}"
    );
}

/// Equal targets are added in the order of the rows, in f32, so that plain loops give the bits.
fn check_scatter(cuda: &Cuda, what: &str, rows: usize, width: usize, vocab: usize) {
    let (start, dense) = (random(3, vocab * width), random(4, rows * width));
    let index = tokens(5, rows, vocab);
    let mut want = to_f32(&start);
    for (i, &t) in index.iter().enumerate() {
        for c in 0..width {
            want[t as usize * width + c] += dense[i * width + c].to_f32();
        }
    }
    let (index, dense) = (up(cuda, &index), up(cuda, &dense));
    let mut table = up(cuda, &to_f32(&start));
    cuda.embed_backward(rows, width, &index, &dense, &mut table)
        .unwrap();
    let what = format!("{rows} x {width} to {vocab}, {what}");
    assert_eq!(bits(&cuda.download(&table).unwrap()), bits(&want), "{what}");
    let mut table = up(cuda, &start);
    cuda.scatter_add_rows(rows, width, &index, &dense, &mut table)
        .unwrap();
    let want: Vec<bf16> = want.into_iter().map(bf16::from_f32).collect();
    assert_eq!(bits(&cuda.download(&table).unwrap()), bits(&want), "{what}");
}

#[test]
fn every_schedule_gives_the_bits_of_plain_loops() {
    for_each_schedule(|what, cuda| {
        check_gather(cuda, 9, 24);
        check_scatter(cuda, what, 40, 24, VOCAB);
    });
}

#[test]
fn awkward_shapes_give_the_bits_of_plain_loops() {
    with_cuda(|cuda, _| {
        for (rows, width) in [(1, 8), (111, 576), (989, 8), (3, 2056), (0, 8)] {
            check_gather(cuda, rows, width);
        }
        // One target for all, targets for nearly each, several tiles of the sort, wide rows.
        let shapes = [
            (1, 8, 1),
            (300, 8, 1),
            (300, 16, 1000),
            (989, 8, 13),
            (5, 2056, 2),
            (0, 8, 3),
        ];
        for (rows, width, vocab) in shapes {
            check_scatter(cuda, "serial", rows, width, vocab);
        }
    });
}

#[test]
fn agrees_with_the_cpu() {
    let (rows, width) = (57, 40);
    let (index, dense) = (tokens(6, rows, VOCAB), random(7, rows * width));
    let got = with_cuda(|cuda, _| {
        let mut table = cuda.zeros(VOCAB * width).unwrap();
        let (index, dense) = (up(cuda, &index), up(cuda, &dense));
        cuda.embed_backward(rows, width, &index, &dense, &mut table)
            .unwrap();
        cuda.download(&table).unwrap()
    });
    let cpu = Cpu::with_threads(1);
    let mut table = cpu.zeros(VOCAB * width).unwrap();
    let (index, dense) = (up(&cpu, &index), up(&cpu, &to_f32(&dense)));
    cpu.embed_backward(rows, width, &index, &dense, &mut table)
        .unwrap();
    assert_eq!(bits(&got), bits(&table));
}

#[test]
fn a_bad_index_is_found_when_memory_is_read_and_its_row_left_alone() {
    let one = bf16::from_f32(1.0);
    for_each_schedule(|what, cuda| {
        let index = up(cuda, &[2u32, 3, u32::MAX, 0]);
        let (table, dense) = (up(cuda, &[one; 3 * 8]), up(cuda, &[one; 4 * 8]));
        let mut out = cuda.zeros(4 * 8).unwrap();
        let outside = |result, op, name| match result {
            Err(Error::OutOfRange {
                op: o,
                name: n,
                at,
                value,
                limit: 3,
            }) => {
                assert_eq!((o, n), (op, name), "{what}");
                // The first in whatever order the blocks ran.
                assert!(
                    [(1, 3), (2, u32::MAX as usize)].contains(&(at, value)),
                    "{what}"
                );
            }
            other => panic!("{op}, {what}: {other:?}"),
        };
        cuda.embed(4, 8, &index, Weight::Bf16(&table), &mut out)
            .unwrap();
        outside(cuda.download(&out).map(|_| ()), "embed", "tokens");
        let rows = [one, bf16::ZERO, bf16::ZERO, one].map(|x| [x; 8]);
        assert_eq!(cuda.download(&out).unwrap(), rows.as_flattened());

        cuda.gather_rows(4, 8, &index, &table, &mut out).unwrap();
        outside(cuda.download(&out).map(|_| ()), "gather_rows", "index");

        let mut sums = cuda.zeros(3 * 8).unwrap();
        cuda.embed_backward(4, 8, &index, &dense, &mut sums)
            .unwrap();
        outside(cuda.download(&sums).map(|_| ()), "embed_backward", "tokens");
        let rows = [1f32, 0.0, 1.0].map(|x| [x; 8]);
        assert_eq!(cuda.download(&sums).unwrap(), rows.as_flattened());

        let mut sums = cuda.zeros(3 * 8).unwrap();
        cuda.scatter_add_rows(4, 8, &index, &dense, &mut sums)
            .unwrap();
        outside(
            cuda.download(&sums).map(|_| ()),
            "scatter_add_rows",
            "index",
        );
    });
}

#[test]
fn bad_arguments_are_refused() {
    with_cuda(|cuda, _| {
        let index = up(cuda, &[0u32, 2]);
        let table = cuda.zeros::<bf16>(24).unwrap();
        let mut out = cuda.zeros::<bf16>(16).unwrap();
        let mut embed =
            |rows, width| cuda.embed(rows, width, &index, Weight::Bf16(&table), &mut out);
        assert_eq!(embed(2, 8), Ok(()));
        assert_eq!(embed(2, 0), Ok(()));
        assert!(matches!(
            embed(3, 8),
            Err(Error::TooShort { name: "tokens", .. })
        ));
        assert!(matches!(
            embed(2, 16),
            Err(Error::TooShort { name: "out", .. })
        ));
        assert!(matches!(embed(2, 4), Err(Error::Invalid { .. })));
        assert!(matches!(embed(usize::MAX, 8), Err(Error::TooShort { .. })));
        let wide = cuda.zeros::<f32>(24).unwrap();
        let refused = cuda.embed(2, 8, &index, Weight::F32(&wide), &mut out);
        assert!(refused.unwrap_err().to_string().contains("bf16"));
        let mut sums = cuda.zeros::<f32>(24).unwrap();
        let short = cuda.embed_backward(2, 16, &index, &out, &mut sums);
        assert!(matches!(short, Err(Error::TooShort { name: "dout", .. })));
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let (rows, width, vocab) = (1024, 2048, 1500);
        let n = rows * width;
        let targets = tokens(8, rows, vocab);
        let mut distinct = targets.clone();
        distinct.sort();
        distinct.dedup();
        let (index, dense) = (up(cuda, &targets), up(cuda, &random(9, n)));
        let table = up(cuda, &random(10, vocab * width));
        let mut out = cuda.zeros::<bf16>(n).unwrap();
        let gather = reports_of(emulator, || {
            cuda.embed(rows, width, &index, Weight::Bf16(&table), &mut out)
        });
        Costs::memory_bound(2 * 2 * n + 4 * rows).check("embed", &gather);
        let mut sums = cuda.zeros::<f32>(vocab * width).unwrap();
        let scatter = reports_of(emulator, || {
            cuda.embed_backward(rows, width, &index, &dense, &mut sums)
        });
        let least = 2 * n + 2 * 4 * distinct.len() * width + 4 * rows;
        Costs::memory_bound(least).check("embed_backward", &scatter);
        let mut sums = cuda.zeros::<bf16>(vocab * width).unwrap();
        let scatter = reports_of(emulator, || {
            cuda.scatter_add_rows(rows, width, &index, &dense, &mut sums)
        });
        let least = 2 * n + 2 * 2 * distinct.len() * width + 4 * rows;
        Costs::memory_bound(least).check("scatter_add_rows", &scatter);
    });
}
