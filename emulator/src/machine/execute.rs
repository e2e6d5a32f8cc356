//! Instructions of registers that are not plain warp-wide functions.

use super::block::Context;
use super::code::*;
use super::decode::convert;
use super::lanes::{WARP, select};
use super::num;
use super::warp::{Bases, Warp, logic};
use crate::ptx::Type;
use crate::ptx::ast::Space;
use crate::report::Finding;

/// Lanes of a mask, lowest first.
#[inline(always)]
pub(super) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let lane = left.trailing_zeros() as usize;
        left &= left - 1;
        Some(lane)
    })
}

/// Does something for the lanes of a mask, lowest first: with all 32 on, without looking for them.
#[inline(always)]
pub(super) fn each(mask: u32, mut f: impl FnMut(usize)) {
    if mask == !0 {
        (0..WARP).for_each(f);
    } else {
        lanes(mask).for_each(&mut f);
    }
}

impl Warp {
    /// Executes an instruction that does not branch. Gives the lanes that have completed it; the
    /// others of `active` wait for lanes that have not arrived.
    pub(super) fn execute(
        &mut self,
        ctx: &mut Context,
        instr: &Instr,
        op: &Op,
        active: u32,
        bases: Bases,
        pc: u32,
    ) -> Result<u32, Box<Finding>> {
        let r = |slot: Slot| bases.regs + slot as usize;
        match op {
            Op::Nop => {}
            Op::Cmp2 {
                lo,
                hi,
                d,
                q,
                a,
                b,
                with,
            } => {
                let (a, b) = (r(*a), r(*b));
                let regs = self.regs.as_ptr();
                // SAFETY: the decoder gives comparisons of packed halves 32-bit registers.
                let (first, second) =
                    unsafe { (lo(regs.add(a), regs.add(b)), hi(regs.add(a), regs.add(b))) };
                let poison = self.poison[a] | self.poison[b];
                self.compared(bases, active, *d, Some(*q), first, second, poison, *with);
            }
            Op::Select {
                d,
                a,
                b,
                p,
                negate,
                wide,
            } => {
                let (d, a, b, p) = (r(*d), r(*a), r(*b), bases.preds + *p as usize);
                let choose = if *negate {
                    !self.preds[p]
                } else {
                    self.preds[p]
                };
                let poison =
                    self.pred_poison[p] | choose & self.poison[a] | !choose & self.poison[b];
                select(&mut self.regs, d, a, b, choose, active, *wide);
                self.set_poison(d, active, poison);
            }
            Op::PredLogic {
                op,
                d,
                a,
                a_not,
                b,
                b_not,
            } => {
                let (d, a, b) = (
                    bases.preds + *d as usize,
                    bases.preds + *a as usize,
                    bases.preds + *b as usize,
                );
                let x = if *a_not {
                    !self.preds[a]
                } else {
                    self.preds[a]
                };
                let y = if *b_not {
                    !self.preds[b]
                } else {
                    self.preds[b]
                };
                let poison = self.pred_poison[a] | self.pred_poison[b];
                self.set_pred(d, active, logic(*op, x, y), poison);
            }
            Op::Timer { d, which } => {
                let d = r(*d);
                let now = self.steps;
                let (value, wide) = match which {
                    Timer::Clock => (now & 0xffff_ffff, false),
                    Timer::ClockHi => (now >> 32, false),
                    Timer::Clock64 => (now, true),
                    Timer::GlobalTimer => (ctx.launch.nanoseconds(), true),
                };
                lanes(active).for_each(|lane| self.set(d, lane, wide, value));
                self.set_poison(d, active, 0);
            }
            Op::Lop3 { lut, d, a, b, c } => {
                let (d, a, b, c) = (r(*d), r(*a), r(*b), r(*c));
                let poison = self.poison[a] | self.poison[b] | self.poison[c];
                let (x, y, z) = (self.regs[a].0, self.regs[b].0, self.regs[c].0);
                let m: [u32; 8] = std::array::from_fn(|k| if lut >> k & 1 == 1 { !0 } else { 0 });
                let mut out = [0; WARP];
                for (i, o) in out.iter_mut().enumerate() {
                    let (x, y, z) = (x[i], y[i], z[i]);
                    let pick = |lo: u32, hi: u32, s: u32| lo & !s | hi & s;
                    let zero = pick(pick(m[0], m[1], z), pick(m[2], m[3], z), y);
                    let one = pick(pick(m[4], m[5], z), pick(m[6], m[7], z), y);
                    *o = pick(zero, one, x);
                }
                if active == !0 {
                    self.regs[d].0 = out;
                } else {
                    lanes(active).for_each(|lane| self.regs[d].0[lane] = out[lane]);
                }
                self.set_poison(d, active, poison);
            }
            Op::Pack {
                size,
                count,
                wide,
                d,
                src,
            } => {
                let d = r(*d);
                let bits = 8 * *size as u32;
                let mask = if bits == 64 { !0 } else { (1u64 << bits) - 1 };
                let mut poison = 0;
                let parts = &src[..*count as usize];
                for s in parts {
                    poison |= self.poison[r(*s)];
                }
                for lane in lanes(active) {
                    let mut value = 0;
                    for (i, s) in parts.iter().enumerate() {
                        value |= (self.get(r(*s), lane, false) & mask) << (bits * i as u32);
                    }
                    self.set(d, lane, *wide, value);
                }
                self.set_poison(d, active, poison);
            }
            Op::Unpack {
                size,
                count,
                wide,
                a,
                dst,
            } => {
                let a = r(*a);
                let bits = 8 * *size as u32;
                let mask = (1u64 << bits) - 1;
                let poison = self.poison[a];
                for lane in lanes(active) {
                    // Read before writing: a destination may be the source.
                    let value = self.get(a, lane, *wide);
                    for (i, d) in dst[..*count as usize].iter().enumerate() {
                        self.set(r(*d), lane, false, value >> (bits * i as u32) & mask);
                    }
                }
                for d in &dst[..*count as usize] {
                    self.set_poison(r(*d), active, poison);
                }
            }
            Op::Convert { op, d, a, b } => {
                let (d, a, b) = (r(*d), r(*a), r(*b));
                let (from, to) = (op.from.size() == 8, op.to.size() == 8);
                for lane in lanes(active) {
                    let (x, y) = (self.get(a, lane, from), self.get(b, lane, false));
                    self.set(d, lane, to, convert(op, x, y));
                }
                let poison = self.poison[a] | self.poison[b];
                self.set_poison(d, active, poison);
            }
            Op::Approx {
                f,
                d,
                a,
                b,
                half,
                ftz,
                sat,
            } => {
                let (d, a, b) = (r(*d), r(*a), r(*b));
                let noise = ctx.launch.config.noise;
                for lane in lanes(active) {
                    let (x, y) = (self.regs[a].0[lane], self.regs[b].0[lane]);
                    self.regs[d].0[lane] = match half {
                        None => single(*f, x, y, *ftz, *sat, noise),
                        Some(ty) => short(*f, *ty, x, noise),
                    };
                }
                let poison = self.poison[a] | self.poison[b];
                self.set_poison(d, active, poison);
            }
            Op::IsSpace { d, a, space } => {
                let (d, a) = (bases.preds + *d as usize, r(*a));
                let mut bits = 0;
                for lane in lanes(active) {
                    let address = self.get(a, lane, true);
                    bits |= (space_of(address) == *space) as u32 * (1 << lane);
                }
                let poison = self.poison[a];
                self.set_pred(d, active, bits, poison);
            }
            Op::Load { .. }
            | Op::Store { .. }
            | Op::LoadParam { .. }
            | Op::Atom { .. }
            | Op::CopyAsync { .. }
            | Op::CopyCommit
            | Op::CopyWait { .. } => self.access(ctx, instr, op, active, bases, pc)?,
            Op::Fence { global } => {
                if *global {
                    ctx.fence();
                }
            }
            Op::Trap => {
                let lane = active.trailing_zeros();
                let message = "the kernel executed trap".to_string();
                return Err(ctx.fault(self, instr, crate::report::Kind::Trap, lane, message));
            }
            _ => return self.exchange(ctx, instr, op, active, bases, pc),
        }
        Ok(active)
    }
}

/// Which space a generic address is in; global unless in a window.
pub(super) fn space_of(address: u64) -> Space {
    match address & !(WINDOW - 1) {
        SHARED_WINDOW => Space::Shared,
        LOCAL_WINDOW => Space::Local,
        PARAM_WINDOW => Space::Param,
        _ => Space::Global,
    }
}

/// Documented error of an approximate function: relative, and absolute.
fn error_bound(f: Approx) -> (f64, f64) {
    let p = num::power_of_two;
    match f {
        Approx::Rcp | Approx::Sqrt => (p(-23), 0.0),
        Approx::Rsqrt | Approx::Ex2 | Approx::Div => (p(-22), 0.0),
        Approx::Lg2 => (0.0, p(-22)),
        Approx::Sin | Approx::Cos => (0.0, p(-21)),
        Approx::Tanh => (p(-11), 0.0),
    }
}

fn value(f: Approx, x: f64, y: f64) -> f64 {
    match f {
        Approx::Rcp => 1.0 / x,
        Approx::Sqrt => x.sqrt(),
        Approx::Rsqrt => 1.0 / x.sqrt(),
        Approx::Sin => x.sin(),
        Approx::Cos => x.cos(),
        Approx::Lg2 => x.log2(),
        Approx::Ex2 => x.exp2(),
        Approx::Tanh => x.tanh(),
        Approx::Div => x / y,
    }
}

/// Moves a value within the error bound, the same way each time for the same operands and seed.
fn disturb(f: Approx, v: f64, bits: u64, noise: Option<u64>) -> f64 {
    let Some(seed) = noise else { return v };
    if !v.is_finite() || v == 0.0 {
        return v;
    }
    let u =
        mix(bits ^ seed.rotate_left(32) ^ (f as u64) << 56) as f64 / u64::MAX as f64 * 2.0 - 1.0;
    let (relative, absolute) = error_bound(f);
    v * (1.0 + u * relative) + u * absolute
}

/// SplitMix64's finaliser.
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

fn single(f: Approx, x: u32, y: u32, ftz: bool, sat: bool, noise: Option<u64>) -> u32 {
    let flush = |v: f32| {
        if ftz && v.is_subnormal() {
            0f32.copysign(v)
        } else {
            v
        }
    };
    let (a, b) = (flush(f32::from_bits(x)), flush(f32::from_bits(y)));
    let exact = value(f, a as f64, b as f64);
    let v = flush(disturb(f, exact, (y as u64) << 32 | x as u64, noise) as f32);
    if sat {
        return if v > 0.0 { v.min(1.0) } else { 0.0 }.to_bits();
    }
    if v.is_nan() { 0x7fff_ffff } else { v.to_bits() }
}

fn short(f: Approx, ty: Type, x: u32, noise: Option<u64>) -> u32 {
    let format = if matches!(ty, Type::F16 | Type::F16x2) {
        num::F16
    } else {
        num::BF16
    };
    // The hardware error is below half an ulp of the format plus the rounding.
    let one = |bits: u32| {
        let exact = value(f, format.decode(bits), 0.0);
        format.encode(
            disturb(f, exact, bits as u64, noise),
            num::Round::Nearest,
            false,
        )
    };
    if ty.size() == 2 {
        one(x & 0xffff)
    } else {
        one(x & 0xffff) | one(x >> 16) << 16
    }
}
