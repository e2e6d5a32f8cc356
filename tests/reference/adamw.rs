//! Steps of the optimizer, and the same in f64.

use dust_kernels::adamw::{AdamW, AdamWConfig};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Uniform in -1 .. 1.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Parameters, moments and the copy.
pub type Trained = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<bf16>);

/// Parameters, moments and the copy after `steps` steps.
pub fn train<D: AdamW>(device: &D, len: usize, steps: u32) -> Trained {
    let mut param = device.upload(&random(0, len)).unwrap();
    let (mut m, mut v) = (device.zeros(len).unwrap(), device.zeros(len).unwrap());
    let mut copy = device.zeros::<bf16>(len).unwrap();
    let scale = device.upload(&[0.5f32]).unwrap();
    for step in 1..=steps {
        let config = AdamWConfig {
            learning_rate: 1e-3,
            step,
            ..Default::default()
        };
        let grad = device.upload(&random(u64::from(step), len)).unwrap();
        let copy = Some(&mut copy);
        device
            .adamw(
                &config, len, &scale, &grad, &mut param, &mut m, &mut v, copy,
            )
            .unwrap();
    }
    (
        device.download(&param).unwrap(),
        device.download(&m).unwrap(),
        device.download(&v).unwrap(),
        device.download(&copy).unwrap(),
    )
}

/// Holds `steps` steps of [`train`] to f64.
pub fn check(steps: u32, (param, m, v, copy): &Trained) {
    let len = param.len();
    let start = random(0, len);
    let c = AdamWConfig::default();
    let (b1, b2) = (f64::from(c.beta1), f64::from(c.beta2));
    let mut want: Vec<[f64; 3]> = start.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
    for step in 1..=steps as i32 {
        let grad = random(step as u64, len);
        for ([p, m, v], g) in want.iter_mut().zip(grad) {
            let g = 0.5 * f64::from(g);
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            let hat = *m / (1.0 - b1.powi(step));
            let root = (*v / (1.0 - b2.powi(step))).sqrt() + f64::from(c.eps);
            *p -= f64::from(1e-3f32) * (hat / root + f64::from(c.weight_decay) * *p);
        }
    }
    for i in 0..len {
        for (got, want, tolerance) in [
            (param[i], want[i][0], 2e-6),
            (m[i], want[i][1], 1e-6),
            (v[i], want[i][2], 1e-6),
        ] {
            assert!((f64::from(got) - want).abs() < tolerance, "{got} {want}");
        }
        assert_eq!(copy[i], bf16::from_f32(param[i]));
    }
}

/// Kahan's sum in f64 of squares, which are exact in f64.
pub fn squares_f64(x: &[f32]) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0f64);
    for &x in x {
        let y = f64::from(x) * f64::from(x) - lost;
        let next = sum + y;
        lost = (next - sum) - y;
        sum = next;
    }
    sum
}

/// Halfway cases and NaN in the bf16 copy.
pub fn check_copy<D: AdamW>(device: &D) {
    // Halfway between two bf16 with an even and an odd lower neighbour, just above, the
    // largest f32 (which rounds to infinity), NaN.
    let start = [
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_8001,
        0x7f7f_ffff,
        0x7f80_0001,
    ]
    .map(f32::from_bits);
    let mut param = device.upload(&start).unwrap();
    let (mut m, mut v) = (device.zeros(5).unwrap(), device.zeros(5).unwrap());
    let mut copy = device.zeros::<bf16>(5).unwrap();
    let scale = device.upload(&[1.0f32]).unwrap();
    let grad = device.zeros(5).unwrap();
    let config = AdamWConfig {
        weight_decay: 0.0,
        ..Default::default()
    };
    device
        .adamw(
            &config,
            5,
            &scale,
            &grad,
            &mut param,
            &mut m,
            &mut v,
            Some(&mut copy),
        )
        .unwrap();
    let bits: Vec<u16> = device
        .download(&copy)
        .unwrap()
        .iter()
        .map(|c| c.to_bits())
        .collect();
    assert_eq!(bits[..4], [0x3f80, 0x3f82, 0x3f81, 0x7f80]);
    assert!(device.download(&copy).unwrap()[4].is_nan());
}

/// A gradient that is no number changes nothing.
pub fn check_skip<D: AdamW>(device: &D) {
    let grad = device.upload(&[f32::NAN, f32::INFINITY, 1.0]).unwrap();
    let mut squares = device.zeros(1).unwrap();
    let (mut norm, mut scale) = (device.zeros(1).unwrap(), device.upload(&[1.0f32]).unwrap());
    device.sum_of_squares(3, &grad, &mut squares, 0).unwrap();
    device
        .clip_scale(1, 1.0, &squares, &mut norm, &mut scale)
        .unwrap();
    assert!(device.download(&norm).unwrap()[0].is_nan());
    assert_eq!(device.download(&scale).unwrap(), [0.0]);
    let mut param = device.upload(&[1.0f32, 2.0, 3.0]).unwrap();
    let mut m = device.upload(&[0.1f32, 0.2, 0.3]).unwrap();
    let mut v = device.upload(&[0.4f32, 0.5, 0.6]).unwrap();
    let mut copy = device.upload(&[bf16::ONE; 3]).unwrap();
    let config = AdamWConfig::default();
    device
        .adamw(
            &config,
            3,
            &scale,
            &grad,
            &mut param,
            &mut m,
            &mut v,
            Some(&mut copy),
        )
        .unwrap();
    assert_eq!(device.download(&param).unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(device.download(&m).unwrap(), [0.1, 0.2, 0.3]);
    assert_eq!(device.download(&v).unwrap(), [0.4, 0.5, 0.6]);
    assert_eq!(device.download(&copy).unwrap(), [bf16::ONE; 3]);
}

/// Norms and scales of sums of squares.
pub fn check_norms<D: AdamW>(device: &D) {
    for (squares, max_norm, norm, scale) in [
        (vec![9.0f32, 16.0], 1.0, 5.0, 0.2),
        (vec![9.0, 16.0], 5.0, 5.0, 1.0),
        (vec![0.09, 0.16], 1.0, 0.5, 1.0),
        (vec![9.0, 16.0], f32::INFINITY, 5.0, 1.0),
        (vec![0.0], 1.0, 0.0, 1.0),
        (vec![], 1.0, 0.0, 1.0),
        (vec![1.0, f32::INFINITY], 1.0, f32::INFINITY, 0.0),
        // The sum needs more than f32, its root does not.
        (
            vec![3e38, 3e38],
            1.0,
            6e38f64.sqrt() as f32,
            (1.0 / 6e38f64.sqrt()) as f32,
        ),
    ] {
        let (mut n, mut s) = (
            device.zeros::<f32>(1).unwrap(),
            device.zeros::<f32>(1).unwrap(),
        );
        let sums = squares.len();
        device
            .clip_scale(
                sums,
                max_norm,
                &device.upload(&squares).unwrap(),
                &mut n,
                &mut s,
            )
            .unwrap();
        let (n, s) = (device.download(&n).unwrap(), device.download(&s).unwrap());
        assert!(
            n[0] == norm || (n[0] - norm).abs() < 1e-6 * norm,
            "{squares:?}: {}",
            n[0]
        );
        assert!(
            (s[0] - scale).abs() <= 1e-6 * scale,
            "{squares:?}: {}",
            s[0]
        );
    }
}
