//! Estimates of how a kernel would run on a GPU: occupancy and a roofline. Both are models of
//! limits, not predictions; nothing here has been measured on hardware.

use crate::report::Counters;
use serde::{Deserialize, Serialize};

/// Limits of a GPU, from its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Name.
    pub name: &'static str,
    /// Multiprocessors.
    pub sms: u32,
    /// Shared memory of a multiprocessor in bytes.
    pub shared: u32,
    /// Bytes a second from memory.
    pub bandwidth: f64,
    /// f32 operations a second outside of tensor cores.
    pub flops: f64,
    /// Dense bf16 operations a second of tensor cores.
    pub tensor_flops: f64,
}

/// A100 SXM, 80 GB.
pub const A100: Gpu = Gpu {
    name: "A100",
    sms: 108,
    shared: 164 << 10,
    bandwidth: 2.039e12,
    flops: 19.5e12,
    tensor_flops: 312e12,
};

/// H100 SXM.
pub const H100: Gpu = Gpu {
    name: "H100",
    sms: 132,
    shared: 228 << 10,
    bandwidth: 3.35e12,
    flops: 67e12,
    tensor_flops: 989e12,
};

/// What bounds the number of blocks on a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// 2048 threads.
    Threads,
    /// 65,536 registers.
    Registers,
    /// Shared memory.
    Shared,
    /// 32 blocks.
    Blocks,
}

/// Blocks that fit a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Occupancy {
    /// Blocks at once.
    pub blocks: u32,
    /// Share of the 64 warps.
    pub share: f64,
    /// What allows no more.
    pub limit: Limit,
}

/// Occupancy of a kernel of `threads` threads a block, with the registers a thread and the shared
/// memory a block that `ptxas -v` prints (plus dynamic shared memory).
pub fn occupancy(gpu: &Gpu, threads: u32, registers: u32, shared: u32) -> Occupancy {
    let warps = threads.div_ceil(32).max(1);
    // Registers are given to warps in pieces of 256; a block also takes 1 KiB of shared memory.
    let by_registers = 65536 / (registers.max(1) * 32).next_multiple_of(256) / warps;
    let by_shared = gpu.shared / (shared + 1024).next_multiple_of(128);
    let limits = [
        (64 / warps, Limit::Threads),
        (by_registers, Limit::Registers),
        (by_shared, Limit::Shared),
        (32, Limit::Blocks),
    ];
    let (blocks, limit) = limits
        .into_iter()
        .min_by_key(|l| l.0)
        .unwrap_or((0, Limit::Blocks));
    Occupancy {
        blocks,
        share: (blocks * warps) as f64 / 64.0,
        limit,
    }
}

/// Shortest times that a GPU's limits allow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// Seconds to move the touched sectors if caches hold nothing.
    pub memory: f64,
    /// Seconds of the f32 units.
    pub arithmetic: f64,
    /// Seconds of the tensor cores.
    pub tensor: f64,
}

impl Roofline {
    /// The longest of them: the estimate of the kernel's time.
    pub fn seconds(&self) -> f64 {
        self.memory.max(self.arithmetic).max(self.tensor)
    }
}

/// The roofline of what was counted.
pub fn roofline(gpu: &Gpu, counters: &Counters) -> Roofline {
    let sectors = counters.global_load_sectors + counters.global_store_sectors;
    Roofline {
        memory: 32.0 * sectors as f64 / gpu.bandwidth,
        arithmetic: counters.flops as f64 / gpu.flops,
        tensor: counters.mma_flops as f64 / gpu.tensor_flops,
    }
}
