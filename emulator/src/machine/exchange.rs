//! Exchanges between the lanes of a warp: shuffles, votes, matches, matrix loads, `mma`.

use super::access::Places;
use super::block::Context;
use super::code::*;
use super::execute::{each, lanes, space_of};
use super::lanes::WARP;
use super::mma;
use super::race::Touch;
use super::warp::{Bases, Warp, lane_list};
use crate::ptx::ast::Space;
use crate::report::{Finding, Kind};
use crate::widened;

widened! {
    /// A bit a lane with this value.
    fn equal(values: &[u32; WARP], value: u32) -> u32 {
        let mut bits = [0; WARP];
        for (lane, v) in values.iter().enumerate() {
            bits[lane] = ((*v == value) as u32) << lane;
        }
        bits.iter().fold(0, |all, b| all | b)
    }

    /// A bit a lane: the bit of its value that `which` names.
    fn chosen(values: &[u32; WARP], which: &[u32; WARP]) -> u32 {
        let mut bits = [0; WARP];
        for (lane, v) in values.iter().enumerate() {
            bits[lane] = (*v >> (which[lane] & 31) & 1) << lane;
        }
        bits.iter().fold(0, |all, b| all | b)
    }

    /// The lane that each lane of a shuffle reads, and a bit a lane whose partner is in range;
    /// the others read themselves.
    fn sources(kind: Shuffle, b: &[u32; WARP], c: &[u32; WARP], from: &mut [u32; WARP]) -> u32 {
        match kind {
            Shuffle::Up => partners(b, c, from, |me, b, _, top| (me - b, me - b >= top)),
            Shuffle::Down => partners(b, c, from, |me, b, _, top| (me + b, me + b <= top)),
            Shuffle::Bfly => partners(b, c, from, |me, b, _, top| (me ^ b, me ^ b <= top)),
            Shuffle::Idx => partners(b, c, from, |me, b, segment, top| {
                let partner = me & segment | b & !segment;
                (partner, partner <= top)
            }),
        }
    }
}

/// As [`sources`]: `partner` gets lane, operand, segment mask and limit.
#[inline(always)]
fn partners(
    b: &[u32; WARP],
    c: &[u32; WARP],
    from: &mut [u32; WARP],
    partner: impl Fn(i32, i32, i32, i32) -> (i32, bool),
) -> u32 {
    let mut inside = [0; WARP];
    for lane in 0..WARP {
        let (me, b, c) = (lane as i32, b[lane] as i32 & 31, c[lane] as i32);
        let (clamp, segment) = (c & 31, c >> 8 & 31);
        let top = me & segment | clamp & !segment;
        let (partner, ok) = partner(me, b, segment, top);
        from[lane] = if ok { partner } else { me } as u32;
        inside[lane] = (ok as u32) << lane;
    }
    inside.iter().fold(0, |all, b| all | b)
}

impl Warp {
    /// The lanes whose partners have all arrived.
    fn rendezvous(
        &self,
        ctx: &mut Context,
        instr: &Instr,
        mask: usize,
        active: u32,
    ) -> Result<u32, Box<Finding>> {
        ctx.check_poison(self, instr, self.poison[mask] & active, "a lane mask")?;
        let masks = &self.regs[mask].0;
        let (mut ready, mut left) = (0, active);
        while left != 0 {
            let lane = left.trailing_zeros();
            let wanted = masks[lane as usize];
            let same = active & equal(masks, wanted);
            left &= !same;
            let outside = same & !wanted;
            if outside != 0 {
                let lane = outside.trailing_zeros();
                let message =
                    format!("lane {lane} is not in the lane mask {wanted:#010x} that it gives");
                return Err(ctx.fault(self, instr, Kind::AbsentLane, lane, message));
            }
            let gone = wanted & !self.live();
            if gone != 0 {
                let message = format!(
                    "lanes {} are named in the mask {wanted:#010x} but have exited",
                    lane_list(gone)
                );
                return Err(ctx.fault(self, instr, Kind::AbsentLane, lane, message));
            }
            if same & wanted == wanted {
                ready |= same;
            }
        }
        Ok(ready)
    }

    /// Whether all lanes of the warp are here, as `.aligned` instructions want.
    fn whole(&self, ctx: &Context, instr: &Instr, active: u32) -> Result<bool, Box<Finding>> {
        let gone = !self.live();
        if gone != 0 {
            let message = format!(
                "lanes {} have exited or do not exist; all 32 are needed",
                lane_list(gone)
            );
            let lane = active.trailing_zeros();
            return Err(ctx.fault(self, instr, Kind::AbsentLane, lane, message));
        }
        Ok(active == !0)
    }

    pub(super) fn exchange(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        op: &Op,
        active: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<u32, Box<Finding>> {
        let r = |slot: Slot| bases.regs + slot as usize;
        let q = |pred: Pred| bases.preds + pred as usize;
        match op {
            Op::ActiveMask { d } => {
                lanes(active).for_each(|l| self.regs[r(*d)].0[l] = active);
                self.set_poison(r(*d), active, 0);
                Ok(active)
            }
            Op::WarpSync { mask } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                if ready != 0
                    && let Some(races) = &mut ctx.races
                {
                    races.warp_sync(self.id as usize);
                }
                Ok(ready)
            }
            Op::Shuffle {
                kind,
                d,
                p,
                a,
                b,
                c,
                mask,
            } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                let (masks, values) = (self.regs[r(*mask)].0, self.regs[r(*a)].0);
                let from_poison = self.poison[r(*a)];
                let control = (self.poison[r(*b)] | self.poison[r(*c)]) & ready;
                ctx.check_poison(self, instr, control, "a shuffle's lane")?;
                let (b, c) = (&self.regs[r(*b)].0, &self.regs[r(*c)].0);
                let mut from = [0; WARP];
                let inside = sources(*kind, b, c, &mut from);
                let missing = ready & !chosen(&masks, &from);
                if missing != 0 {
                    let lane = missing.trailing_zeros();
                    let (from, mask) = (from[lane as usize], masks[lane as usize]);
                    let message = format!(
                        "lane {lane} reads lane {from}, which the mask {mask:#010x} leaves out"
                    );
                    return Err(ctx.fault(self, instr, Kind::AbsentLane, lane, message));
                }
                let out = &mut self.regs[r(*d)].0;
                each(ready, |lane| out[lane] = values[from[lane] as usize % WARP]);
                let poison = chosen(&[from_poison; WARP], &from);
                self.set_poison(r(*d), ready, poison);
                if let Some(p) = p {
                    self.set_pred(q(*p), ready, inside, 0);
                }
                Ok(ready)
            }
            Op::Vote {
                kind,
                d,
                p,
                negate,
                mask,
            } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                let masks = self.regs[r(*mask)].0;
                let bits = if *negate {
                    !self.preds[q(*p)]
                } else {
                    self.preds[q(*p)]
                };
                let poison = self.pred_poison[q(*p)];
                let (mut result, mut bad) = (0, 0);
                for lane in lanes(ready) {
                    let (mine, m) = (bits & masks[lane], masks[lane]);
                    bad |= ((poison & m != 0) as u32) << lane;
                    let yes = match kind {
                        Vote::All => mine == m,
                        Vote::Any => mine != 0,
                        Vote::Uni => mine == m || mine == 0,
                        Vote::Ballot => {
                            self.regs[r(*d)].0[lane] = mine;
                            false
                        }
                    };
                    result |= (yes as u32) << lane;
                }
                if *kind == Vote::Ballot {
                    self.set_poison(r(*d), ready, bad);
                } else {
                    self.set_pred(q(*d), ready, result, bad);
                }
                Ok(ready)
            }
            Op::Match {
                all,
                d,
                p,
                a,
                wide,
                mask,
            } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                let masks = self.regs[r(*mask)].0;
                let values: [u64; WARP] = std::array::from_fn(|l| self.get(r(*a), l, *wide));
                let poison = self.poison[r(*a)];
                let (mut agree, mut bad) = (0, 0);
                for lane in lanes(ready) {
                    let m = masks[lane];
                    let same = lanes(m)
                        .filter(|l| values[*l] == values[lane])
                        .fold(0, |s, l| s | 1 << l);
                    bad |= ((poison & m != 0) as u32) << lane;
                    agree |= ((same == m) as u32) << lane;
                    self.regs[r(*d)].0[lane] = match all {
                        true if same == m => m,
                        true => 0,
                        false => same,
                    };
                }
                self.set_poison(r(*d), ready, bad);
                if let Some(p) = p {
                    self.set_pred(q(*p), ready, agree, bad);
                }
                Ok(ready)
            }
            Op::Redux { f, d, a, mask } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                let (masks, values) = (self.regs[r(*mask)].0, self.regs[r(*a)].0);
                let poison = self.poison[r(*a)];
                let mut bad = 0;
                for lane in lanes(ready) {
                    bad |= ((poison & masks[lane] != 0) as u32) << lane;
                    let all = lanes(masks[lane]).map(|l| values[l]);
                    let v = all.reduce(|x, y| match f {
                        Redux::Add => x.wrapping_add(y),
                        Redux::MinS => (x as i32).min(y as i32) as u32,
                        Redux::MaxS => (x as i32).max(y as i32) as u32,
                        Redux::MinU => x.min(y),
                        Redux::MaxU => x.max(y),
                        Redux::And => x & y,
                        Redux::Or => x | y,
                        Redux::Xor => x ^ y,
                    });
                    self.regs[r(*d)].0[lane] = v.unwrap_or(0);
                }
                self.set_poison(r(*d), ready, bad);
                Ok(ready)
            }
            Op::Elect { d, p, mask } => {
                let ready = self.rendezvous(ctx, instr, r(*mask), active)?;
                let masks = self.regs[r(*mask)].0;
                let mut leads = 0;
                for lane in lanes(ready) {
                    let leader = masks[lane].trailing_zeros();
                    self.regs[r(*d)].0[lane] = leader;
                    leads |= ((leader == lane as u32) as u32) << lane;
                }
                self.set_poison(r(*d), ready, 0);
                self.set_pred(q(*p), ready, leads, 0);
                Ok(ready)
            }
            Op::LoadMatrix {
                addr,
                count,
                transpose,
                dst,
            } => {
                if !self.whole(ctx, instr, active)? {
                    return Ok(0);
                }
                let rows = self.rows(ctx, instr, addr, *count, bases)?;
                let mut poison = [0u32; 4];
                let mut out = [[0u32; WARP]; 4];
                for m in 0..*count as usize {
                    for (lane, o) in out[m].iter_mut().enumerate() {
                        for half in 0..2 {
                            // Element (i, j) of the matrix that this half of the register holds.
                            let (i, j) = (lane / 4, 2 * (lane % 4) + half);
                            let (i, j) = if *transpose { (j, i) } else { (i, j) };
                            let at = rows[8 * m + i] + 2 * j;
                            let v = ctx.shared.half(at) as u32;
                            *o |= v << (16 * half);
                            poison[m] |= (!ctx.shared.is_valid(at, 2) as u32) << lane;
                        }
                    }
                    for i in 0..8 {
                        let lane = 8 * m + i;
                        ctx.shared_access(self, instr, rows[lane], 16, lane, pc, Touch::Read);
                    }
                }
                for m in 0..*count as usize {
                    self.regs[r(dst[m])].0 = out[m];
                    self.set_poison(r(dst[m]), !0, poison[m]);
                }
                Ok(active)
            }
            Op::StoreMatrix {
                addr,
                count,
                transpose,
                src,
            } => {
                if !self.whole(ctx, instr, active)? {
                    return Ok(0);
                }
                let rows = self.rows(ctx, instr, addr, *count, bases)?;
                for m in 0..*count as usize {
                    let s = r(src[m]);
                    for lane in 0..WARP {
                        for half in 0..2 {
                            let (i, j) = (lane / 4, 2 * (lane % 4) + half);
                            let (i, j) = if *transpose { (j, i) } else { (i, j) };
                            let at = rows[8 * m + i] + 2 * j;
                            let v = (self.regs[s].0[lane] >> (16 * half)) as u16;
                            ctx.shared.set_half(at, v);
                            let valid = self.poison[s] >> lane & 1 == 0;
                            ctx.shared.set_valid(at, 2, valid);
                        }
                    }
                    for i in 0..8 {
                        let lane = 8 * m + i;
                        ctx.shared_access(self, instr, rows[lane], 16, lane, pc, Touch::Write);
                    }
                }
                Ok(active)
            }
            Op::MoveMatrix { d, a } => {
                if !self.whole(ctx, instr, active)? {
                    return Ok(0);
                }
                let (values, from) = (self.regs[r(*a)].0, self.poison[r(*a)]);
                let (mut out, mut poison) = ([0u32; WARP], 0);
                for (lane, o) in out.iter_mut().enumerate() {
                    for half in 0..2 {
                        let (i, j) = (2 * (lane % 4) + half, lane / 4);
                        let source = 4 * i + j / 2;
                        *o |= (values[source] >> (16 * (j % 2)) & 0xffff) << (16 * half);
                        poison |= (from >> source & 1) << lane;
                    }
                }
                self.regs[r(*d)].0 = out;
                self.set_poison(r(*d), !0, poison);
                Ok(active)
            }
            Op::Mma(op) => {
                if !self.whole(ctx, instr, active)? {
                    return Ok(0);
                }
                ctx.counters.mma += 1;
                ctx.counters.mma_flops += 2 * 16 * 8 * op.k as u64;
                mma::multiply(self, op, bases.regs, ctx.launch.config.mma);
                Ok(active)
            }
            _ => unreachable!("every other instruction is executed before"),
        }
    }

    /// Where the rows of matrices start in shared memory: one a lane.
    fn rows(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        addr: &Addr,
        count: u8,
        bases: Bases,
    ) -> Result<[usize; WARP], Box<Finding>> {
        let given = (1u64 << (8 * count as u64)) as u32;
        let used = given.wrapping_sub(1);
        let mut at = [0; WARP];
        self.addresses(ctx, instr, addr, used, bases, &mut at)?;
        let mut out = [0; WARP];
        for lane in lanes(used) {
            if addr.space == Space::Generic {
                if space_of(at[lane]) != Space::Shared {
                    let message = format!("row address {:#x} is not in shared memory", at[lane]);
                    return Err(ctx.fault(self, instr, Kind::OutOfBounds, lane as u32, message));
                }
                at[lane] &= WINDOW - 1;
            }
            if at[lane] & 15 != 0 {
                let message = format!("misaligned row of 16 bytes at offset {:#x}", at[lane]);
                return Err(ctx.fault(self, instr, Kind::Misaligned, lane as u32, message));
            }
            out[lane] = self.shared_range(ctx, instr, lane, at[lane], 16)?;
        }
        ctx.count_shared(&Places::new(&at, used, 16));
        Ok(out)
    }
}
