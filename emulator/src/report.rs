//! What a launch did: findings and counters, as values, tables, CSV and JSON.

use crate::machine::code::{CLASSES, Class};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Kinds of errors that the checks find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An access outside every allocation.
    OutOfBounds,
    /// An address that is not a multiple of the access's size.
    Misaligned,
    /// An access to freed memory.
    UseAfterFree,
    /// A value that was never written decides something.
    Uninitialised,
    /// Unordered accesses to shared memory.
    SharedRace,
    /// Unordered accesses of two blocks to device memory.
    GlobalRace,
    /// Lanes of one warp do not reach the same barrier.
    BarrierDivergence,
    /// Threads wait for each other forever.
    Deadlock,
    /// A lane named by an exchange never takes part in it.
    AbsentLane,
    /// The kernel executed `trap`.
    Trap,
    /// The kernel ran longer than the step limit.
    StepLimit,
    /// Calls are nested too deeply.
    StackOverflow,
    /// The kernel asked for something that this machine does not have.
    Invalid,
}

/// One error found, with where it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What kind.
    pub kind: Kind,
    /// What happened, in words.
    pub message: String,
    /// Kernel.
    pub kernel: String,
    /// Line in the PTX text.
    pub ptx_line: u32,
    /// Source file and line, if the PTX has line information.
    pub source: Option<(String, u32)>,
    /// Block index.
    pub block: [u32; 3],
    /// Thread index.
    pub thread: [u32; 3],
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((file, line)) = &self.source {
            write!(f, "{file}:{line}: ")?;
        }
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "{} (kernel {}, ptx line {}, block {bx},{by},{bz}, thread {tx},{ty},{tz})",
            self.message, self.kernel, self.ptx_line
        )
    }
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Warp instructions by class, in the order of [`CLASSES`].
    pub warp_instructions: [u64; CLASSES.len()],
    /// Thread instructions by class, likewise.
    pub thread_instructions: [u64; CLASSES.len()],
    /// Floating-point operations outside of matrix instructions; a fused multiply-add is two.
    pub flops: u64,
    /// Multiply-adds of matrix instructions, by warp instruction.
    pub mma: u64,
    /// Operations of matrix instructions; a multiply-add is two.
    pub mma_flops: u64,
    /// Bytes that threads loaded from global memory.
    pub global_load_bytes: u64,
    /// Bytes that threads stored to global memory.
    pub global_store_bytes: u64,
    /// 32-byte sectors that loads touched, per warp instruction.
    pub global_load_sectors: u64,
    /// 32-byte sectors that stores touched, per warp instruction.
    pub global_store_sectors: u64,
    /// Bytes of different addresses that loads asked for, per warp instruction.
    pub global_load_unique_bytes: u64,
    /// Bytes of different addresses that stores wrote, per warp instruction.
    pub global_store_unique_bytes: u64,
    /// Wavefronts of shared-memory accesses if there were no conflicts.
    pub shared_wavefronts: u64,
    /// Wavefronts on top of those, because of bank conflicts.
    pub bank_conflicts: u64,
    /// Bytes loaded from or stored to local memory.
    pub local_bytes: u64,
    /// Atomic operations by thread.
    pub atomics: u64,
    /// Block barriers by warp.
    pub barriers: u64,
    /// Branches that split a warp.
    pub divergent_branches: u64,
}

impl Counters {
    /// Adds another launch's, or block's.
    pub fn add(&mut self, other: &Counters) {
        for i in 0..CLASSES.len() {
            self.warp_instructions[i] += other.warp_instructions[i];
            self.thread_instructions[i] += other.thread_instructions[i];
        }
        self.flops += other.flops;
        self.mma += other.mma;
        self.mma_flops += other.mma_flops;
        self.global_load_bytes += other.global_load_bytes;
        self.global_store_bytes += other.global_store_bytes;
        self.global_load_sectors += other.global_load_sectors;
        self.global_store_sectors += other.global_store_sectors;
        self.global_load_unique_bytes += other.global_load_unique_bytes;
        self.global_store_unique_bytes += other.global_store_unique_bytes;
        self.shared_wavefronts += other.shared_wavefronts;
        self.bank_conflicts += other.bank_conflicts;
        self.local_bytes += other.local_bytes;
        self.atomics += other.atomics;
        self.barriers += other.barriers;
        self.divergent_branches += other.divergent_branches;
    }

    /// Warp instructions of a class.
    pub fn warps(&self, class: Class) -> u64 {
        self.warp_instructions[class as usize]
    }

    /// Warp instructions of all classes.
    pub fn total_warps(&self) -> u64 {
        self.warp_instructions.iter().sum()
    }

    /// Thread instructions of all classes.
    pub fn total_threads(&self) -> u64 {
        self.thread_instructions.iter().sum()
    }

    /// Share of the bytes in touched sectors that threads asked for; 1 if none were touched.
    pub fn sector_use(&self) -> f64 {
        let sectors = self.global_load_sectors + self.global_store_sectors;
        let bytes = self.global_load_unique_bytes + self.global_store_unique_bytes;
        if sectors == 0 {
            1.0
        } else {
            bytes as f64 / (32 * sectors) as f64
        }
    }

    /// Name and value of everything counted, in the order of tables.
    pub fn rows(&self) -> Vec<(String, u64)> {
        let mut rows: Vec<(String, u64)> = CLASSES
            .iter()
            .map(|c| {
                (
                    format!("warp_instructions_{}", class_name(*c)),
                    self.warps(*c),
                )
            })
            .collect();
        let named = [
            ("warp_instructions", self.total_warps()),
            ("thread_instructions", self.total_threads()),
            ("flops", self.flops),
            ("mma", self.mma),
            ("mma_flops", self.mma_flops),
            ("global_load_bytes", self.global_load_bytes),
            ("global_store_bytes", self.global_store_bytes),
            ("global_load_sectors", self.global_load_sectors),
            ("global_store_sectors", self.global_store_sectors),
            ("global_load_unique_bytes", self.global_load_unique_bytes),
            ("global_store_unique_bytes", self.global_store_unique_bytes),
            ("shared_wavefronts", self.shared_wavefronts),
            ("bank_conflicts", self.bank_conflicts),
            ("local_bytes", self.local_bytes),
            ("atomics", self.atomics),
            ("barriers", self.barriers),
            ("divergent_branches", self.divergent_branches),
        ];
        rows.extend(named.map(|(n, v)| (n.to_string(), v)));
        rows
    }
}

/// Lower-case name of a class.
pub fn class_name(class: Class) -> String {
    format!("{class:?}").to_lowercase()
}

/// One launch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchReport {
    /// Kernel.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Shared memory of a block in bytes, static and dynamic.
    pub shared: u32,
    /// Whether the launch of a graph ran it.
    pub graph: bool,
    /// What the checks found; a launch stops at the first that is not a race.
    pub findings: Vec<Finding>,
    /// What was counted.
    pub counters: Counters,
    /// Host seconds that the emulation took.
    pub seconds: f64,
}

impl LaunchReport {
    /// The counters that are not zero, as an aligned table.
    pub fn table(&self) -> String {
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        let mut out = format!(
            "{} grid {gx},{gy},{gz} block {bx},{by},{bz} shared {}\n",
            self.kernel, self.shared
        );
        for (name, value) in self.counters.rows().into_iter().filter(|(_, v)| *v != 0) {
            out.push_str(&format!("  {name:<34} {value:>16}\n"));
        }
        out.push_str(&format!(
            "  {:<34} {:>16.3}\n",
            "sector_use",
            self.counters.sector_use()
        ));
        out
    }

    /// The line that heads [`LaunchReport::csv_row`].
    pub fn csv_header() -> String {
        let names: Vec<_> = Counters::default()
            .rows()
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        format!(
            "kernel,grid,block,shared,graph,{},sector_use,findings",
            names.join(",")
        )
    }

    /// One line of comma-separated values.
    pub fn csv_row(&self) -> String {
        let join = |d: [u32; 3]| format!("{}x{}x{}", d[0], d[1], d[2]);
        let values: Vec<_> = self
            .counters
            .rows()
            .iter()
            .map(|(_, v)| v.to_string())
            .collect();
        format!(
            "{},{},{},{},{},{},{:.4},{}",
            self.kernel,
            join(self.grid),
            join(self.block),
            self.shared,
            self.graph,
            values.join(","),
            self.counters.sector_use(),
            self.findings.len()
        )
    }
}
