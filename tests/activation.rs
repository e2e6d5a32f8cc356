//! SwiGLU against f64, its gradient against finite differences of f64.

use dust_kernels::activation::Activation;
use dust_kernels::{Cpu, Device, Error};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::{silu, silu_slope};

#[path = "reference/activation.rs"]
mod reference;

fn random(seed: u64, len: usize, range: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-range..range)).collect()
}

fn forward(cpu: &Cpu, rows: usize, width: usize, gate_up: &[f32]) -> Vec<f32> {
    let mut out = cpu.zeros(rows * width).unwrap();
    cpu.swiglu(rows, width, &cpu.upload(gate_up).unwrap(), &mut out)
        .unwrap();
    cpu.download(&out).unwrap()
}

fn backward(cpu: &Cpu, rows: usize, width: usize, gate_up: &[f32], dout: &[f32]) -> Vec<f32> {
    let mut d = cpu.zeros(rows * width * 2).unwrap();
    let (gate_up, dout) = (cpu.upload(gate_up).unwrap(), cpu.upload(dout).unwrap());
    cpu.swiglu_backward(rows, width, &gate_up, &dout, &mut d)
        .unwrap();
    cpu.download(&d).unwrap()
}

#[test]
fn values_and_gradients_match_f64() {
    let cpu = Cpu::with_threads(2);
    for (rows, width) in [(1, 1), (7, 111), (111, 7), (3, 989), (989, 1), (20, 1536)] {
        for range in [1.0, 20.0] {
            let gate_up = random(1, rows * width * 2, range);
            let dout = random(2, rows * width, 1.0);
            let out = forward(&cpu, rows, width, &gate_up);
            let grad = backward(&cpu, rows, width, &gate_up, &dout);
            for row in 0..rows {
                for j in 0..width {
                    let g = f64::from(gate_up[row * 2 * width + j]);
                    let u = f64::from(gate_up[row * 2 * width + width + j]);
                    let d = f64::from(dout[row * width + j]);
                    let close = |got: f32, want: f64| {
                        let tolerance = 1e-6 * want.abs() + 1e-6 * d.abs().max(1.0) * 1e-2;
                        assert!(
                            (f64::from(got) - want).abs() < tolerance,
                            "{got} {want} at {g}"
                        );
                    };
                    close(out[row * width + j], silu(g) * u);
                    close(grad[row * 2 * width + width + j], d * silu(g));
                    let h = 1e-5;
                    let slope = (silu(g + h) - silu(g - h)) / (2.0 * h);
                    assert!((slope - silu_slope(g)).abs() < 1e-8, "{slope} at {g}");
                    let want = d * u * slope;
                    let got = f64::from(grad[row * 2 * width + j]);
                    assert!(
                        (got - want).abs() < 2e-6 * (1.0 + u.abs()),
                        "{got} {want} at {g}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_largest_gates_are_safe() {
    let cpu = Cpu::with_threads(1);
    let gates = [
        -50.0,
        -88.0,
        -200.0,
        f32::MIN,
        f32::NEG_INFINITY,
        50.0,
        88.0,
        200.0,
        f32::MAX,
    ];
    for &g in &gates {
        let out = forward(&cpu, 1, 1, &[g, 1.0])[0];
        let grad = backward(&cpu, 1, 1, &[g, 1.0], &[1.0]);
        let (value, slope) = if g < 0.0 { (0.0, 0.0) } else { (g, 1.0) };
        assert!(
            (out - value).abs() <= 1e-6 * value.max(1e-9),
            "silu({g}) = {out}"
        );
        assert!((grad[0] - slope).abs() < 1e-6, "silu'({g}) = {}", grad[0]);
        assert_eq!(grad[1], out, "at {g}");
    }
    assert!(forward(&cpu, 1, 1, &[f32::NAN, 1.0])[0].is_nan());
    assert!(
        backward(&cpu, 1, 1, &[f32::NAN, 1.0], &[1.0])
            .iter()
            .all(|x| x.is_nan())
    );
}

#[test]
fn a_row_has_the_same_bits_alone_and_on_any_number_of_threads() {
    let (rows, width) = (37, 989);
    let gate_up = random(3, rows * width * 2, 8.0);
    let dout = random(4, rows * width, 1.0);
    let one = Cpu::with_threads(1);
    let (out, grad) = (
        forward(&one, rows, width, &gate_up),
        backward(&one, rows, width, &gate_up, &dout),
    );
    for threads in [1, 2, 5] {
        let cpu = Cpu::with_threads(threads);
        assert_eq!(forward(&cpu, rows, width, &gate_up), out);
        assert_eq!(backward(&cpu, rows, width, &gate_up, &dout), grad);
    }
    for row in [0, 13, rows - 1] {
        let gu = &gate_up[row * 2 * width..][..2 * width];
        let alone = backward(&one, 1, width, gu, &dout[row * width..][..width]);
        assert_eq!(forward(&one, 1, width, gu), out[row * width..][..width]);
        assert_eq!(alone, grad[row * 2 * width..][..2 * width]);
    }
}

#[test]
fn short_buffers_are_refused() {
    let cpu = Cpu::with_threads(1);
    let short = cpu.zeros::<f32>(11).unwrap();
    let gate_up = cpu.zeros::<f32>(12).unwrap();
    let mut out = cpu.zeros::<f32>(6).unwrap();
    let error = cpu.swiglu(2, 3, &short, &mut out).unwrap_err();
    assert!(matches!(
        error,
        Error::TooShort {
            name: "gate_up",
            len: 11,
            needed: 12,
            ..
        }
    ));
    let error = cpu
        .swiglu(3, 2, &gate_up, &mut cpu.zeros(5).unwrap())
        .unwrap_err();
    assert!(matches!(error, Error::TooShort { name: "out", .. }));
    let error = cpu
        .swiglu_backward(2, 3, &gate_up, &out, &mut cpu.zeros(11).unwrap())
        .unwrap_err();
    assert!(matches!(
        error,
        Error::TooShort {
            name: "dgate_up",
            ..
        }
    ));
    cpu.swiglu(0, 3, &short, &mut out).unwrap();
    cpu.swiglu(3, 0, &short, &mut out).unwrap();
}
