//! One warp: groups of lanes with a common program counter, frames, registers.

use super::block::Context;
use super::code::*;
use super::lanes::{Lanes, WARP};
use crate::config::Schedule;
use crate::report::{Finding, Kind};
use std::mem::swap;

/// Frames that calls may nest before it is a stack overflow.
const MAX_FRAMES: u32 = 1000;
/// Steps of a diverged warp after which another group gets a turn: a lane that spins for
/// another lane of its warp must not keep it from running.
const PATIENCE: u32 = 4096;

/// What a group of lanes waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wait {
    /// Nothing: it can run.
    None,
    /// The other lanes of an exchange.
    Exchange,
    /// The other lanes of its warp, at a barrier that wants them together.
    Aligned,
    /// A block barrier; with where its reduction goes.
    Barrier {
        /// The barrier.
        id: usize,
        /// Kind of reduction and where its result goes.
        reduce: Option<(BarReduce, usize)>,
    },
}

/// Lanes that go together.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Next instruction.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// Their frame.
    pub frame: u32,
    /// What they wait for.
    pub wait: Wait,
}

/// Registers and local memory of a call.
#[derive(Clone, Debug)]
struct Frame {
    function: u32,
    base: usize,
    pred_base: usize,
    local_base: u32,
    depth: u32,
    parent: u32,
    return_pc: u32,
}

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stop {
    /// It used up its steps.
    Steps,
    /// Every group waits.
    Blocked,
    /// It arrived at a block barrier.
    Arrived(usize),
    /// All lanes have exited.
    Finished,
}

/// An asynchronous copy that has not been waited for.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// Where it goes in shared memory.
    pub to: u32,
    /// Bytes written: the copied ones, then zeros.
    pub size: u8,
    /// Bytes copied.
    pub bytes: u8,
    /// Global address.
    pub from: u64,
    /// Lane that issued it.
    pub lane: u8,
    /// Its group: how many commits its lane had made before.
    pub group: u32,
    /// Instruction.
    pub pc: u32,
}

/// A warp.
pub struct Warp {
    /// Index in the block.
    pub id: u32,
    /// Lanes that the block has.
    pub exists: u32,
    /// Lanes that have exited.
    pub exited: u32,
    /// Groups of the remaining lanes.
    pub groups: Vec<Group>,
    frames: Vec<Option<Frame>>,
    pub(super) regs: Vec<Lanes>,
    /// Per register, the lanes whose value was never written.
    pub(super) poison: Vec<u32>,
    pub(super) preds: Vec<u32>,
    pub(super) pred_poison: Vec<u32>,
    /// Local memory of each lane, and a bit a byte for what was written.
    pub(super) local: Vec<Vec<u8>>,
    pub(super) local_valid: Vec<Vec<u8>>,
    pub(super) copies: Vec<Copy>,
    pub(super) commits: [u32; WARP],
    impatience: u32,
    pub(super) steps: u64,
}

/// Positions that an instruction's operands are relative to.
#[derive(Clone, Copy)]
pub(super) struct Bases {
    pub regs: usize,
    pub preds: usize,
    pub local: u32,
}

impl Warp {
    /// A warp with storage but no work.
    pub fn new(id: u32) -> Warp {
        Warp {
            id,
            exists: 0,
            exited: 0,
            groups: Vec::new(),
            frames: Vec::new(),
            regs: Vec::new(),
            poison: Vec::new(),
            preds: Vec::new(),
            pred_poison: Vec::new(),
            local: vec![Vec::new(); WARP],
            local_valid: vec![Vec::new(); WARP],
            copies: Vec::new(),
            commits: [0; WARP],
            impatience: 0,
            steps: 0,
        }
    }

    /// Makes it ready for a block with these lanes.
    pub fn start(&mut self, ctx: &Context, exists: u32) {
        self.exists = exists;
        self.exited = 0;
        self.groups.clear();
        self.copies.clear();
        self.commits = [0; WARP];
        self.impatience = 0;
        self.steps = 0;
        // Storage of the previous block keeps its constants.
        let keep = self.frames.len() == 1
            && self.regs.len() == ctx.launch.kernel.functions[0].slots as usize;
        self.frames.clear();
        if !keep {
            self.regs.clear();
            self.poison.clear();
            self.preds.clear();
            self.pred_poison.clear();
        }
        self.local.iter_mut().for_each(Vec::clear);
        self.local_valid.iter_mut().for_each(Vec::clear);
        let frame = self.push_frame(ctx, 0, None, 0, keep);
        self.groups.push(Group {
            pc: ctx.launch.kernel.functions[0].entry,
            mask: exists,
            frame,
            wait: Wait::None,
        });
    }

    /// Lanes that have not exited.
    pub fn live(&self) -> u32 {
        self.exists & !self.exited
    }

    fn frame(&self, index: u32) -> &Frame {
        match &self.frames[index as usize] {
            Some(frame) => frame,
            None => unreachable!("a group's frame is alive"),
        }
    }

    fn push_frame(
        &mut self,
        ctx: &Context,
        function: u32,
        parent: Option<u32>,
        return_pc: u32,
        keep: bool,
    ) -> u32 {
        let f = &ctx.launch.kernel.functions[function as usize];
        let (mut base, mut pred_base, mut local_base) = (0, 0, 0);
        for frame in self.frames.iter().flatten() {
            let g = &ctx.launch.kernel.functions[frame.function as usize];
            base = base.max(frame.base + g.slots as usize);
            pred_base = pred_base.max(frame.pred_base + g.preds as usize);
            local_base = local_base.max(frame.local_base + g.local);
        }
        let depth = parent.map_or(0, |p| self.frame(p).depth + 1);
        let slots = f.slots as usize;
        self.regs
            .resize(self.regs.len().max(base + slots), Lanes::ZERO);
        self.poison.resize(self.regs.len(), 0);
        self.preds
            .resize(self.preds.len().max(pred_base + f.preds as usize), 0);
        self.pred_poison.resize(self.preds.len(), 0);
        self.poison[base..base + slots].fill(!0);
        self.pred_poison[pred_base..pred_base + f.preds as usize].fill(!0);
        self.preds[pred_base] = !0;
        self.pred_poison[pred_base] = 0;
        for (slot, wide, start) in &f.starts {
            let at = base + *slot as usize;
            self.poison[at] = 0;
            let changes = matches!(start, Start::Special(Special::Ctaid(_) | Special::Smid));
            if keep && !changes {
                continue;
            }
            for lane in 0..WARP {
                let bits = match start {
                    Start::Bits(bits) => *bits,
                    Start::Local(offset) => (local_base + offset) as u64,
                    Start::Special(special) => ctx.special(*special, self.id, lane as u32),
                };
                self.set(at, lane, *wide, bits);
            }
        }
        let top = (local_base + f.local) as usize;
        for lane in 0..WARP {
            if self.local[lane].len() < top {
                self.local[lane].resize(top, 0);
                self.local_valid[lane].resize(top.div_ceil(8), 0);
            }
            // Whatever an earlier call left there is not this call's.
            self.local_valid[lane][local_base as usize / 8..top.div_ceil(8)].fill(0);
        }
        let parent = parent.unwrap_or(u32::MAX);
        let frame = Frame {
            function,
            base,
            pred_base,
            local_base,
            depth,
            parent,
            return_pc,
        };
        match self.frames.iter().position(Option::is_none) {
            Some(free) => {
                self.frames[free] = Some(frame);
                free as u32
            }
            None => {
                self.frames.push(Some(frame));
                self.frames.len() as u32 - 1
            }
        }
    }

    /// Drops frames that no group is in, or in a callee of.
    fn drop_frames(&mut self) {
        while let Some(dead) = (1..self.frames.len() as u32).find(|&i| {
            self.frames[i as usize].is_some()
                && !self.groups.iter().any(|g| g.frame == i)
                && !self.frames.iter().flatten().any(|f| f.parent == i)
        }) {
            self.frames[dead as usize] = None;
        }
    }

    /// Writes a lane of a register.
    #[inline(always)]
    pub(super) fn set(&mut self, at: usize, lane: usize, wide: bool, bits: u64) {
        if wide {
            let pair = &mut self.regs[at..at + 2];
            // SAFETY: two `Lanes` are 64 words, that is 32 u64, aligned to 64 bytes.
            unsafe { *(pair.as_mut_ptr() as *mut u64).add(lane) = bits };
        } else {
            self.regs[at].0[lane] = bits as u32;
        }
    }

    /// Reads a lane of a register.
    #[inline(always)]
    pub(super) fn get(&self, at: usize, lane: usize, wide: bool) -> u64 {
        if wide {
            let pair = &self.regs[at..at + 2];
            // SAFETY: as in `set`.
            unsafe { *(pair.as_ptr() as *const u64).add(lane) }
        } else {
            self.regs[at].0[lane] as u64
        }
    }

    #[inline(always)]
    pub(super) fn set_poison(&mut self, at: usize, mask: u32, poison: u32) {
        self.poison[at] = self.poison[at] & !mask | poison & mask;
    }

    #[inline(always)]
    pub(super) fn set_pred(&mut self, at: usize, mask: u32, value: u32, poison: u32) {
        self.preds[at] = self.preds[at] & !mask | value & mask;
        self.pred_poison[at] = self.pred_poison[at] & !mask | poison & mask;
    }

    /// Chooses the group to run and joins those that stand at the same place.
    fn pick(&mut self, ctx: &mut Context) -> Option<usize> {
        let random = matches!(ctx.launch.config.schedule, Schedule::Random(_));
        let chosen = if self.groups.len() == 1 {
            self.impatience = 0;
            (self.groups[0].wait == Wait::None).then_some(0)?
        } else if random {
            let ready = self.groups.iter().filter(|g| g.wait == Wait::None).count();
            if ready == 0 {
                return None;
            }
            let nth = ctx.random() as usize % ready;
            (0..self.groups.len())
                .filter(|&i| self.groups[i].wait == Wait::None)
                .nth(nth)?
        } else {
            self.impatience += 1;
            let late = self.impatience / PATIENCE % 2 == 1;
            let key = |g: &Group| (u32::MAX - self.frame(g.frame).depth, g.pc);
            let ready = (0..self.groups.len()).filter(|&i| self.groups[i].wait == Wait::None);
            if late {
                ready.max_by_key(|&i| key(&self.groups[i]))?
            } else {
                ready.min_by_key(|&i| key(&self.groups[i]))?
            }
        };
        let Group { pc, frame, .. } = self.groups[chosen];
        let mut mask = 0;
        let mut at = 0;
        let mut kept = 0;
        while at < self.groups.len() {
            let g = self.groups[at];
            if at == chosen {
                kept = at;
            } else if g.pc == pc && g.frame == frame && !matches!(g.wait, Wait::Barrier { .. }) {
                mask |= g.mask;
                self.groups[at].mask = 0;
            }
            at += 1;
        }
        self.groups[kept].mask |= mask;
        if mask != 0 {
            let (pc, frame) = (self.groups[kept].pc, self.groups[kept].frame);
            self.groups.retain(|g| g.mask != 0);
            kept = self
                .groups
                .iter()
                .position(|g| g.pc == pc && g.frame == frame && g.wait == Wait::None)?;
        }
        Some(kept)
    }

    /// The program counter that would run next, for lockstep scheduling.
    pub fn next_pc(&self) -> Option<u32> {
        self.groups
            .iter()
            .filter(|g| g.wait == Wait::None)
            .map(|g| g.pc)
            .min()
    }

    /// Runs up to `steps` instructions.
    pub fn run(&mut self, ctx: &mut Context, steps: u32) -> Result<Stop, Box<Finding>> {
        let mut left = steps;
        let launch = ctx.launch;
        let code = &launch.kernel.code;
        let counting = launch.config.counters;
        loop {
            if self.groups.is_empty() {
                return Ok(Stop::Finished);
            }
            let Some(at) = self.pick(ctx) else {
                return Ok(Stop::Blocked);
            };
            let alone = self.groups.len() == 1;
            let Group {
                mut pc,
                mask,
                frame,
                ..
            } = self.groups[at];
            let f = self.frame(frame);
            let bases = Bases {
                regs: f.base,
                preds: f.pred_base,
                local: f.local_base,
            };
            loop {
                if left == 0 {
                    self.groups[at].pc = pc;
                    return Ok(Stop::Steps);
                }
                left -= 1;
                self.steps += 1;
                let instr = &code[pc as usize];
                let guard = bases.preds + instr.guard as usize;
                if instr.guard != 0 && self.pred_poison[guard] & mask != 0 {
                    ctx.check_poison(self, instr, self.pred_poison[guard] & mask, "a predicate")?;
                }
                let active = (self.preds[guard] ^ instr.negate) & mask;
                if counting {
                    let class = instr.class as usize;
                    let n = active.count_ones() as u64;
                    ctx.counters.warp_instructions[class] += (n != 0) as u64;
                    ctx.counters.thread_instructions[class] += n;
                    ctx.counters.flops += instr.flops as u64 * n;
                }
                if active == 0 {
                    pc += 1;
                    if alone {
                        continue;
                    }
                    self.groups[at].pc = pc;
                    break;
                }
                match &instr.op {
                    Op::Alu { f, d, a, b, c } => {
                        let (d, a, b, c) = (
                            bases.regs + *d as usize,
                            bases.regs + *a as usize,
                            bases.regs + *b as usize,
                            bases.regs + *c as usize,
                        );
                        let poison = self.poison[a] | self.poison[b] | self.poison[c];
                        self.poison[d] = self.poison[d] & !active | poison & active;
                        let regs = self.regs.as_mut_ptr();
                        // SAFETY: the decoder numbers registers within the frame, two for wide
                        // ones, and gives each function registers of the widths it works on.
                        unsafe { f(regs.add(d), regs.add(a), regs.add(b), regs.add(c), active) };
                        pc += 1;
                    }
                    Op::Cmp {
                        f,
                        d,
                        q,
                        a,
                        b,
                        with,
                    } => {
                        let (a, b) = (bases.regs + *a as usize, bases.regs + *b as usize);
                        let regs = self.regs.as_ptr();
                        // SAFETY: as for Alu.
                        let bits = unsafe { f(regs.add(a), regs.add(b)) };
                        let poison = self.poison[a] | self.poison[b];
                        self.compared(bases, active, *d, *q, bits, !bits, poison, *with);
                        pc += 1;
                    }
                    Op::Branch { target } => {
                        if active == mask {
                            pc = *target;
                        } else {
                            ctx.counters.divergent_branches += 1;
                            self.groups[at].pc = *target;
                            self.groups[at].mask = active;
                            let rest = Group {
                                pc: pc + 1,
                                mask: mask & !active,
                                frame,
                                wait: Wait::None,
                            };
                            self.groups.push(rest);
                            break;
                        }
                    }
                    Op::Exit => {
                        self.exited |= active;
                        self.abandon_copies(active);
                        if active == mask {
                            self.groups.remove(at);
                        } else {
                            self.groups[at].mask = mask & !active;
                            self.groups[at].pc = pc + 1;
                        }
                        self.drop_frames();
                        // Barriers may now be complete: let the block look.
                        ctx.exited = true;
                        if self.groups.is_empty() {
                            return Ok(Stop::Finished);
                        }
                        break;
                    }
                    Op::Call(call) => {
                        self.call(ctx, instr, call, at, pc, active, bases)?;
                        break;
                    }
                    Op::Return => {
                        self.ret(ctx, at, pc, active);
                        break;
                    }
                    Op::BranchTable { a, targets } => {
                        let a = bases.regs + *a as usize;
                        ctx.check_poison(self, instr, self.poison[a] & active, "a branch index")?;
                        self.branch_table(ctx, instr, at, pc, active, a, targets)?;
                        break;
                    }
                    Op::Barrier {
                        id,
                        count,
                        aligned,
                        arrive,
                        reduce,
                    } => {
                        self.groups[at].pc = pc;
                        let stop = self.barrier(
                            ctx, instr, at, active, bases, *id, *count, *aligned, *arrive, *reduce,
                        )?;
                        match stop {
                            Some(id) => return Ok(Stop::Arrived(id)),
                            None => break,
                        }
                    }
                    op => {
                        // Exchanges may leave lanes behind that wait for others.
                        let done = self.execute(ctx, instr, op, active, bases, pc)?;
                        pc += 1;
                        if done != active {
                            let waiting = active & !done;
                            let wait = Group {
                                pc: pc - 1,
                                mask: waiting,
                                frame,
                                wait: Wait::Exchange,
                            };
                            self.groups[at].mask = mask & !waiting;
                            self.groups[at].pc = pc;
                            self.groups.push(wait);
                            self.groups.retain(|g| g.mask != 0);
                            break;
                        }
                    }
                }
                if !alone {
                    self.groups[at].pc = pc;
                    break;
                }
            }
        }
    }

    /// Writes the predicates of a comparison.
    #[inline(always)]
    pub(super) fn compared(
        &mut self,
        bases: Bases,
        active: u32,
        d: Pred,
        q: Option<Pred>,
        first: u32,
        second: u32,
        poison: u32,
        with: Option<(Bool, Pred, bool)>,
    ) {
        let (mut first, mut second, mut poison) = (first, second, poison);
        if let Some((op, p, negate)) = with {
            let p = bases.preds + p as usize;
            let value = if negate {
                !self.preds[p]
            } else {
                self.preds[p]
            };
            first = logic(op, first, value);
            second = logic(op, second, value);
            poison |= self.pred_poison[p];
        }
        self.set_pred(bases.preds + d as usize, active, first, poison);
        if let Some(q) = q {
            self.set_pred(bases.preds + q as usize, active, second, poison);
        }
    }

    fn call(
        &mut self,
        ctx: &Context,
        instr: &Instr,
        call: &CallOp,
        at: usize,
        pc: u32,
        active: u32,
        bases: Bases,
    ) -> Result<(), Box<Finding>> {
        let functions = &ctx.launch.kernel.functions;
        let mut now = active;
        let index = match call.target {
            Ok(index) => index,
            Err(slot) => {
                let slot = bases.regs + slot as usize;
                ctx.check_poison(
                    self,
                    instr,
                    self.poison[slot] & active,
                    "a function address",
                )?;
                // Lanes that call the first lane's target go first; the others stay here.
                let lane = active.trailing_zeros() as usize;
                let address = self.get(slot, lane, true);
                now = (0..WARP)
                    .filter(|&l| active >> l & 1 == 1 && self.get(slot, l, true) == address)
                    .fold(0, |m, l| m | 1 << l);
                match address.checked_sub(CODE_WINDOW) {
                    Some(i) if i > 0 && i < functions.len() as u64 => i as u32,
                    _ => {
                        let message = format!("call of {address:#x}, which is not a function");
                        return Err(ctx.fault(self, instr, Kind::Invalid, lane as u32, message));
                    }
                }
            }
        };
        let callee = &functions[index as usize];
        let Group { mask, frame, .. } = self.groups[at];
        let lane = now.trailing_zeros();
        if self.frame(frame).depth >= MAX_FRAMES {
            let message = format!("calls are nested deeper than {MAX_FRAMES}");
            return Err(ctx.fault(self, instr, Kind::StackOverflow, lane, message));
        }
        if callee.params.len() != call.args.len() || callee.returns.len() != call.returns.len() {
            let message = format!(
                "{} is called with the wrong number of parameters",
                callee.name
            );
            return Err(ctx.fault(self, instr, Kind::Invalid, lane, message));
        }
        let new = self.push_frame(ctx, index, Some(frame), pc + 1, false);
        let local = self.frame(new).local_base;
        for ((from, _), (to, size)) in call.args.iter().zip(&callee.params) {
            self.copy_local(now, bases.local + from, local + to, *size);
        }
        // Lanes with a false guard go on; lanes with another target stay.
        let (stay, go_on) = (active & !now, mask & !active);
        self.groups[at] = Group {
            pc: callee.entry,
            mask: now,
            frame: new,
            wait: Wait::None,
        };
        for (pc, mask) in [(pc, stay), (pc + 1, go_on)] {
            if mask != 0 {
                self.groups.push(Group {
                    pc,
                    mask,
                    frame,
                    wait: Wait::None,
                });
            }
        }
        Ok(())
    }

    fn ret(&mut self, ctx: &Context, at: usize, pc: u32, active: u32) {
        let Group { mask, frame, .. } = self.groups[at];
        let Frame {
            function,
            local_base,
            parent,
            return_pc,
            ..
        } = *self.frame(frame);
        let callee = &ctx.launch.kernel.functions[function as usize];
        let caller = self.frame(parent).local_base;
        if let Op::Call(call) = &ctx.launch.kernel.code[return_pc as usize - 1].op {
            for ((to, _), (from, size)) in call.returns.iter().zip(&callee.returns) {
                self.copy_local(active, local_base + from, caller + to, *size);
            }
        }
        self.groups[at] = Group {
            pc: return_pc,
            mask: active,
            frame: parent,
            wait: Wait::None,
        };
        if mask != active {
            self.groups.push(Group {
                pc: pc + 1,
                mask: mask & !active,
                frame,
                wait: Wait::None,
            });
        }
        self.drop_frames();
    }

    fn copy_local(&mut self, mask: u32, from: u32, to: u32, size: u32) {
        for lane in (0..WARP).filter(|l| mask >> l & 1 == 1) {
            self.local[lane].copy_within(from as usize..(from + size) as usize, to as usize);
            let valid = &mut self.local_valid[lane];
            for i in 0..size {
                let (f, t) = ((from + i) as usize, (to + i) as usize);
                let bit = valid[f / 8] >> (f % 8) & 1;
                valid[t / 8] = valid[t / 8] & !(1 << (t % 8)) | bit << (t % 8);
            }
        }
    }

    fn branch_table(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        at: usize,
        pc: u32,
        active: u32,
        a: usize,
        targets: &[u32],
    ) -> Result<(), Box<Finding>> {
        let Group { mask, frame, .. } = self.groups[at];
        let mut places: Vec<(u32, u32)> = vec![(pc + 1, mask & !active)];
        for lane in (0..WARP).filter(|l| active >> l & 1 == 1) {
            let index = self.regs[a].0[lane];
            let Some(target) = targets.get(index as usize) else {
                let message = format!("branch index {index} with {} targets", targets.len());
                return Err(ctx.fault(self, instr, Kind::Invalid, lane as u32, message));
            };
            match places.iter_mut().find(|p| p.0 == *target) {
                Some(place) => place.1 |= 1 << lane,
                None => places.push((*target, 1 << lane)),
            }
        }
        places.retain(|p| p.1 != 0);
        ctx.counters.divergent_branches += (places.len() > 1) as u64;
        self.groups[at] = Group {
            pc: places[0].0,
            mask: places[0].1,
            frame,
            wait: Wait::None,
        };
        for (pc, mask) in &places[1..] {
            self.groups.push(Group {
                pc: *pc,
                mask: *mask,
                frame,
                wait: Wait::None,
            });
        }
        Ok(())
    }

    /// Arrival at a block barrier. Gives its number once the group waits there (or has arrived),
    /// nothing while lanes of the warp are missing.
    fn barrier(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        at: usize,
        active: u32,
        bases: Bases,
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
        arrive: bool,
        reduce: Option<(BarReduce, u32, Pred, bool)>,
    ) -> Result<Option<usize>, Box<Finding>> {
        let Group {
            pc, mask, frame, ..
        } = self.groups[at];
        let lane = active.trailing_zeros();
        if aligned && active != self.live() {
            let gone = self.exited & self.exists;
            if gone != 0 && self.groups.len() == 1 && mask == active {
                return Err(self.diverged(ctx, instr, lane));
            }
            // Lanes switched off go on; these wait for the rest of the warp.
            self.groups[at].mask = active;
            self.groups[at].wait = Wait::Aligned;
            if mask != active {
                self.groups.push(Group {
                    pc: pc + 1,
                    mask: mask & !active,
                    frame,
                    wait: Wait::None,
                });
            }
            return Ok(None);
        }
        if aligned && self.exited & self.exists != 0 {
            return Err(self.diverged(ctx, instr, lane));
        }
        let id_at = bases.regs + id as usize;
        ctx.check_poison(self, instr, self.poison[id_at] & active, "a barrier number")?;
        let id = self.regs[id_at].0[lane as usize];
        if id >= 16 {
            let message = format!("barrier {id}: there are 16");
            return Err(ctx.fault(self, instr, Kind::Invalid, lane, message));
        }
        let id = id as usize;
        let expected = match count {
            Some(slot) => {
                let n = self.regs[bases.regs + slot as usize].0[lane as usize];
                if n == 0 || !n.is_multiple_of(32) || n > 1024 {
                    let message = format!("barrier of {n} threads: must be a multiple of 32");
                    return Err(ctx.fault(self, instr, Kind::Invalid, lane, message));
                }
                Some(n)
            }
            None => None,
        };
        ctx.counters.barriers += 1;
        // A whole warp counts as 32 even where the block ends within it.
        let units = if aligned { 32 } else { active.count_ones() };
        if let Err(message) = ctx.arrive(self.id, id, active.count_ones(), units, expected) {
            return Err(ctx.fault(self, instr, Kind::Deadlock, lane, message));
        }
        let mut slot = None;
        if let Some((kind, d, p, negate)) = reduce {
            let p = bases.preds + p as usize;
            let value = (if negate {
                !self.preds[p]
            } else {
                self.preds[p]
            }) & active;
            ctx.check_poison(self, instr, self.pred_poison[p] & active, "a predicate")?;
            ctx.reduce(id, value.count_ones(), active.count_ones());
            let base = if kind == BarReduce::Popc {
                bases.regs
            } else {
                bases.preds
            };
            slot = Some((kind, base + d as usize));
        }
        let rest = mask & !active;
        if arrive {
            self.groups[at].pc = pc + 1;
        } else {
            self.groups[at].mask = active;
            self.groups[at].wait = Wait::Barrier { id, reduce: slot };
            if rest != 0 {
                self.groups.push(Group {
                    pc: pc + 1,
                    mask: rest,
                    frame,
                    wait: Wait::None,
                });
            }
        }
        Ok(Some(id))
    }

    fn diverged(&self, ctx: &Context, instr: &Instr, lane: u32) -> Box<Finding> {
        let message = format!(
            "divergent barrier: lanes {} of warp {} have exited and never reach it",
            lane_list(self.exited & self.exists),
            self.id
        );
        ctx.fault(self, instr, Kind::BarrierDivergence, lane, message)
    }

    /// Lets the groups that wait at a barrier go on.
    pub fn release(&mut self, id: usize, popc: u32, all: bool) -> bool {
        let mut released = false;
        let mut groups = std::mem::take(&mut self.groups);
        for g in &mut groups {
            let Wait::Barrier { id: at, reduce } = g.wait else {
                continue;
            };
            if at != id {
                continue;
            }
            match reduce {
                Some((BarReduce::Popc, d)) => {
                    for lane in (0..WARP).filter(|l| g.mask >> l & 1 == 1) {
                        self.regs[d].0[lane] = popc;
                    }
                    self.set_poison(d, g.mask, 0);
                }
                Some((kind, d)) => {
                    let value = if kind == BarReduce::And {
                        all
                    } else {
                        popc > 0
                    };
                    self.set_pred(d, g.mask, if value { !0 } else { 0 }, 0);
                }
                None => {}
            }
            g.wait = Wait::None;
            g.pc += 1;
            released = true;
        }
        swap(&mut self.groups, &mut groups);
        released
    }
}

/// Combines two predicates.
#[inline(always)]
pub(super) fn logic(op: Bool, a: u32, b: u32) -> u32 {
    match op {
        Bool::And => a & b,
        Bool::Or => a | b,
        Bool::Xor => a ^ b,
    }
}

/// Lanes of a mask in words: `0-3,7`.
pub fn lane_list(mask: u32) -> String {
    let mut out = String::new();
    let mut lane = 0;
    while lane < 32 {
        if mask >> lane & 1 == 0 {
            lane += 1;
            continue;
        }
        let mut end = lane;
        while end < 31 && mask >> (end + 1) & 1 == 1 {
            end += 1;
        }
        let comma = if out.is_empty() { "" } else { "," };
        match end - lane {
            0 => out.push_str(&format!("{comma}{lane}")),
            _ => out.push_str(&format!("{comma}{lane}-{end}")),
        }
        lane = end + 1;
    }
    out
}
