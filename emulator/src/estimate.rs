//! Estimates of how a kernel would run on a GPU: occupancy and a roofline. Both are models of
//! limits, not predictions; nothing here has been measured on hardware.

use crate::report::{Counters, LaunchReport};
use serde::{Deserialize, Serialize};
use std::fmt;

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

/// What ptxas gave a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes that a thread stores to local memory because registers ran out.
    pub spill_stores: u32,
    /// Bytes that it loads from there.
    pub spill_loads: u32,
}

impl Registers {
    /// Reads what `ptxas -v` said of one kernel.
    pub fn parse(text: &str, kernel: &str) -> Option<Registers> {
        let mut lines = text.lines();
        lines.find(|l| l.contains(&format!("Compiling entry function '{kernel}'")))?;
        let (mut spill_stores, mut spill_loads) = (0, 0);
        for line in lines.take_while(|l| !l.contains("Compiling entry function")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let before = |name: &[&str]| {
                let at = words.windows(name.len()).position(|w| w == name)?;
                words[..at].last()?.parse::<u32>().ok()
            };
            if let Some(n) = before(&["bytes", "spill", "stores,"]) {
                spill_stores = n;
                spill_loads = before(&["bytes", "spill", "loads"]).unwrap_or(0);
            }
            if let Some(registers) = before(&["registers,"]).or_else(|| before(&["registers"])) {
                return Some(Registers {
                    registers,
                    spill_stores,
                    spill_loads,
                });
            }
        }
        None
    }
}

/// How a launch would run on a GPU by its data sheet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The GPU's name.
    pub gpu: &'static str,
    /// Blocks that fit one of its multiprocessors.
    pub occupancy: Occupancy,
    /// The least times of its parts.
    pub roofline: Roofline,
    /// The longest of them.
    pub seconds: f64,
}

impl Estimate {
    /// The estimate for a launch of a kernel that takes so many registers a thread.
    pub fn new(gpu: &Gpu, report: &LaunchReport, registers: u32) -> Estimate {
        let threads = report.block.iter().product();
        let roofline = roofline(gpu, &report.counters);
        Estimate {
            gpu: gpu.name,
            occupancy: occupancy(gpu, threads, registers, report.shared),
            roofline,
            seconds: roofline.seconds(),
        }
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (o, r) = (&self.occupancy, &self.roofline);
        let limit = match o.limit {
            Limit::Threads => "threads",
            Limit::Registers => "registers",
            Limit::Shared => "shared memory",
            Limit::Blocks => "blocks",
        };
        let micro = |seconds: f64| seconds * 1e6;
        write!(
            f,
            "{} (estimate): {} blocks and {:.0} % of the warps a multiprocessor, limited by {limit}; \
             at least {:.3} us (memory {:.3}, arithmetic {:.3}, tensor cores {:.3})",
            self.gpu,
            o.blocks,
            100.0 * o.share,
            micro(self.seconds),
            micro(r.memory),
            micro(r.arithmetic),
            micro(r.tensor)
        )
    }
}
