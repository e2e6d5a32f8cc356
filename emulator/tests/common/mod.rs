//! What the tests share.
#![allow(dead_code)] // each test uses a part

use cuda_emulator::{Config, Device, install};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Kernels compiled by `tests/kernels/build.sh`.
pub const BASIC: &str = include_str!("../kernels/basic.ptx");
/// The tiled matrix product.
pub const GEMM: &str = include_str!("../kernels/gemm.ptx");
/// The same without `cp.async.wait_group`.
pub const GEMM_NO_WAIT: &str = include_str!("../kernels/gemm_no_wait.ptx");

/// A value that can be copied to a device.
pub trait Plain: Copy + Default {
    fn bytes(self) -> Vec<u8>;
    fn from(bytes: &[u8]) -> Self;
}

macro_rules! plain {
    ($($t:ty)*) => {$(
        impl Plain for $t {
            fn bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
            fn from(bytes: &[u8]) -> Self {
                <$t>::from_le_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}

plain!(u8 u16 u32 u64 i32 i64 f32 f64);

/// Copies a slice to new device memory.
pub fn upload<T: Plain>(device: &mut Device, values: &[T]) -> u64 {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.bytes()).collect();
    device.alloc_with(&bytes).unwrap()
}

/// Copies device memory back.
pub fn download<T: Plain>(device: &Device, address: u64, n: usize) -> Vec<T> {
    let size = size_of::<T>();
    let mut bytes = vec![0; n * size];
    device.read(address, &mut bytes).unwrap();
    bytes.chunks(size).map(T::from).collect()
}

/// A device with all checks on.
pub fn device() -> Device {
    Device::new(Config::default())
}

/// Deterministic numbers in [0, 1).
pub fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The driver is one for the process: its tests take turns.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let emulator = install().unwrap();
    emulator.recover().unwrap();
    emulator.configure(&Config::default()).unwrap();
    emulator.reports().unwrap();
    guard
}
