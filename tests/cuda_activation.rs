//! SwiGLU on the emulator against f64 and the CPU, extreme gates, its bits, and its counters.
#![cfg(feature = "cuda")]

mod common {
    pub mod cuda;
}
#[path = "reference/activation.rs"]
mod reference;

use common::cuda::*;
use dust_kernels::activation::Activation;
use dust_kernels::{Cpu, Cuda, Device, Element, Error};
use half::bf16;
use reference::{silu, silu_slope};

/// The output and the gradient.
fn run<D: Device + Activation>(
    device: &D,
    width: usize,
    gate_up: &[D::Elem],
    dout: &[D::Elem],
) -> (Vec<D::Elem>, Vec<D::Elem>) {
    let rows = dout.len() / width;
    let (mut out, mut d) = (
        device.zeros(dout.len()).unwrap(),
        device.zeros(gate_up.len()).unwrap(),
    );
    let (gate_up, dout) = (up(device, gate_up), up(device, dout));
    device.swiglu(rows, width, &gate_up, &mut out).unwrap();
    device
        .swiglu_backward(rows, width, &gate_up, &dout, &mut d)
        .unwrap();
    (device.download(&out).unwrap(), device.download(&d).unwrap())
}

fn scaled(values: Vec<bf16>, factor: f32) -> Vec<bf16> {
    let scale = |v: bf16| bf16::from_f32(v.to_f32() * factor);
    values.into_iter().map(scale).collect()
}

fn check(cuda: &Cuda, what: &str, rows: usize, width: usize, range: f32) {
    let gate_up = scaled(random(1, 2 * rows * width), range);
    let dout = random(2, rows * width);
    let (out, d) = run(cuda, width, &gate_up, &dout);
    let (mut want, mut dwant) = (Vec::new(), Vec::new());
    for (row, dout) in wide(&gate_up)
        .chunks(2 * width)
        .zip(wide(&dout).chunks(width))
    {
        let (gate, up) = row.split_at(width);
        let each = |f: &dyn Fn(usize) -> f64| (0..width).map(f).collect::<Vec<_>>();
        want.extend(each(&|j| silu(gate[j]) * up[j]));
        dwant.extend(each(&|j| dout[j] * up[j] * silu_slope(gate[j])));
        dwant.extend(each(&|j| dout[j] * silu(gate[j])));
    }
    let name = |part| format!("{part} of {rows} x {width}, {what}");
    assert_close(&name("out"), &wide(&out), &rounded(&want), &want, 2.0);
    assert_close(&name("gradient"), &wide(&d), &rounded(&dwant), &dwant, 2.0);
}

#[test]
fn agrees_with_f64_under_every_schedule() {
    for_each_schedule(|what, cuda| check(cuda, what, 7, 72, 1.0));
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    with_cuda(|cuda, _| {
        for (rows, width, range) in [(1, 8, 1.0), (111, 24, 10.0), (3, 1536, 4.0), (989, 8, 1.0)] {
            check(cuda, "serial", rows, width, range);
        }
    });
}

#[test]
fn agrees_with_the_cpu() {
    let (gate_up, dout) = (scaled(random(3, 2 * 576), 5.0), random(4, 576));
    let got = with_cuda(|cuda, _| run(cuda, 192, &gate_up, &dout));
    let want = run(
        &Cpu::with_threads(1),
        192,
        &to_f32(&gate_up),
        &to_f32(&dout),
    );
    for (got, want) in [(got.0, want.0), (got.1, want.1)] {
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got.to_f32() - want).abs() <= 0.004 * want.abs() + 1e-6,
                "{got} {want}"
            );
        }
    }
}

#[test]
fn the_largest_gates_are_safe() {
    let gates = [
        -50.0,
        -88.0,
        -200.0,
        -3e38,
        f32::NEG_INFINITY,
        50.0,
        200.0,
        f32::INFINITY,
    ];
    let gate_up: Vec<f32> = gates.into_iter().chain([1.0; 8]).collect();
    let gate_up: Vec<bf16> = gate_up.into_iter().map(bf16::from_f32).collect();
    let one = [bf16::from_f32(1.0); 8];
    with_cuda(|cuda, _| {
        let (out, d) = run(cuda, 8, &gate_up, &one);
        for i in 0..8 {
            let gate = gate_up[i].to_f32();
            let (value, slope) = if gate < 0.0 { (0.0, 0.0) } else { (gate, 1.0) };
            let near =
                |got: bf16, want: f32| got.to_f32() == want || (got.to_f32() - want).abs() < 1e-8;
            assert!(near(out[i], value), "silu({gate}) = {}", out[i]);
            assert!(near(d[i], slope), "silu'({gate}) = {}", d[i]);
            assert!(near(d[8 + i], value), "{gate}: {}", d[8 + i]);
        }
        let (out, d) = run(cuda, 8, &[bf16::NAN; 16], &one);
        assert!(out.iter().chain(&d).all(|x| x.is_nan()));
    });
}

#[test]
fn bits_depend_on_the_row_alone() {
    let (rows, width) = (37, 264);
    let (gate_up, dout) = (random(5, 2 * rows * width), random(6, rows * width));
    with_cuda(|cuda, _| {
        let all = run(cuda, width, &gate_up, &dout);
        let again = run(cuda, width, &gate_up, &dout);
        assert_eq!(
            (bits(&all.0), bits(&all.1)),
            (bits(&again.0), bits(&again.1))
        );
        let (one, two) = (20 * width..21 * width, 40 * width..42 * width);
        let alone = run(cuda, width, &gate_up[two.clone()], &dout[one.clone()]);
        assert_eq!(bits(&alone.0), bits(&all.0[one]));
        assert_eq!(bits(&alone.1), bits(&all.1[two]));
    });
}

#[test]
fn refuses_short_buffers_and_odd_widths() {
    fn empty<T: Element>(cuda: &Cuda, n: usize) -> <Cuda as Device>::Buf<T> {
        cuda.zeros(n).unwrap()
    }
    with_cuda(|cuda, _| {
        let forward = |width, gate_up, out| {
            cuda.swiglu(2, width, &empty(cuda, gate_up), &mut empty(cuda, out))
        };
        assert_eq!(forward(8, 32, 16), Ok(()));
        assert_eq!(forward(0, 0, 0), Ok(()));
        assert!(matches!(
            forward(8, 31, 16),
            Err(Error::TooShort {
                name: "gate_up",
                ..
            })
        ));
        assert!(matches!(
            forward(8, 32, 15),
            Err(Error::TooShort { name: "out", .. })
        ));
        assert!(matches!(forward(12, 48, 24), Err(Error::Invalid { .. })));
        let (gate_up, dout) = (empty(cuda, 32), empty(cuda, 16));
        let short = cuda.swiglu_backward(2, 8, &gate_up, &dout, &mut empty(cuda, 31));
        assert!(matches!(
            short,
            Err(Error::TooShort {
                name: "dgate_up",
                ..
            })
        ));
    });
}

#[test]
fn costs_are_bounded() {
    with_emulator(|cuda, emulator| {
        let (rows, width) = (256, 1536);
        let n = rows * width;
        let (gate_up, dout) = (up(cuda, &random(7, 2 * n)), up(cuda, &random(8, n)));
        let (mut out, mut d) = (cuda.zeros(n).unwrap(), cuda.zeros(2 * n).unwrap());
        let forward = reports_of(emulator, || cuda.swiglu(rows, width, &gate_up, &mut out));
        Costs::memory_bound(3 * 2 * n).check("swiglu", &forward);
        let backward = reports_of(emulator, || {
            cuda.swiglu_backward(rows, width, &gate_up, &dout, &mut d)
        });
        Costs::memory_bound(5 * 2 * n).check("swiglu_backward", &backward);
    });
}
