//! One block: its warps, barriers, schedule, and what its instructions share.

use super::code::*;
use super::execute::mix;
use super::launch::Launch;
use super::memory::Allocation;
use super::race::{SharedRaces, Touch};
use super::shared::Shared;
use super::warp::{Stop, Wait, Warp, lane_list};
use crate::config::Schedule;
use crate::report::{Counters, Finding, Kind};
use std::collections::HashSet;

/// Races reported for a launch before further ones are dropped.
const MAX_FINDINGS: usize = 32;

#[derive(Default)]
struct Barrier {
    threads: u32,
    units: u32,
    expected: Option<u32>,
    popc: u32,
    votes: u32,
    clocks: Vec<u32>,
}

/// What the instructions of a block share.
pub struct Context<'l> {
    pub(super) launch: &'l Launch<'l>,
    pub(super) block: [u32; 3],
    pub(super) linear: u64,
    pub(super) shared: Shared,
    pub(super) races: Option<SharedRaces>,
    barriers: [Barrier; 16],
    /// A bit a barrier: threads have arrived.
    arrived: u16,
    /// What this block did.
    pub counters: Counters,
    /// Races found, which do not stop it.
    pub findings: Vec<Finding>,
    /// A thread has exited since the block last looked at its barriers.
    pub(super) exited: bool,
    rng: u64,
    /// Blocks whose accesses are ordered before this block's.
    known: HashSet<u32>,
    fenced: bool,
}

impl<'l> Context<'l> {
    /// A context for the blocks that one worker runs, one after the other.
    pub fn new(launch: &'l Launch<'l>) -> Context<'l> {
        let warps = launch.threads().div_ceil(32) as usize;
        let races = launch.config.checks.shared_races && launch.shared > 0;
        Context {
            launch,
            block: [0; 3],
            linear: 0,
            shared: Shared::default(),
            races: races.then(|| SharedRaces::new(warps, launch.shared as usize)),
            barriers: Default::default(),
            arrived: 0,
            counters: Counters::default(),
            findings: Vec::new(),
            exited: false,
            rng: 0,
            known: HashSet::new(),
            fenced: false,
        }
    }

    fn start(&mut self, linear: u64) {
        let [gx, gy, _] = self.launch.grid.map(u64::from);
        self.block = [
            (linear % gx) as u32,
            (linear / gx % gy) as u32,
            (linear / gx / gy) as u32,
        ];
        self.linear = linear;
        self.shared.start(self.launch.shared as usize);
        if let Some(races) = &mut self.races {
            races.start_block();
        }
        if std::mem::take(&mut self.arrived) != 0 {
            self.barriers = Default::default();
        }
        self.exited = false;
        self.known.clear();
        self.fenced = false;
        if let Schedule::Random(seed) = self.launch.config.schedule {
            self.rng = mix(seed ^ linear << 20);
        }
    }

    pub(super) fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(1);
        mix(self.rng)
    }

    /// Value of a special register.
    pub(super) fn special(&self, special: Special, warp: u32, lane: u32) -> u64 {
        let launch = self.launch;
        let thread = warp * 32 + lane;
        let [bx, by, _] = launch.block;
        let v = match special {
            Special::Tid(0) => thread % bx,
            Special::Tid(1) => thread / bx % by,
            Special::Tid(_) => thread / bx / by,
            Special::Ntid(a) => launch.block[a as usize],
            Special::Ctaid(a) => self.block[a as usize],
            Special::Nctaid(a) => launch.grid[a as usize],
            Special::Laneid => lane,
            Special::Warpid => warp,
            Special::Nwarpid => launch.threads().div_ceil(32),
            Special::Smid => (self.linear % launch.sms as u64) as u32,
            Special::Nsmid => launch.sms,
            Special::Gridid => return launch.id,
            Special::LanemaskEq => 1 << lane,
            Special::LanemaskLe => (2u32 << lane).wrapping_sub(1),
            Special::LanemaskLt => (1 << lane) - 1,
            Special::LanemaskGe => !((1u32 << lane) - 1),
            Special::LanemaskGt => !(2u32 << lane).wrapping_sub(1),
            Special::DynamicShared => launch.shared - launch.kernel.shared,
            Special::TotalShared => launch.shared,
        };
        v as u64
    }

    /// An error at an instruction.
    pub(super) fn fault(
        &self,
        warp: &Warp,
        instr: &Instr,
        kind: Kind,
        lane: u32,
        message: String,
    ) -> Box<Finding> {
        let thread = warp.id * 32 + lane;
        let [bx, by, _] = self.launch.block;
        let kernel = self.launch.kernel;
        let file = kernel.files.iter().find(|(n, _)| *n == instr.source.0);
        Box::new(Finding {
            kind,
            message,
            kernel: kernel.name.clone(),
            ptx_line: instr.line,
            source: file.map(|(_, path)| (path.clone(), instr.source.1)),
            block: self.block,
            thread: [thread % bx, thread / bx % by, thread / bx / by],
        })
    }

    /// Faults if any of the lanes is poisoned and that is checked.
    #[inline(always)]
    pub(super) fn check_poison(
        &self,
        warp: &Warp,
        instr: &Instr,
        lanes: u32,
        what: &str,
    ) -> Result<(), Box<Finding>> {
        if lanes == 0 || !self.launch.config.checks.uninitialised {
            return Ok(());
        }
        let message = format!("uninitialised value: {what} depends on something never written");
        Err(self.fault(
            warp,
            instr,
            Kind::Uninitialised,
            lanes.trailing_zeros(),
            message,
        ))
    }

    fn describe(&self, pc: u32) -> String {
        let instr = &self.launch.kernel.code[pc as usize];
        let file = self
            .launch
            .kernel
            .files
            .iter()
            .find(|(n, _)| *n == instr.source.0);
        match file {
            Some((_, path)) => format!("{path}:{} (ptx line {})", instr.source.1, instr.line),
            None => format!("ptx line {}", instr.line),
        }
    }

    fn found(&mut self, finding: Finding) {
        let same = |f: &Finding| f.kind == finding.kind && f.ptx_line == finding.ptx_line;
        if self.findings.len() < MAX_FINDINGS && !self.findings.iter().any(same) {
            self.findings.push(finding);
        }
    }

    /// Records an access to shared memory and reports what it races with.
    #[inline(always)]
    pub(super) fn shared_access(
        &mut self,
        warp: &Warp,
        instr: &Instr,
        offset: usize,
        size: usize,
        lane: usize,
        pc: u32,
        touch: Touch,
    ) {
        let Some(races) = &mut self.races else { return };
        let conflict = races.access(offset, size, warp.id as usize, lane as u32, pc, touch);
        let Some(c) = conflict else { return };
        let other = match c.lane {
            Some(lane) => format!("lane {lane} of warp {}", c.warp),
            None => format!("warp {}", c.warp),
        };
        let mine = match touch {
            Touch::Read | Touch::StrongRead => "read",
            Touch::Write | Touch::StrongWrite => "write",
            Touch::Atomic => "atomic",
        };
        let theirs = match (c.in_flight, c.wrote) {
            (true, _) => "the asynchronous copy, not yet waited for,",
            (_, true) => "the write",
            _ => "the read",
        };
        let message = format!(
            "shared-memory race: {mine} of {size} bytes at offset {offset} is not ordered with {theirs} by {other} at {}",
            self.describe(c.pc)
        );
        let finding = self.fault(warp, instr, Kind::SharedRace, lane as u32, message);
        self.found(*finding);
    }

    /// Records a plain access to device memory and reports what it races with.
    #[inline(always)]
    pub(super) fn global_access(
        &mut self,
        warp: &Warp,
        instr: &Instr,
        allocation: &Allocation,
        offset: usize,
        size: usize,
        lane: usize,
        writes: bool,
    ) {
        let block = self.linear as u32;
        if !allocation.shadow().alone(offset, size, block, writes) {
            self.contested(warp, instr, allocation, offset, size, lane, writes);
        }
    }

    /// As [`Context::global_access`], where other blocks may have been.
    fn contested(
        &mut self,
        warp: &Warp,
        instr: &Instr,
        allocation: &Allocation,
        offset: usize,
        size: usize,
        lane: usize,
        writes: bool,
    ) {
        let known = &self.known;
        let several = u32::MAX - 1;
        let knows = |b: u32| {
            if b == several {
                !known.is_empty()
            } else {
                known.contains(&b)
            }
        };
        let block = self.linear as u32;
        let Some((other, wrote)) = allocation
            .shadow()
            .access(offset, size, block, writes, knows)
        else {
            return;
        };
        let other = if other == several {
            "other blocks".to_string()
        } else {
            format!("block {other}")
        };
        let message = format!(
            "global-memory race: {} of {size} bytes at offset {offset} is not ordered with the {} by {other}",
            if writes { "write" } else { "read" },
            if wrote { "write" } else { "read" },
        );
        let finding = self.fault(warp, instr, Kind::GlobalRace, lane as u32, message);
        self.found(*finding);
    }

    /// A fence: later atomics and volatile stores publish what this block knows.
    pub(super) fn fence(&mut self) {
        self.fenced = true;
    }

    /// A volatile store to a location that others may wait on.
    pub(super) fn release(&mut self, address: u64) {
        if self.fenced {
            self.launch
                .publish(address, self.linear as u32, &self.known);
        }
    }

    /// A volatile load may see what others published there.
    pub(super) fn acquire(&mut self, address: u64) {
        self.launch.learn(address, &mut self.known);
    }

    /// An atomic does both.
    pub(super) fn atomic_order(&mut self, address: u64, release: bool) {
        self.acquire(address);
        self.fenced |= release;
        self.release(address);
    }

    /// Arrival of threads of a warp at a barrier.
    pub(super) fn arrive(
        &mut self,
        warp: u32,
        id: usize,
        threads: u32,
        units: u32,
        expected: Option<u32>,
    ) -> Result<(), String> {
        let barrier = &mut self.barriers[id];
        let fresh = barrier.threads == 0;
        if !fresh && barrier.expected != expected {
            let say = |n: Option<u32>| n.map_or("all".to_string(), |n| n.to_string());
            return Err(format!(
                "barrier {id} is waited at for {} threads and for {} at once",
                say(barrier.expected),
                say(expected)
            ));
        }
        self.arrived |= 1 << id;
        barrier.expected = expected;
        barrier.threads += threads;
        barrier.units += units;
        if expected.is_some_and(|n| barrier.units > n) {
            return Err(format!(
                "more threads arrive at barrier {id} than the {} it was told",
                barrier.expected.unwrap_or(0)
            ));
        }
        if let Some(races) = &mut self.races {
            races.arrive(warp as usize, &mut barrier.clocks);
        }
        Ok(())
    }

    /// Adds predicates to a barrier's reduction.
    pub(super) fn reduce(&mut self, id: usize, popc: u32, votes: u32) {
        self.barriers[id].popc += popc;
        self.barriers[id].votes += votes;
    }
}

/// How a block's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// All its threads have exited.
    Done,
    /// It used up its steps.
    Unfinished,
}

/// A block and its warps.
pub struct Block<'l> {
    /// What its instructions share.
    pub ctx: Context<'l>,
    warps: Vec<Warp>,
    blocked: Vec<bool>,
    next: usize,
}

impl<'l> Block<'l> {
    /// Storage for blocks of a launch.
    pub fn new(launch: &'l Launch<'l>) -> Block<'l> {
        let warps = launch.threads().div_ceil(32);
        Block {
            ctx: Context::new(launch),
            warps: (0..warps).map(Warp::new).collect(),
            blocked: vec![false; warps as usize],
            next: 0,
        }
    }

    /// Starts block number `linear`.
    pub fn start(&mut self, linear: u64) {
        self.ctx.start(linear);
        let threads = self.ctx.launch.threads();
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - 32 * i as u32).min(32);
            warp.start(&self.ctx, if lanes == 32 { !0 } else { (1 << lanes) - 1 });
        }
        self.blocked.fill(false);
        self.next = 0;
    }

    /// Runs for about `steps` warp instructions; subtracts what was used.
    pub fn run(&mut self, steps: &mut u64) -> Result<Turn, Box<Finding>> {
        loop {
            let Some(w) = self.choose() else {
                if self.warps.iter().all(|w| w.groups.is_empty()) {
                    return Ok(Turn::Done);
                }
                return Err(self.stuck());
            };
            let slice = match self.ctx.launch.config.schedule {
                Schedule::Serial | Schedule::Reverse => 100_000,
                Schedule::LowestPc => 1,
                // Short turns show missing barriers, long ones stale data.
                Schedule::Random(_) => 1 << (self.ctx.random() % 8),
            };
            let before = self.warps[w].steps;
            let stop = self.warps[w].run(&mut self.ctx, slice)?;
            *steps = steps.saturating_sub(self.warps[w].steps - before);
            match stop {
                Stop::Steps => {
                    // Warps may wait for each other without barriers.
                    self.next = w + 1;
                }
                Stop::Blocked | Stop::Finished => self.blocked[w] = true,
                Stop::Arrived(id) => self.complete(id),
            }
            if std::mem::take(&mut self.ctx.exited) && self.ctx.arrived != 0 {
                (0..16).for_each(|id| self.complete(id));
            }
            if *steps == 0 {
                return Ok(Turn::Unfinished);
            }
        }
    }

    fn choose(&mut self) -> Option<usize> {
        let n = self.warps.len();
        let ready = |w: &usize| !self.blocked[*w];
        match self.ctx.launch.config.schedule {
            Schedule::Serial => {
                let from = self.next % n;
                (from..n).chain(0..from).find(ready)
            }
            Schedule::Reverse => {
                // `next` is the warp after the one that ran last.
                let from = if self.next == 0 {
                    n
                } else {
                    (self.next - 1).max(1)
                };
                (0..from).rev().chain((from..n).rev()).find(ready)
            }
            Schedule::LowestPc => (0..n)
                .filter(ready)
                .min_by_key(|w| self.warps[*w].next_pc().unwrap_or(0)),
            Schedule::Random(_) => {
                let count = (0..n).filter(ready).count();
                if count == 0 {
                    return None;
                }
                let nth = self.ctx.random() as usize % count;
                (0..n).filter(|w| !self.blocked[*w]).nth(nth)
            }
        }
    }

    /// Opens a barrier if all have arrived.
    fn complete(&mut self, id: usize) {
        let barrier = &self.ctx.barriers[id];
        if barrier.threads == 0 {
            return;
        }
        let done = match barrier.expected {
            Some(n) => barrier.units >= n,
            None => barrier.threads >= self.warps.iter().map(|w| w.live().count_ones()).sum(),
        };
        if !done {
            return;
        }
        let barrier = std::mem::take(&mut self.ctx.barriers[id]);
        self.ctx.arrived &= !(1 << id);
        let mut released = Vec::new();
        for (w, warp) in self.warps.iter_mut().enumerate() {
            if warp.release(id, barrier.popc, barrier.popc == barrier.votes) {
                self.blocked[w] = false;
                released.push(w);
            }
        }
        if let Some(races) = &mut self.ctx.races {
            races.leave(&released, &barrier.clocks);
        }
        self.next = 0;
    }

    /// Explains why no warp can go on.
    fn stuck(&self) -> Box<Finding> {
        let code = &self.ctx.launch.kernel.code;
        let groups = || {
            self.warps
                .iter()
                .flat_map(|w| w.groups.iter().map(move |g| (w, g)))
        };
        let place = |w: &Warp, besides: u32| {
            let mut parts: Vec<String> = w
                .groups
                .iter()
                .filter(|g| g.mask & besides == 0)
                .map(|g| {
                    format!(
                        "lanes {} wait at {}",
                        lane_list(g.mask),
                        self.ctx.describe(g.pc)
                    )
                })
                .collect();
            let gone = w.exited & w.exists;
            if gone != 0 {
                parts.push(format!("lanes {} have exited", lane_list(gone)));
            }
            parts.join(", ")
        };
        if let Some((w, g)) = groups().find(|(_, g)| g.wait == Wait::Exchange) {
            let instr = &code[g.pc as usize];
            let message = format!(
                "lanes {} of warp {} wait here for lanes that never come: {}",
                lane_list(g.mask),
                w.id,
                place(w, g.mask)
            );
            return self
                .ctx
                .fault(w, instr, Kind::AbsentLane, g.mask.trailing_zeros(), message);
        }
        if let Some((w, g)) = groups().find(|(_, g)| g.wait == Wait::Aligned) {
            let instr = &code[g.pc as usize];
            let message = format!(
                "divergent barrier: lanes {} of warp {} wait here without the rest: {}",
                lane_list(g.mask),
                w.id,
                place(w, g.mask)
            );
            let lane = g.mask.trailing_zeros();
            return self
                .ctx
                .fault(w, instr, Kind::BarrierDivergence, lane, message);
        }
        let mut waiting = groups().map(|(w, g)| {
            format!(
                "lanes {} of warp {} at {}",
                lane_list(g.mask),
                w.id,
                self.ctx.describe(g.pc)
            )
        });
        let listed: Vec<String> = waiting.by_ref().take(4).collect();
        let more = waiting.count();
        let more = if more == 0 {
            String::new()
        } else {
            format!(", and {more} more")
        };
        let message = format!(
            "deadlock: nothing can run; waiting are {}{more}",
            listed.join("; ")
        );
        match groups().next() {
            Some((w, g)) => {
                let lane = g.mask.trailing_zeros();
                self.ctx
                    .fault(w, &code[g.pc as usize], Kind::Deadlock, lane, message)
            }
            None => self
                .ctx
                .fault(&self.warps[0], &code[0], Kind::Deadlock, 0, message),
        }
    }

    /// The error of a launch that ran for too long.
    pub fn too_long(&self) -> Box<Finding> {
        let code = &self.ctx.launch.kernel.code;
        let warp = self
            .warps
            .iter()
            .find(|w| !w.groups.is_empty())
            .unwrap_or(&self.warps[0]);
        let (pc, mask) = warp.groups.first().map_or((0, 1), |g| (g.pc, g.mask));
        let message = format!(
            "the kernel has run {} warp instructions: it seems to hang",
            self.ctx.launch.config.step_limit
        );
        self.ctx.fault(
            warp,
            &code[pc as usize],
            Kind::StepLimit,
            mask.trailing_zeros(),
            message,
        )
    }
}
