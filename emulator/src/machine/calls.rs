//! Frames: registers and local memory of calls.

use super::block::Context;
use super::code::*;
use super::execute::{each, lanes};
use super::lanes::{Lanes, WARP};
use super::warp::{Bases, Group, Wait, Warp};
use crate::report::{Finding, Kind};

/// Frames that calls may nest before it is a stack overflow.
const MAX_FRAMES: u32 = 1000;

/// Registers and local memory of a call.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub function: u32,
    pub base: usize,
    pub pred_base: usize,
    pub local_base: u32,
    pub depth: u32,
    pub parent: u32,
    pub return_pc: u32,
}

impl Warp {
    pub(super) fn frame(&self, index: u32) -> &Frame {
        match &self.frames[index as usize] {
            Some(frame) => frame,
            None => unreachable!("a group's frame is alive"),
        }
    }

    pub(super) fn push_frame(
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
            let id = self.id;
            let special = |special, lane: usize| ctx.special(special, id, lane as u32);
            match *start {
                Start::Bits(bits) => self.fill(at, !0, *wide, bits),
                Start::Local(offset) => self.fill(at, !0, *wide, (local_base + offset) as u64),
                Start::Special(s) if s.same_in_warp() => self.fill(at, !0, *wide, special(s, 0)),
                Start::Special(s) => each(!0, |lane| self.set(at, lane, *wide, special(s, lane))),
            }
        }
        let top = (local_base + f.local) as usize;
        self.local.frame(local_base as usize, top);
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
    pub(super) fn drop_frames(&mut self) {
        while let Some(dead) = (1..self.frames.len() as u32).find(|&i| {
            self.frames[i as usize].is_some()
                && !self.groups.iter().any(|g| g.frame == i)
                && !self.frames.iter().flatten().any(|f| f.parent == i)
        }) {
            self.frames[dead as usize] = None;
        }
    }

    pub(super) fn call(
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

    pub(super) fn ret(&mut self, ctx: &Context, at: usize, pc: u32, active: u32) {
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
        for lane in lanes(mask) {
            self.local
                .copy(lane, from as usize, to as usize, size as usize);
        }
    }
}
