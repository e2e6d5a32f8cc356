//! Rotary embedding on the emulator against its definition, its bits, bad positions, counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/rope.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::attention::Heads;
use dust_kernels::rope::Rope;
use dust_kernels::{Cpu, Cuda, Device, Error, Result};
use half::bf16;
use reference::{POSITIONS, angle, tables};

fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        q_heads,
        kv_heads,
        head_dim,
    }
}

fn rotate<D: Device + Rope>(
    device: &D,
    h: Heads,
    positions: &[u32],
    inverse: bool,
    qkv: &[D::Elem],
) -> Result<Vec<D::Elem>> {
    let (cos, sin) = tables(h.head_dim);
    let (cos, sin) = (up(device, &cos), up(device, &sin));
    let (p, mut x) = (up(device, positions), up(device, qkv));
    device.rope(positions.len(), h, &p, &cos, &sin, inverse, &mut x)?;
    device.download(&x)
}

/// What the definition gives for all heads, values included, which are not turned.
fn definition(h: Heads, positions: &[u32], inverse: bool, qkv: &[f64]) -> Vec<f64> {
    let mut out = qkv.to_vec();
    let half = h.head_dim / 2;
    for (row, &position) in out.chunks_mut(h.qkv_width()).zip(positions) {
        for head in row[..h.v_offset()].chunks_mut(h.head_dim) {
            for i in 0..half {
                let (sin, cos) = angle(position, i, h.head_dim).sin_cos();
                let sin = if inverse { -sin } else { sin };
                let (a, b) = (head[i], head[half + i]);
                (head[i], head[half + i]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    out
}

fn check(cuda: &Cuda, what: &str, h: Heads, positions: &[u32]) {
    let qkv = random(1, positions.len() * h.qkv_width());
    for inverse in [false, true] {
        let got = rotate(cuda, h, positions, inverse, &qkv).unwrap();
        let want = definition(h, positions, inverse, &wide(&qkv));
        let name = format!("{h:?}, inverse {inverse}, {what}");
        assert_close(&name, &wide(&got), &rounded(&want), &want, 2.0);
        for (got, x) in got.chunks(h.qkv_width()).zip(qkv.chunks(h.qkv_width())) {
            assert_eq!(
                bits(&got[h.v_offset()..]),
                bits(&x[h.v_offset()..]),
                "{name}"
            );
        }
    }
}

#[test]
fn agrees_with_the_definition_under_every_schedule() {
    let positions: Vec<u32> = (0..11).map(|row| row * 37 % 300).collect();
    for_each_schedule(|what, cuda| {
        check(cuda, what, heads(3, 1, 64), &positions);
        check(cuda, what, heads(2, 2, 16), &positions);
    });
}

#[test]
fn agrees_with_the_definition_on_awkward_shapes() {
    let positions: Vec<u32> = (0..111).map(|row| row * 5 % 300).collect();
    with_cuda(|cuda, _| {
        for h in [
            heads(9, 3, 64),
            heads(16, 8, 128),
            heads(14, 2, 80),
            heads(1, 1, 512),
        ] {
            check(
                cuda,
                "serial",
                h,
                &positions[..(1 << 15) / h.qkv_width().max(300)],
            );
        }
        check(cuda, "one row", heads(9, 3, 64), &[299]);
        check(cuda, "no rows", heads(9, 3, 64), &[]);
    });
}

#[test]
fn agrees_with_the_cpu() {
    let (h, positions) = (heads(9, 3, 64), [0, 7, 299, 12]);
    let qkv = random(2, positions.len() * h.qkv_width());
    let got = with_cuda(|cuda, _| rotate(cuda, h, &positions, false, &qkv).unwrap());
    let want = rotate(&Cpu::with_threads(1), h, &positions, false, &to_f32(&qkv)).unwrap();
    for (got, want) in got.iter().zip(want) {
        assert!((got.to_f32() - want).abs() <= 0.004 * want.abs() + 1e-6);
    }
}

#[test]
fn bits_depend_on_the_row_alone() {
    let h = heads(9, 3, 64);
    let positions: Vec<u32> = (0..53).collect();
    let qkv = random(5, positions.len() * h.qkv_width());
    with_cuda(|cuda, _| {
        let all = rotate(cuda, h, &positions, false, &qkv).unwrap();
        assert_eq!(
            bits(&all),
            bits(&rotate(cuda, h, &positions, false, &qkv).unwrap())
        );
        let row = 40 * h.qkv_width()..41 * h.qkv_width();
        let alone = rotate(cuda, h, &[40], false, &qkv[row.clone()]).unwrap();
        assert_eq!(bits(&alone), bits(&all[row]));
    });
}

#[test]
fn a_position_outside_of_the_tables_is_found_when_memory_is_read() {
    let h = heads(2, 1, 16);
    let qkv = random(6, 3 * h.qkv_width());
    for_each_schedule(|_, cuda| {
        let result = rotate(cuda, h, &[1, POSITIONS as u32, 2], false, &qkv);
        let want = Error::OutOfRange {
            op: "rope",
            name: "positions",
            at: 1,
            value: POSITIONS,
            limit: POSITIONS,
        };
        assert_eq!(result, Err(want));
        // It is said once, and the device goes on.
        assert!(rotate(cuda, h, &[1, 0, 2], false, &qkv).is_ok());
        assert!(rotate(cuda, h, &[u32::MAX; 3], false, &qkv).is_err());
    });
}

#[test]
fn refuses_short_buffers_and_odd_heads() {
    with_cuda(|cuda, _| {
        let call = |h: Heads, positions: usize, qkv: usize| {
            let (cos, sin) = (cuda.zeros(80).unwrap(), cuda.zeros(80).unwrap());
            let (p, mut x) = (
                cuda.zeros(positions).unwrap(),
                cuda.zeros::<bf16>(qkv).unwrap(),
            );
            cuda.rope(2, h, &p, &cos, &sin, false, &mut x)
        };
        assert_eq!(call(heads(2, 1, 16), 2, 128), Ok(()));
        let short = call(heads(2, 1, 16), 1, 128);
        assert!(matches!(
            short,
            Err(Error::TooShort {
                name: "positions",
                ..
            })
        ));
        let short = call(heads(2, 1, 16), 2, 127);
        assert!(matches!(short, Err(Error::TooShort { name: "qkv", .. })));
        for size in [3, 20, 1024] {
            let odd = call(heads(1, 1, size), 2, 6 * size);
            assert!(matches!(odd, Err(Error::Invalid { .. })), "{size}");
        }
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let (rows, h) = (POSITIONS, heads(9, 3, 64));
        let (cos, sin) = tables(64);
        let (cos, sin) = (up(cuda, &cos), up(cuda, &sin));
        let positions: Vec<u32> = (0..rows as u32).collect();
        let positions = up(cuda, &positions);
        let mut qkv = up(cuda, &random(7, rows * h.qkv_width()));
        let reports = reports_of(emulator, || {
            cuda.rope(rows, h, &positions, &cos, &sin, false, &mut qkv)
        });
        let least = rows * (2 * 2 * h.v_offset() + 4 + 2 * 4 * 32);
        Costs::memory_bound(least).check("rope", &reports);
    });
}
