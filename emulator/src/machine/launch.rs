//! One launch: its blocks over the host's cores.

use super::block::{Block, Turn};
use super::code::Kernel;
use super::execute::mix;
use super::memory::Memory;
use crate::config::{BlockOrder, Config};
use crate::report::{Counters, Finding, LaunchReport};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Warp instructions of a block's turn before another may start: blocks that wait for each
/// other must all get to run.
const TURN: u64 = 2_000_000;
/// Blocks that may be under way at once on one host thread.
const RESIDENT: usize = 256;

/// What a launch needs to know.
pub struct Launch<'l> {
    pub(super) kernel: &'l Kernel,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    /// Static and dynamic shared memory of a block.
    pub(super) shared: u32,
    pub(super) params: &'l [u8],
    pub(super) memory: &'l Memory,
    pub(super) config: &'l Config,
    pub(super) id: u64,
    pub(super) sms: u32,
    started: Instant,
    published: Mutex<HashMap<u64, HashSet<u32>>>,
}

impl<'l> Launch<'l> {
    /// Describes a launch. `params` is the kernel's parameter buffer; `id` must differ between
    /// the launches of a device.
    pub fn new(
        kernel: &'l Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: u32,
        params: &'l [u8],
        memory: &'l Memory,
        config: &'l Config,
        id: u64,
    ) -> Result<Launch<'l>, String> {
        let threads = block
            .iter()
            .try_fold(1u32, |p, d| p.checked_mul(*d))
            .unwrap_or(u32::MAX);
        if grid.contains(&0) || block.contains(&0) {
            return Err(format!(
                "{}: grid {grid:?} or block {block:?} is empty",
                kernel.name
            ));
        }
        if threads > kernel.max_threads.min(1024) || block[2] > 64 {
            return Err(format!(
                "{}: {threads} threads a block, at most {} are possible",
                kernel.name,
                kernel.max_threads.min(1024)
            ));
        }
        if grid[1] > 65535 || grid[2] > 65535 || grid[0] > i32::MAX as u32 {
            return Err(format!("{}: grid {grid:?} is too large", kernel.name));
        }
        let most = shared_limit(config.capability);
        let shared = kernel.shared.saturating_add(dynamic_shared);
        if shared > most {
            return Err(format!(
                "{}: {shared} bytes of shared memory a block, at most {most} are possible",
                kernel.name
            ));
        }
        if params.len() != kernel.param_size as usize {
            return Err(format!(
                "{}: {} bytes of parameters, expected {}",
                kernel.name,
                params.len(),
                kernel.param_size
            ));
        }
        let sms = if config.capability.0 >= 9 { 132 } else { 108 };
        Ok(Launch {
            kernel,
            grid,
            block,
            shared,
            params,
            memory,
            config,
            id,
            sms,
            started: Instant::now(),
            published: Mutex::new(HashMap::new()),
        })
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    pub(super) fn nanoseconds(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    pub(super) fn publish(&self, address: u64, block: u32, known: &HashSet<u32>) {
        if let Ok(mut published) = self.published.lock() {
            let at = published.entry(address).or_default();
            at.extend(known);
            at.insert(block);
        }
    }

    pub(super) fn learn(&self, address: u64, known: &mut HashSet<u32>) {
        if let Ok(published) = self.published.lock()
            && let Some(at) = published.get(&address)
        {
            known.extend(at);
        }
    }

    fn order(&self, count: u64) -> Box<dyn Fn(u64) -> u64 + Sync> {
        match self.config.block_order {
            BlockOrder::Forward => Box::new(|i| i),
            BlockOrder::Reverse => Box::new(move |i| count - 1 - i),
            BlockOrder::Random(seed) => {
                let mut all: Vec<u64> = (0..count).collect();
                for i in (1..all.len()).rev() {
                    all.swap(i, (mix(seed ^ i as u64) % (i as u64 + 1)) as usize);
                }
                Box::new(move |i| all[i as usize])
            }
        }
    }

    /// Runs all blocks. The report's findings are the races and the error that stopped it.
    pub fn run(&self) -> LaunchReport {
        let count: u64 = self.grid.iter().map(|d| *d as u64).product();
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if self.config.threads == 0 {
            cores
        } else {
            self.config.threads
        };
        let threads = threads.min(count as usize).max(1);
        let order = self.order(count);
        let next = AtomicU64::new(0);
        let steps = AtomicU64::new(0);
        // Blocks after the first that failed are not started, so that the error reported does
        // not depend on which host thread was faster.
        let failed = AtomicU64::new(u64::MAX);
        let error: Mutex<Option<(u64, Finding)>> = Mutex::new(None);
        let fail = |at: u64, finding: Finding| {
            failed.fetch_min(at, Ordering::Relaxed);
            if let Ok(mut error) = error.lock()
                && error.as_ref().is_none_or(|(old, _)| at < *old)
            {
                *error = Some((at, finding));
            }
        };
        let worker = || {
            let mut spare: Vec<Box<Block>> = Vec::new();
            let mut running: VecDeque<(u64, Box<Block>)> = VecDeque::new();
            let mut counters = Counters::default();
            let mut findings = Vec::new();
            loop {
                let resident = running.len();
                let fresh = if resident < RESIDENT {
                    next.fetch_add(1, Ordering::Relaxed)
                } else {
                    u64::MAX
                };
                let (at, mut block) = if fresh < count && fresh <= failed.load(Ordering::Relaxed) {
                    let mut block = spare.pop().unwrap_or_else(|| Box::new(Block::new(self)));
                    block.start(order(fresh));
                    (fresh, block)
                } else if let Some(oldest) = running.pop_front() {
                    oldest
                } else {
                    break;
                };
                if at > failed.load(Ordering::Relaxed) {
                    continue;
                }
                let mut left = TURN;
                let turn = block.run(&mut left);
                let total = steps.fetch_add(TURN - left, Ordering::Relaxed) + TURN - left;
                counters.add(&std::mem::take(&mut block.ctx.counters));
                match turn {
                    Ok(Turn::Done) => {
                        findings.extend(block.ctx.findings.drain(..).map(|f| (at, f)));
                        spare.push(block);
                    }
                    Ok(Turn::Unfinished) if total > self.config.step_limit => {
                        fail(at, *block.too_long());
                    }
                    Ok(Turn::Unfinished) => running.push_back((at, block)),
                    Err(finding) => {
                        findings.extend(block.ctx.findings.drain(..).map(|f| (at, f)));
                        fail(at, *finding);
                    }
                }
            }
            (counters, findings)
        };
        let parts: Vec<(Counters, Vec<(u64, Finding)>)> = if threads == 1 {
            vec![worker()]
        } else {
            std::thread::scope(|scope| {
                let handles: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
                handles.into_iter().filter_map(|h| h.join().ok()).collect()
            })
        };
        let mut counters = Counters::default();
        let mut races = Vec::new();
        for (c, f) in parts {
            counters.add(&c);
            races.extend(f);
        }
        races.sort_by_key(|(at, f)| (*at, f.ptx_line));
        let mut findings: Vec<Finding> = Vec::new();
        for (_, f) in races {
            if !findings
                .iter()
                .any(|g| g.kind == f.kind && g.ptx_line == f.ptx_line)
            {
                findings.push(f);
            }
        }
        if let Ok(error) = error.into_inner() {
            findings.extend(error.map(|(_, f)| f));
        }
        LaunchReport {
            kernel: self.kernel.name.clone(),
            grid: self.grid,
            block: self.block,
            shared: self.shared,
            graph: false,
            findings,
            counters,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

/// Most shared memory that a block may have.
pub fn shared_limit(capability: (u32, u32)) -> u32 {
    if capability.0 >= 9 {
        227 << 10
    } else {
        163 << 10
    }
}
