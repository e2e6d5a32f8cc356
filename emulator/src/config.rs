//! What a run can be asked for.

use serde::{Deserialize, Serialize};

/// Order in which the warps of a block take turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Each warp runs until it waits; lowest warp first. The fastest.
    #[default]
    Serial,
    /// As serial, highest warp first.
    Reverse,
    /// The warp that is furthest behind takes one step: warps in near lockstep.
    LowestPc,
    /// A random warp takes a random number of steps, and diverged lanes go in random order.
    Random(u64),
}

/// Order in which blocks start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockOrder {
    /// From block 0 up.
    #[default]
    Forward,
    /// From the last block down.
    Reverse,
    /// Shuffled.
    Random(u64),
}

/// When the data of a `cp.async` arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyAsync {
    /// At the wait: a missing wait reads old data.
    #[default]
    Late,
    /// At once: a missing barrier overwrites data that is still being read.
    Early,
}

/// How `mma` rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MmaRounding {
    /// Summed in f64 and rounded once.
    #[default]
    Exact,
    /// As sm_80 is understood to do it: aligned to the largest exponent, cut to 24 fraction bits.
    Ampere,
    /// As sm_90 is understood to do it: likewise, 25 fraction bits, all of k in one step.
    Hopper,
}

/// Checks that cost time. Bounds, alignment, use after free, barrier divergence, deadlock and
/// absent lanes are always checked: the machine could not go on without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checks {
    /// Values that were never written must not reach an address, a branch or device memory.
    pub uninitialised: bool,
    /// Unordered accesses of the threads of a block to shared memory.
    pub shared_races: bool,
    /// Unordered accesses of different blocks to device memory.
    pub global_races: bool,
    /// Device memory still allocated when the context is destroyed.
    pub leaks: bool,
}

impl Checks {
    /// All of them.
    pub const ALL: Checks = Checks {
        uninitialised: true,
        shared_races: true,
        global_races: true,
        leaks: true,
    };
    /// None of them.
    pub const NONE: Checks = Checks {
        uninitialised: false,
        shared_races: false,
        global_races: false,
        leaks: false,
    };
}

impl Default for Checks {
    fn default() -> Self {
        Checks::ALL
    }
}

/// Everything that can be chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Checks that are on.
    pub checks: Checks,
    /// Order of warps.
    pub schedule: Schedule,
    /// Order of blocks.
    pub block_order: BlockOrder,
    /// When asynchronous copies arrive.
    pub copy_async: CopyAsync,
    /// How `mma` rounds.
    pub mma: MmaRounding,
    /// Disturbs results of approximate functions within their documented error, by this seed.
    pub noise: Option<u64>,
    /// Count instructions, bytes, sectors, bank conflicts.
    pub counters: bool,
    /// Compute capability that the device reports: (8, 0) or (9, 0).
    pub capability: (u32, u32),
    /// Bytes of device memory.
    pub memory: u64,
    /// Host threads that run blocks; 0 takes one for each core.
    pub threads: usize,
    /// Warp instructions that a launch may execute before it is taken to hang.
    pub step_limit: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            checks: Checks::ALL,
            schedule: Schedule::Serial,
            block_order: BlockOrder::Forward,
            copy_async: CopyAsync::Late,
            mma: MmaRounding::Exact,
            noise: None,
            counters: true,
            capability: (8, 0),
            memory: 16 << 30,
            threads: 0,
            step_limit: 2_000_000_000,
        }
    }
}
