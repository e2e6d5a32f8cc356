//! Branches, calls, exits.

use super::*;

impl<'a> Body<'_, '_, 'a> {
    pub(super) fn control(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        match ins.i.opcode {
            "bra" => {
                ins.take("uni");
                ins.done()?;
                let [target] = ins.operands()?;
                let Operand::Name(label, None) = target else {
                    return ins.error("the target is not a label");
                };
                self.fix_later(ins, vec![label]);
                self.emit(ins, Class::Control, Op::Branch { target: 0 });
                Ok(())
            }
            "brx" => {
                ins.take("uni");
                if !ins.take("idx") {
                    return ins.error("this form is not implemented");
                }
                ins.done()?;
                let [index, table] = ins.operands()?;
                let Operand::Name(table, None) = table else {
                    return ins.error("the table is not a name");
                };
                let Some(labels) = self.targets.get(table).cloned() else {
                    return ins.error(format!("{table} is not a list of branch targets"));
                };
                let a = self.src(ins, index, Type::U32)?;
                self.fix_later(ins, labels);
                self.emit(
                    ins,
                    Class::Control,
                    Op::BranchTable {
                        a,
                        targets: Box::new([]),
                    },
                );
                Ok(())
            }
            "call" => self.call(ins),
            "ret" => {
                ins.take("uni");
                ins.done()?;
                let op = if self.function.entry {
                    Op::Exit
                } else {
                    Op::Return
                };
                self.emit(ins, Class::Control, op);
                Ok(())
            }
            "exit" => {
                ins.done()?;
                self.emit(ins, Class::Control, Op::Exit);
                Ok(())
            }
            "trap" | "brkpt" => {
                ins.done()?;
                self.emit(ins, Class::Control, Op::Trap);
                Ok(())
            }
            "nanosleep" => {
                ins.take("u32");
                ins.done()?;
                self.emit(ins, Class::Control, Op::Nop);
                Ok(())
            }
            // Launches run one after the other: the one waited for has finished.
            _ => {
                if ins.one(&["launch_dependents", "wait"]).is_none() {
                    return ins.error("this form is not implemented");
                }
                ins.done()?;
                self.emit(ins, Class::Control, Op::Nop);
                Ok(())
            }
        }
    }

    fn fix_later(&mut self, ins: &Ins<'_, 'a>, labels: Vec<&'a str>) {
        let fixup = Fixup {
            at: self.code.len(),
            labels,
            scopes: self.scope_ids(),
            line: ins.i.line,
        };
        self.fixups.push(fixup);
    }

    fn call(&mut self, ins: &mut Ins<'_, 'a>) -> Result<()> {
        ins.take("uni");
        ins.done()?;
        let mut operands = ins.i.operands.iter().peekable();
        // A list before the target holds the results.
        let returns = match operands.peek() {
            Some(Operand::List(list)) => {
                operands.next();
                list.as_slice()
            }
            _ => &[],
        };
        let Some(Operand::Name(name, None)) = operands.next() else {
            return ins.error("the target is not a name");
        };
        let args = match operands.next() {
            Some(Operand::List(list)) => list.as_slice(),
            Some(_) => return ins.error("this form is not implemented"),
            None => &[],
        };
        let locate = |body: &mut Self, list: &[Operand<'a>]| -> Result<Vec<u32>> {
            let mut out = Vec::new();
            for operand in list {
                let Operand::Name(name, None) = operand else {
                    return ins.error("arguments must be .param variables");
                };
                match body.lookup(name, ins.i.line)? {
                    Symbol::Address(Space::Local, at) => out.push(at as u32),
                    _ => return ins.error(format!("{name} is not a .param variable")),
                }
            }
            Ok(out)
        };
        let args = locate(self, args)?;
        let returns = locate(self, returns)?;
        let symbol = match self.decoder.index.get(name) {
            Some(index) => Symbol::Function(*index),
            None => match self.lookup(name, ins.i.line) {
                Ok(symbol) => symbol,
                Err(_) => {
                    return ins.error(format!(
                        "function {name} has no body in this module and is not implemented"
                    ));
                }
            },
        };
        let target = match symbol {
            Symbol::Function(index) => Ok(index),
            Symbol::Reg(slot, ty) if wide(ty) => Err(slot),
            _ => return ins.error(format!("{name} is not a function")),
        };
        // Sizes come from the callee when it is known, and are checked at the call otherwise.
        let sized =
            |list: Vec<u32>, have: Option<&[ast::Variable<'a>]>| -> Result<Vec<(u32, u32)>> {
                match have {
                    Some(have) if have.len() != list.len() => ins.error(format!(
                        "{} parameters where {name} has {}",
                        list.len(),
                        have.len()
                    )),
                    Some(have) => Ok(list
                        .iter()
                        .zip(have)
                        .map(|(at, v)| (*at, v.size as u32))
                        .collect()),
                    None => Ok(list.iter().map(|at| (*at, 0)).collect()),
                }
            };
        let callee = match target {
            Ok(_) => self
                .decoder
                .module
                .functions
                .iter()
                .find(|f| f.name == *name),
            Err(_) => None,
        };
        let args = sized(args, callee.map(|f| f.params.as_slice()))?;
        let returns = sized(returns, callee.map(|f| f.returns.as_slice()))?;
        self.emit(
            ins,
            Class::Control,
            Op::Call(Box::new(CallOp {
                target,
                args,
                returns,
            })),
        );
        Ok(())
    }
}
