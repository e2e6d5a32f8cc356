//! One warp: groups of lanes with a common program counter, frames, registers.

use super::block::Context;
use super::calls::Frame;
use super::code::*;
use super::execute::lanes;
use super::lanes::{Lanes, WARP, get_lane, masked, set_lane, wide_lanes_mut};
use super::local::Local;
use crate::config::Schedule;
use crate::report::{Finding, Kind};

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
    pub(super) frames: Vec<Option<Frame>>,
    pub(super) regs: Vec<Lanes>,
    /// Per register, the lanes whose value was never written.
    pub(super) poison: Vec<u32>,
    pub(super) preds: Vec<u32>,
    pub(super) pred_poison: Vec<u32>,
    pub(super) local: Local,
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
            local: Local::default(),
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
        self.local.clear();
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

    /// Writes a lane of a register.
    #[inline(always)]
    pub(super) fn set(&mut self, at: usize, lane: usize, wide: bool, bits: u64) {
        set_lane(&mut self.regs, at, lane, wide, bits);
    }

    /// Reads a lane of a register.
    #[inline(always)]
    pub(super) fn get(&self, at: usize, lane: usize, wide: bool) -> u64 {
        get_lane(&self.regs, at, lane, wide)
    }

    /// Writes the same bits to all lanes of a mask.
    pub(super) fn fill(&mut self, at: usize, mask: u32, wide: bool, bits: u64) {
        match (mask, wide) {
            (u32::MAX, false) => self.regs[at] = Lanes([bits as u32; WARP]),
            (u32::MAX, true) => *wide_lanes_mut(&mut self.regs, at) = [bits; WARP],
            _ => lanes(mask).for_each(|lane| self.set(at, lane, wide, bits)),
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
                    // Not all hosts count bits in one instruction.
                    let n = if active == !0 {
                        32
                    } else {
                        active.count_ones() as u64
                    };
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
                        unsafe {
                            let (d, a) = (regs.add(d), regs.add(a));
                            let (b, c) = (regs.add(b), regs.add(c));
                            if active == !0 {
                                f(d, a, b, c);
                            } else {
                                masked(*f, d, a, b, c, active);
                            }
                        }
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
                        if alone && active == mask {
                            self.groups.clear();
                        } else if active == mask {
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
