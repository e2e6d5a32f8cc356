//! Tests of the CUDA back end, on the emulator or a GPU. Included by `tests/cuda_*.rs` with `mod`.
#![allow(dead_code)] // each test file uses a part

use cuda_emulator::{BlockOrder, Config, CopyAsync, Emulator, LaunchReport, MmaRounding, Schedule};
use dust_kernels::{Cuda, Device, Float, Result};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::{Mutex, PoisonError};

/// Whether the tests run on a GPU rather than on the emulator: `DUST_TEST_DEVICE=cuda`.
pub fn on_gpu() -> bool {
    match std::env::var("DUST_TEST_DEVICE").as_deref() {
        Err(_) | Ok("emulator") => false,
        Ok("cuda") => true,
        Ok(other) => panic!("DUST_TEST_DEVICE: `{other}` is neither `emulator` nor `cuda`"),
    }
}

/// Runs `test` on a fresh device: of the emulator, all checks on, or a GPU, see [`on_gpu`].
///
/// One test runs at a time, because the driver is the process's. What a test broke is mended.
pub fn with_cuda<R>(test: impl FnOnce(&Cuda, Option<&Emulator>) -> R) -> R {
    with_config(&Config::default(), test)
}

/// As [`with_cuda`], under a configuration of the emulator.
pub fn with_config<R>(config: &Config, test: impl FnOnce(&Cuda, Option<&Emulator>) -> R) -> R {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let emulator = (!on_gpu()).then(|| cuda_emulator::install().unwrap());
    if let Some(emulator) = &emulator {
        emulator.recover().unwrap();
        emulator.configure(config).unwrap();
        emulator.reports().unwrap();
    }
    test(&Cuda::new(0).unwrap(), emulator.as_ref())
}

/// As [`with_cuda`], for tests of what only the emulator tells; on a GPU they do nothing.
pub fn with_emulator(test: impl FnOnce(&Cuda, &Emulator)) {
    if on_gpu() {
        eprintln!("left out on a GPU: the test asks the emulator");
        return;
    }
    with_cuda(|cuda, emulator| test(cuda, emulator.unwrap()));
}

/// Orders of warps, blocks and asynchronous copies, and roundings, that a correct kernel cannot
/// tell apart (roundings within tolerance). Each has a name for messages. With `DUST_LONG` in the
/// environment there are twenty random ones more.
pub fn schedules() -> Vec<(&'static str, Config)> {
    let with = |change: fn(&mut Config)| {
        let mut config = Config::default();
        change(&mut config);
        config
    };
    let mut schedules = vec![
        ("serial", Config::default()),
        (
            "reverse, blocks reversed, copies early",
            with(|c| {
                c.schedule = Schedule::Reverse;
                c.block_order = BlockOrder::Reverse;
                c.copy_async = CopyAsync::Early;
            }),
        ),
        (
            "lockstep, ampere rounding",
            with(|c| {
                c.schedule = Schedule::LowestPc;
                c.mma = MmaRounding::Ampere;
            }),
        ),
        (
            "random 1, blocks shuffled, hopper rounding, copies early",
            with(|c| {
                c.schedule = Schedule::Random(1);
                c.block_order = BlockOrder::Random(2);
                c.mma = MmaRounding::Hopper;
                c.copy_async = CopyAsync::Early;
            }),
        ),
        (
            "random 3, blocks shuffled, noise",
            with(|c| {
                c.schedule = Schedule::Random(3);
                c.block_order = BlockOrder::Random(4);
                c.noise = Some(5);
            }),
        ),
    ];
    if std::env::var_os("DUST_LONG").is_some() {
        schedules.extend((10..30).map(|seed| {
            let config = Config {
                schedule: Schedule::Random(seed),
                block_order: BlockOrder::Random(seed + 100),
                noise: Some(seed),
                copy_async: match seed % 2 {
                    0 => CopyAsync::Early,
                    _ => CopyAsync::Late,
                },
                ..Config::default()
            };
            ("random, of the long sweep", config)
        }));
    }
    schedules
}

/// Runs `test` once for each of [`schedules`], on a fresh device. A GPU has one of its own.
pub fn for_each_schedule(mut test: impl FnMut(&str, &Cuda)) {
    if on_gpu() {
        return with_cuda(|cuda, _| test("a GPU", cuda));
    }
    for (name, config) in schedules() {
        with_config(&config, |cuda, _| test(name, cuda));
    }
}

/// Uniform in -2 .. 2, rounded to bf16 so that every implementation sees the same input.
pub fn random(seed: u64, len: usize) -> Vec<bf16> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |_| bf16::from_f32(rng.random_range(-2.0f32..2.0));
    (0..len).map(draw).collect()
}

/// As [`random`], not rounded: for f32 arguments.
pub fn random_f32(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Widened for a reference.
pub fn wide<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| f64::from(v.to_f32())).collect()
}

/// Widened for the CPU.
pub fn to_f32(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// Rounded to bf16 and widened again: what a naive computation in bf16 would store.
pub fn rounded(values: &[f64]) -> Vec<f64> {
    let round = |v: &f64| f64::from(bf16::from_f64(*v).to_f32());
    values.iter().map(round).collect()
}

/// The bits, for comparisons that allow no difference.
pub fn bits<T: bytemuck::Pod>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// `device.upload`, unwrapped.
pub fn up<D: Device, T: dust_kernels::Element>(device: &D, values: &[T]) -> D::Buf<T> {
    device.upload(values).unwrap()
}

/// Largest distance from the reference; NaN counts as infinite.
pub fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let distance = |(g, w): (&f64, &f64)| match (g - w).abs() {
        d if d.is_nan() => f64::INFINITY,
        d => d,
    };
    got.iter().zip(want).map(distance).fold(0.0, f64::max)
}

/// The kernel's error is at most `factor` times that of a naive computation in the same format,
/// plus an f32 rounding of the largest value.
pub fn assert_close(what: &str, got: &[f64], naive: &[f64], want: &[f64], factor: f64) {
    let size = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
    let (got, limit) = (
        error(got, want),
        factor * error(naive, want) + 1.2e-7 * size,
    );
    assert!(got <= limit, "{what}: error {got:e}, limit {limit:e}");
}

/// What a launch may cost; checked by [`Costs::check`].
pub struct Costs {
    /// Bytes that any implementation must load and store.
    pub least_bytes: u64,
    /// Allowed multiple of that.
    pub bytes: f64,
    /// Least share of touched sectors that is used.
    pub sectors: f64,
    /// Largest share of shared-memory wavefronts that are bank conflicts.
    pub conflicts: f64,
}

impl Costs {
    /// What memory-bound kernels are held to.
    pub fn memory_bound(least_bytes: usize) -> Self {
        Self {
            least_bytes: least_bytes as u64,
            bytes: 1.1,
            sectors: 0.9,
            conflicts: 0.05,
        }
    }

    /// Holds the sum of `reports` to the costs.
    pub fn check(&self, what: &str, reports: &[LaunchReport]) {
        let mut sum = cuda_emulator::Counters::default();
        for report in reports {
            assert_eq!(report.findings, [], "{what}");
            sum.add(&report.counters);
        }
        // What one warp reads from one address in one instruction moves once.
        let bytes = sum.global_load_unique_bytes + sum.global_store_unique_bytes;
        let ratio = bytes as f64 / self.least_bytes as f64;
        assert!(ratio <= self.bytes, "{what}: {ratio:.3} x the least bytes");
        assert!(
            ratio >= 1.0,
            "{what}: {ratio:.3} x the least bytes: miscounted"
        );
        let used = sum.sector_use();
        assert!(
            used >= self.sectors,
            "{what}: {used:.3} of the sectors used"
        );
        let conflicts = sum.bank_conflicts as f64 / (sum.shared_wavefronts.max(1)) as f64;
        assert!(
            conflicts <= self.conflicts,
            "{what}: {conflicts:.3} bank conflicts"
        );
        assert_eq!(sum.local_bytes, 0, "{what}: local memory");
    }
}

/// The reports of `run`'s launches alone.
pub fn reports_of(emulator: &Emulator, run: impl FnOnce() -> Result<()>) -> Vec<LaunchReport> {
    emulator.reports().unwrap();
    run().unwrap();
    emulator.reports().unwrap()
}
