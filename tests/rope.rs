//! Rotary embedding: by the definition, its inverse, and what attention needs of it.

use dust_kernels::attention::Heads;
use dust_kernels::cpu::Level;
use dust_kernels::rope::Rope;
use dust_kernels::{Cpu, Device, Error};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::{angle, tables};

#[path = "reference/rope.rs"]
mod reference;

const fn heads(q_heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        q_heads,
        kv_heads,
        head_dim,
    }
}

const SHAPES: [Heads; 4] = [
    heads(9, 3, 64),
    heads(14, 2, 64),
    heads(4, 1, 20),
    heads(1, 1, 2),
];

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn rotate(cpu: &Cpu, h: Heads, positions: &[u32], inverse: bool, qkv: &[f32]) -> Vec<f32> {
    let (cos, sin) = tables(h.head_dim);
    let mut buffer = cpu.upload(qkv).unwrap();
    cpu.rope(
        positions.len(),
        h,
        &cpu.upload(positions).unwrap(),
        &cpu.upload(&cos).unwrap(),
        &cpu.upload(&sin).unwrap(),
        inverse,
        &mut buffer,
    )
    .unwrap();
    cpu.download(&buffer).unwrap()
}

#[test]
fn agrees_with_the_definition_on_every_level_and_leaves_values_alone() {
    let positions: Vec<u32> = (0..37).map(|row| row * 5 % 200 + 99).collect();
    for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon] {
        let Ok(cpu) = Cpu::with_threads(2).with_level(level) else {
            continue;
        };
        for h in SHAPES {
            let (d, width) = (h.head_dim, h.qkv_width());
            let qkv = random(1, positions.len() * width);
            let got = rotate(&cpu, h, &positions, false, &qkv);
            for (row, &position) in positions.iter().enumerate() {
                let (x, y) = (&qkv[row * width..][..width], &got[row * width..][..width]);
                assert_eq!(x[h.v_offset()..], y[h.v_offset()..]);
                for head in 0..h.q_heads + h.kv_heads {
                    for i in 0..d / 2 {
                        let (sin, cos) = angle(position, i, d).sin_cos();
                        let (at, with) = (head * d + i, head * d + i + d / 2);
                        let (a, b) = (f64::from(x[at]), f64::from(x[with]));
                        let (first, second) = (a * cos - b * sin, b * cos + a * sin);
                        assert!((f64::from(y[at]) - first).abs() < 1e-6, "{h:?} {level}");
                        assert!((f64::from(y[with]) - second).abs() < 1e-6, "{h:?} {level}");
                    }
                }
            }
        }
    }
}

#[test]
fn keeps_the_norm_and_is_undone_by_its_inverse() {
    let cpu = Cpu::with_threads(2);
    for h in SHAPES {
        let positions: Vec<u32> = (200..221).collect();
        let qkv = random(2, positions.len() * h.qkv_width());
        let turned = rotate(&cpu, h, &positions, false, &qkv);
        let back = rotate(&cpu, h, &positions, true, &turned);
        for (x, y) in qkv.iter().zip(&back) {
            assert!((x - y).abs() < 1e-6, "{h:?}: {x} {y}");
        }
        let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        for (x, y) in qkv.chunks(h.head_dim).zip(turned.chunks(h.head_dim)) {
            assert!((norm(x) / norm(y) - 1.0).abs() < 1e-6);
        }
        assert!(qkv.iter().zip(&turned).any(|(x, y)| (x - y).abs() > 0.1));
    }
}

#[test]
fn a_score_depends_on_the_distance_alone() {
    let cpu = Cpu::with_threads(1);
    let h = heads(1, 1, 64);
    let (q, k) = (random(3, 64), random(4, 64));
    let score = |q_position: u32, k_position: u32| -> f64 {
        let rows = [[&q[..], &k, &k].concat(), [&q[..], &k, &k].concat()].concat();
        let turned = rotate(&cpu, h, &[q_position, k_position], false, &rows);
        let (q, k) = (&turned[..64], &turned[192 + 64..][..64]);
        let products = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    let near = score(10, 3);
    for shift in [1, 50, 280] {
        assert!((score(10 + shift, 3 + shift) - near).abs() < 1e-4);
    }
    assert!((score(11, 3) - near).abs() > 1e-2);
}

#[test]
fn bits_do_not_depend_on_threads_or_batch() {
    let h = heads(4, 1, 20);
    let width = h.qkv_width();
    let positions: Vec<u32> = (0..53).collect();
    let qkv = random(5, positions.len() * width);
    let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
    let one = rotate(&Cpu::with_threads(1), h, &positions, false, &qkv);
    for threads in [2, 5] {
        let many = rotate(&Cpu::with_threads(threads), h, &positions, false, &qkv);
        assert_eq!(bits(&one), bits(&many));
    }
    let alone = rotate(
        &Cpu::with_threads(1),
        h,
        &[40],
        false,
        &qkv[40 * width..][..width],
    );
    assert_eq!(bits(&alone), bits(&one[40 * width..][..width]));
}

#[test]
fn refuses_what_breaks_the_rules() {
    let cpu = Cpu::with_threads(1);
    let call = |h: Heads, positions: &[u32], cos: usize, sin: usize, qkv: usize| {
        let mut qkv = cpu.zeros(qkv).unwrap();
        let (cos, sin) = (cpu.zeros(cos).unwrap(), cpu.zeros(sin).unwrap());
        let positions = cpu.upload(positions).unwrap();
        cpu.rope(2, h, &positions, &cos, &sin, false, &mut qkv)
    };
    let h = heads(2, 1, 4);
    assert_eq!(call(h, &[0, 4], 10, 10, 32), Ok(()));
    for (positions, cos, sin, qkv) in [
        (&[0, 5][..], 10, 10, 32),
        (&[0, 4], 9, 10, 32),
        (&[0, 4], 10, 9, 32),
    ] {
        let error = call(h, positions, cos, sin, qkv);
        assert!(matches!(error, Err(Error::OutOfRange { at: 1, .. })));
    }
    let short = call(h, &[0], 10, 10, 32);
    assert!(matches!(
        short,
        Err(Error::TooShort {
            name: "positions",
            ..
        })
    ));
    let short = call(h, &[0, 4], 10, 10, 31);
    assert!(matches!(short, Err(Error::TooShort { name: "qkv", .. })));
    let odd = call(heads(2, 1, 3), &[0, 0], 10, 10, 32);
    assert!(matches!(odd, Err(Error::Invalid { .. })));
}
