//! A warp's part in block barriers.

use super::block::Context;
use super::code::*;
use super::lanes::WARP;
use super::warp::{Bases, Group, Wait, Warp, lane_list};
use crate::report::{Finding, Kind};

impl Warp {
    /// Arrival at a block barrier. Gives its number once the group waits there (or has arrived),
    /// nothing while lanes of the warp are missing.
    pub(super) fn barrier(
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
        self.groups = groups;
        released
    }
}
