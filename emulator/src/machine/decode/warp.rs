//! Barriers, fences, exchanges between lanes, matrix multiply-adds.

use super::*;

impl<'a> Body<'_, '_, 'a> {
    pub(super) fn warp(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "bar" | "barrier" => self.barrier(ins),
            "membar" | "fence" => self.fence(ins),
            "shfl" => self.shuffle(ins),
            "vote" => self.vote(ins),
            "match" => {
                ins.take("sync");
                let all = ins.take("all");
                if !all && !ins.take("any") {
                    return ins.error(".any or .all is missing");
                }
                let ty = ins.ty()?;
                ins.done()?;
                if !matches!(ty, Type::B32 | Type::B64) {
                    return ins.bad_type(ty);
                }
                let [d, a, mask] = ins.operands()?;
                let (d, p) = self.register_and_pred(ins, d)?;
                let a = self.src(ins, a, ty)?;
                let mask = self.src(ins, mask, Type::B32)?;
                let op = Op::Match {
                    all,
                    d,
                    p,
                    a,
                    wide: wide(ty),
                    mask,
                };
                self.emit(ins, Class::Collective, op);
                Ok(())
            }
            "activemask" => {
                ins.take("b32");
                ins.done()?;
                let [d] = ins.operands()?;
                let d = self.dst(ins, d, Type::B32)?;
                self.emit(ins, Class::Collective, Op::ActiveMask { d });
                Ok(())
            }
            "redux" => {
                ins.take("sync");
                let name = ins.one(&["add", "min", "max", "and", "or", "xor"]);
                let ty = ins.ty()?;
                ins.done()?;
                let f = match (name, ty) {
                    (Some("add"), Type::U32 | Type::S32) => Redux::Add,
                    (Some("min"), Type::S32) => Redux::MinS,
                    (Some("max"), Type::S32) => Redux::MaxS,
                    (Some("min"), Type::U32) => Redux::MinU,
                    (Some("max"), Type::U32) => Redux::MaxU,
                    (Some("and"), Type::B32) => Redux::And,
                    (Some("or"), Type::B32) => Redux::Or,
                    (Some("xor"), Type::B32) => Redux::Xor,
                    _ => return ins.error("this form is not implemented"),
                };
                let [d, a, mask] = ins.operands()?;
                let a = self.src(ins, a, Type::B32)?;
                let mask = self.src(ins, mask, Type::B32)?;
                let d = self.dst(ins, d, Type::B32)?;
                self.emit(ins, Class::Collective, Op::Redux { f, d, a, mask });
                Ok(())
            }
            "elect" => {
                ins.take("sync");
                ins.done()?;
                let [d, mask] = ins.operands()?;
                let Operand::Pair(d, p) = d else {
                    return ins.error("a predicate is missing");
                };
                let d = self.dst(ins, &Operand::Name(d, None), Type::B32)?;
                let p = self.pred_dst(ins, p)?;
                let mask = self.src(ins, mask, Type::B32)?;
                self.emit(ins, Class::Collective, Op::Elect { d, p, mask });
                Ok(())
            }
            _ => self.mma(ins),
        }
    }

    fn register_and_pred(
        &mut self,
        ins: &Ins<'_, 'a>,
        operand: &Operand<'a>,
    ) -> Result<(Slot, Option<Pred>)> {
        match operand {
            Operand::Pair(d, p) => {
                let d = self.dst(ins, &Operand::Name(d, None), Type::B32)?;
                Ok((d, Some(self.pred_dst(ins, p)?)))
            }
            other => Ok((self.dst(ins, other, Type::B32)?, None)),
        }
    }

    fn barrier(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        ins.take("cta");
        if ins.take("warp") {
            if !ins.take("sync") {
                return ins.error("this form is not implemented");
            }
            ins.done()?;
            let [mask] = ins.operands()?;
            let mask = self.src(ins, mask, Type::B32)?;
            self.emit(ins, Class::Barrier, Op::WarpSync { mask });
            return Ok(());
        }
        let aligned = ins.take("aligned") || ins.i.opcode == "bar";
        let kind = ins.one(&["sync", "arrive", "red"]);
        let op = ins.one(&["popc", "and", "or"]);
        ins.take("u32");
        ins.take("pred");
        ins.done()?;
        let operands: Vec<_> = ins.i.operands.iter().collect();
        let (id, count, reduce) = match (kind, op, operands.as_slice()) {
            (Some("sync"), None, [id]) => (id, None, None),
            (Some("sync" | "arrive"), None, [id, count]) => (id, Some(*count), None),
            (Some("red"), Some(op), [d, id, rest @ ..]) if (1..=2).contains(&rest.len()) => {
                let (count, p) = if rest.len() == 2 {
                    (Some(rest[0]), rest[1])
                } else {
                    (None, rest[0])
                };
                let (p, negated) = self.pred_src(ins, p)?;
                let reduce = match op {
                    "popc" => (BarReduce::Popc, self.dst(ins, d, Type::U32)?),
                    _ => {
                        let Operand::Name(d, None) = d else {
                            return ins.error("the destination is not a predicate");
                        };
                        let d = self.pred_dst(ins, d)?;
                        (
                            if op == "and" {
                                BarReduce::And
                            } else {
                                BarReduce::Or
                            },
                            d,
                        )
                    }
                };
                (id, count, Some((reduce.0, reduce.1, p, negated)))
            }
            _ => return ins.error("this form is not implemented"),
        };
        let id = self.src(ins, id, Type::U32)?;
        let count = count.map(|c| self.src(ins, c, Type::U32)).transpose()?;
        let arrive = kind == Some("arrive");
        self.emit(
            ins,
            Class::Barrier,
            Op::Barrier {
                id,
                count,
                aligned,
                arrive,
                reduce,
            },
        );
        Ok(())
    }

    fn fence(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        ins.one(&["sc", "acq_rel"]);
        let Some(scope) = ins.one(&["cta", "cluster", "gl", "gpu", "sys"]) else {
            return ins.error("this form is not implemented");
        };
        ins.done()?;
        ins.operands::<0>()?;
        self.emit(
            ins,
            Class::Barrier,
            Op::Fence {
                global: scope != "cta",
            },
        );
        Ok(())
    }

    fn shuffle(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if !ins.take("sync") {
            return ins.error("shuffles without .sync are not implemented");
        }
        let kind = match ins.one(&["up", "down", "bfly", "idx"]) {
            Some("up") => Shuffle::Up,
            Some("down") => Shuffle::Down,
            Some("bfly") => Shuffle::Bfly,
            Some(_) => Shuffle::Idx,
            None => return ins.error("a mode is missing"),
        };
        let ty = ins.ty()?;
        ins.done()?;
        if ty != Type::B32 {
            return ins.bad_type(ty);
        }
        let [d, a, b, c, mask] = ins.operands()?;
        let a = self.src(ins, a, ty)?;
        let [b, c] = self.srcs(ins, [b, c], Type::B32)?;
        let mask = self.src(ins, mask, Type::B32)?;
        let (d, p) = self.register_and_pred(ins, d)?;
        self.emit(
            ins,
            Class::Collective,
            Op::Shuffle {
                kind,
                d,
                p,
                a,
                b,
                c,
                mask,
            },
        );
        Ok(())
    }

    fn vote(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        if !ins.take("sync") {
            return ins.error("votes without .sync are not implemented");
        }
        let name = ins.one(&["all", "any", "uni", "ballot"]);
        let ty = ins.ty()?;
        ins.done()?;
        let [d, a, mask] = ins.operands()?;
        let (kind, d) = match (name, ty, d) {
            (Some("ballot"), Type::B32, d) => (Vote::Ballot, self.dst(ins, d, Type::B32)?),
            (Some(name), Type::Pred, Operand::Name(d, None)) => {
                let kind = match name {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uni,
                    _ => return ins.bad_type(ty),
                };
                (kind, self.pred_dst(ins, d)?)
            }
            _ => return ins.error("this form is not implemented"),
        };
        let (p, negate) = self.pred_src(ins, a)?;
        let mask = self.src(ins, mask, Type::B32)?;
        self.emit(
            ins,
            Class::Collective,
            Op::Vote {
                kind,
                d,
                p,
                negate,
                mask,
            },
        );
        Ok(())
    }

    fn mma(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        let form = ins.take("sync") & ins.take("aligned") & ins.take("row") & ins.take("col");
        let k = match ins.one(&["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"]) {
            Some("m16n8k4") => 4,
            Some("m16n8k8") => 8,
            Some("m16n8k16") => 16,
            Some(_) => 32,
            None => return ins.error("this shape is not implemented"),
        };
        let saturate = ins.take("satfinite");
        let (dt, at, bt, ct) = (ins.ty()?, ins.ty()?, ins.ty()?, ins.ty()?);
        ins.done()?;
        let element = |t| {
            Some(match t {
                Type::F16 => Element::F16,
                Type::Bf16 => Element::Bf16,
                Type::Tf32 => Element::Tf32,
                Type::E4m3 => Element::E4m3,
                Type::E5m2 => Element::E5m2,
                Type::S8 => Element::S8,
                Type::U8 => Element::U8,
                _ => return None,
            })
        };
        let (Some(a_type), Some(b_type)) = (element(at), element(bt)) else {
            return ins.bad_type(at);
        };
        let float = dt == Type::F32 && ct == Type::F32;
        let integer = dt == Type::S32 && ct == Type::S32;
        let halves = matches!(dt, Type::F16 | Type::F32) && matches!(ct, Type::F16 | Type::F32);
        let ok = match at {
            Type::F16 => bt == at && matches!(k, 8 | 16) && halves,
            Type::Bf16 => bt == at && matches!(k, 8 | 16) && float,
            Type::Tf32 => bt == at && matches!(k, 4 | 8) && float,
            Type::E4m3 | Type::E5m2 => matches!(bt, Type::E4m3 | Type::E5m2) && k == 32 && float,
            _ => matches!(bt, Type::S8 | Type::U8) && matches!(k, 16 | 32) && integer,
        };
        if !form || !ok || saturate && !integer {
            return ins.error("this form is not implemented");
        }
        let per = match at {
            Type::F16 | Type::Bf16 => 2,
            Type::Tf32 => 1,
            _ => 4,
        };
        let (na, nb) = ((k / (2 * per)) as usize, (k / (4 * per)) as usize);
        let count = |t| if t == Type::F16 { 2 } else { 4 };
        let [d, a, b, c] = ins.operands()?;
        let list = |o: &'_ Operand<'a>, n: usize| -> Result<Vec<Operand<'a>>> {
            let list = match o {
                Operand::Vector(v) => v.clone(),
                other => vec![other.clone()],
            };
            if list.len() != n {
                return ins.error(format!("expected {n} registers, found {}", list.len()));
            }
            Ok(list)
        };
        let (d, a, b, c) = (
            list(d, count(dt))?,
            list(a, na)?,
            list(b, nb)?,
            list(c, count(ct))?,
        );
        let mut op = MmaOp {
            k,
            a_type,
            b_type,
            c_half: ct == Type::F16,
            d_half: dt == Type::F16,
            saturate,
            d: Vec::new(),
            a: Vec::new(),
            b: Vec::new(),
            c: Vec::new(),
        };
        let accumulator = if ct == Type::F32 {
            Type::F32
        } else {
            Type::B32
        };
        for o in &a {
            op.a.push(self.src(ins, o, Type::B32)?);
        }
        for o in &b {
            op.b.push(self.src(ins, o, Type::B32)?);
        }
        for o in &c {
            op.c.push(self.src(ins, o, accumulator)?);
        }
        for o in &d {
            op.d.push(self.dst(ins, o, Type::B32)?);
        }
        self.emit(ins, Class::Matrix, Op::Mma(Box::new(op)));
        Ok(())
    }
}
