//! Syntax tree to the machine's code.
//!
//! Each kernel is decoded with every function it can reach into one code array, so that a
//! program counter alone says where a lane is. Constants and special registers become ordinary
//! registers filled when a frame starts: an operand is then nothing but an index.

mod control;
mod convert;
pub use convert::convert;
mod float;
mod integer;
mod memory;
mod warp;

use super::code::*;
use crate::ptx::ast::{self, Instruction, Operand, Space, Statement};
use crate::ptx::{Module, PtxError, Type};
use std::collections::{HashMap, HashSet, VecDeque};

type Result<T, E = PtxError> = std::result::Result<T, E>;

/// Most bytes of kernel parameters that CUDA takes.
const MAX_PARAMS: u32 = 32764;
/// Most local memory a thread may have.
const MAX_LOCAL: u32 = 512 << 10;
/// Most code of one kernel, in instructions.
const MAX_CODE: usize = 1 << 22;

/// Decodes one kernel. `globals` gives the addresses of the module's variables.
pub fn kernel(
    module: &Module,
    entry: &ast::Function,
    globals: &HashMap<String, u64>,
) -> Result<Kernel> {
    let mut decoder = Decoder {
        module,
        globals,
        functions: Vec::new(),
        index: HashMap::new(),
        shared: HashMap::new(),
        dynamic_shared: 0,
    };
    let reachable = decoder.reachable(entry);
    let (shared, shared_align) = decoder.layout_shared(&reachable)?;
    let mut params = Vec::new();
    let mut offset = 0u32;
    for p in &entry.params {
        let size = u32::try_from(p.size).unwrap_or(u32::MAX);
        offset = offset.next_multiple_of(p.align.max(1));
        if size > MAX_PARAMS || offset + size > MAX_PARAMS {
            return Err(PtxError::new(
                p.line,
                "kernel parameters are larger than 32764 bytes",
            ));
        }
        params.push(Param { offset, size });
        offset += size;
    }
    for (i, f) in reachable.iter().enumerate() {
        decoder.index.insert(f.name, i as u32);
    }
    let mut code = Vec::new();
    for f in &reachable {
        let mut body = Body::new(&decoder, f, &params, std::mem::take(&mut code))?;
        body.run()?;
        let (function, out) = body.finish()?;
        code = out;
        decoder.functions.push(function);
    }
    let virtual_registers = decoder.functions.iter().map(|f| f.slots).max().unwrap_or(0);
    Ok(Kernel {
        name: entry.name.to_string(),
        code,
        functions: decoder.functions,
        params,
        param_size: offset,
        shared,
        shared_align,
        max_threads: if entry.max_threads == 0 {
            1024
        } else {
            entry.max_threads
        },
        virtual_registers,
        files: module
            .files
            .iter()
            .map(|(n, p)| (*n, p.to_string()))
            .collect(),
    })
}

struct Decoder<'m, 'a> {
    module: &'m Module<'a>,
    globals: &'m HashMap<String, u64>,
    functions: Vec<Function>,
    index: HashMap<&'a str, u32>,
    /// Offsets of shared variables by (function or "", name).
    shared: HashMap<(&'a str, &'a str), u32>,
    dynamic_shared: u32,
}

fn names<'a>(operand: &Operand<'a>, out: &mut Vec<&'a str>) {
    match operand {
        Operand::Name(n, None) | Operand::NameOffset(n, _) | Operand::Address(Some(n), _) => {
            out.push(n);
        }
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|o| names(o, out)),
        _ => {}
    }
}

impl<'m, 'a> Decoder<'m, 'a> {
    /// The kernel and the functions it mentions, directly or through others. Functions whose
    /// address stands in a table of the module count as mentioned.
    fn reachable(&self, entry: &'m ast::Function<'a>) -> Vec<&'m ast::Function<'a>> {
        let by_name: HashMap<_, _> = self.module.functions.iter().map(|f| (f.name, f)).collect();
        let mut seen = HashSet::from([entry.name]);
        let mut out = vec![entry];
        let mut queue = VecDeque::from([entry]);
        let mut found = Vec::new();
        for variable in &self.module.variables {
            for init in &variable.init {
                if let ast::Init::Symbol(name, _) = init {
                    found.push(*name);
                }
            }
        }
        loop {
            for name in found.drain(..) {
                if let Some(f) = by_name
                    .get(name)
                    .filter(|f| !f.entry && seen.insert(f.name))
                {
                    out.push(*f);
                    queue.push_back(*f);
                }
            }
            let Some(f) = queue.pop_front() else {
                return out;
            };
            for statement in &f.body {
                if let Statement::Instruction(i) = statement {
                    i.operands.iter().for_each(|o| names(o, &mut found));
                }
            }
        }
    }

    fn layout_shared(&mut self, reachable: &[&'m ast::Function<'a>]) -> Result<(u32, u32)> {
        let mut used = HashSet::new();
        let mut own = Vec::new();
        for f in reachable {
            for statement in &f.body {
                match statement {
                    Statement::Instruction(i) => {
                        let mut found = Vec::new();
                        i.operands.iter().for_each(|o| names(o, &mut found));
                        used.extend(found);
                    }
                    Statement::Variable(v) if v.space == Space::Shared => own.push((f.name, v)),
                    _ => {}
                }
            }
        }
        let module = self
            .module
            .variables
            .iter()
            .filter(|v| v.space == Space::Shared);
        let all: Vec<_> = module
            .filter(|v| used.contains(v.name))
            .map(|v| ("", v))
            .chain(own)
            .collect();
        let (mut size, mut most) = (0u64, 16u32);
        for (function, v) in all.iter().filter(|(_, v)| !(v.external && v.size == 0)) {
            size = size.next_multiple_of(v.align.max(1) as u64);
            self.shared.insert((function, v.name), size as u32);
            size += v.size;
            most = most.max(v.align);
            if size > 256 << 10 {
                return Err(PtxError::new(
                    v.line,
                    "static shared memory is larger than 256 KiB",
                ));
            }
        }
        let dynamic: Vec<_> = all
            .iter()
            .filter(|(_, v)| v.external && v.size == 0)
            .collect();
        if let Some(align) = dynamic.iter().map(|(_, v)| v.align).max() {
            most = most.max(align);
            size = size.next_multiple_of(most as u64);
        }
        self.dynamic_shared = size as u32;
        for (function, v) in dynamic {
            self.shared.insert((function, v.name), size as u32);
        }
        Ok((size as u32, most))
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
enum Symbol {
    Reg(Slot, Type),
    Pred(Pred),
    /// Address within a space (absolute for global and constant memory).
    Address(Space, u64),
    Function(u32),
}

#[derive(Default)]
struct Scope<'a> {
    id: u32,
    symbols: HashMap<&'a str, Symbol>,
    counted: Vec<(&'a str, u32, Type)>,
}

/// A branch to be pointed at its label once all labels are known.
struct Fixup<'a> {
    at: usize,
    labels: Vec<&'a str>,
    scopes: Vec<u32>,
    line: u32,
}

/// Decodes the body of one function.
struct Body<'d, 'm, 'a> {
    decoder: &'d Decoder<'m, 'a>,
    function: &'m ast::Function<'a>,
    entry_params: &'d [Param],
    code: Vec<Instr>,
    entry: u32,
    scopes: Vec<Scope<'a>>,
    next_scope: u32,
    slots: u32,
    preds: u32,
    starts: Vec<(Slot, bool, Start)>,
    constants: HashMap<(u64, bool), Slot>,
    specials: HashMap<(Special, bool), Slot>,
    local: u32,
    params: Vec<(u32, u32)>,
    returns: Vec<(u32, u32)>,
    labels: HashMap<(u32, &'a str), u32>,
    targets: HashMap<&'a str, Vec<&'a str>>,
    fixups: Vec<Fixup<'a>>,
    carry: Option<Slot>,
    source: (u32, u32),
}

/// An instruction with the modifiers not yet accounted for.
struct Ins<'i, 'a> {
    i: &'i Instruction<'a>,
    mods: Vec<&'a str>,
    guard: Pred,
    negate: u32,
}

impl<'i, 'a> Ins<'i, 'a> {
    fn take(&mut self, name: &str) -> bool {
        match self.mods.iter().position(|m| *m == name) {
            Some(at) => {
                self.mods.remove(at);
                true
            }
            None => false,
        }
    }

    fn one(&mut self, names: &[&str]) -> Option<&'a str> {
        let at = self.mods.iter().position(|m| names.contains(m))?;
        Some(self.mods.remove(at))
    }

    fn ty(&mut self) -> Result<Type> {
        let at = self.mods.iter().position(|m| Type::from_name(m).is_some());
        match at {
            Some(at) => Ok(Type::from_name(self.mods.remove(at)).unwrap_or(Type::B32)),
            None => self.error("a type is missing"),
        }
    }

    fn round(&mut self) -> Option<super::num::Round> {
        use super::num::Round::*;
        let name = self.one(&["rn", "rz", "rm", "rp"])?;
        Some(match name {
            "rn" => Nearest,
            "rz" => Zero,
            "rm" => Down,
            _ => Up,
        })
    }

    /// Every modifier must have been taken: what is left is not implemented.
    fn done(&self) -> Result<()> {
        match self.mods.first() {
            Some(m) => self.error(format!("modifier .{m} is not implemented")),
            None => Ok(()),
        }
    }

    fn operands<const N: usize>(&self) -> Result<[&'i Operand<'a>; N]> {
        let all: Vec<_> = self.i.operands.iter().collect();
        let n = all.len();
        all.try_into()
            .or_else(|_| self.error(format!("expected {N} operands, found {n}")))
    }

    fn error<T>(&self, message: impl std::fmt::Display) -> Result<T> {
        let mut name = self.i.opcode.to_string();
        for m in &self.i.modifiers {
            name.push('.');
            name.push_str(m);
        }
        Err(PtxError::new(self.i.line, format!("`{name}`: {message}")))
    }

    fn bad_type<T>(&self, ty: Type) -> Result<T> {
        self.error(format!("type .{} is not implemented here", ty.name()))
    }
}

fn wide(ty: Type) -> bool {
    ty.size() == 8
}

impl<'d, 'm, 'a> Body<'d, 'm, 'a> {
    fn new(
        decoder: &'d Decoder<'m, 'a>,
        function: &'m ast::Function<'a>,
        entry_params: &'d [Param],
        code: Vec<Instr>,
    ) -> Result<Self> {
        let entry = code.len() as u32;
        let mut body = Body {
            decoder,
            function,
            entry_params,
            code,
            entry,
            scopes: vec![Scope::default()],
            next_scope: 1,
            // Slots 0 and 1 are the constant zero at either width.
            slots: 2,
            preds: 1,
            starts: vec![(0, true, Start::Bits(0))],
            constants: HashMap::from([((0, false), 0), ((0, true), 0)]),
            specials: HashMap::new(),
            local: 0,
            params: Vec::new(),
            returns: Vec::new(),
            labels: HashMap::new(),
            targets: HashMap::new(),
            fixups: Vec::new(),
            carry: None,
            source: (0, 0),
        };
        if function.entry {
            for (p, at) in function.params.iter().zip(entry_params) {
                let symbol = Symbol::Address(Space::Param, at.offset as u64);
                body.scopes[0].symbols.insert(p.name, symbol);
            }
        } else {
            for v in &function.params {
                let at = body.local_variable(v)?;
                body.params.push(at);
            }
            for v in &function.returns {
                let at = body.local_variable(v)?;
                body.returns.push(at);
            }
        }
        Ok(body)
    }

    /// Gives a variable (or a parameter of a device function) room in the frame's local memory.
    fn local_variable(&mut self, v: &ast::Variable<'a>) -> Result<(u32, u32)> {
        let size = u32::try_from(v.size).unwrap_or(u32::MAX);
        let at = self.local.next_multiple_of(v.align.max(1));
        if size > MAX_LOCAL || at + size > MAX_LOCAL {
            return Err(PtxError::new(
                v.line,
                "local memory is larger than 512 KiB a thread",
            ));
        }
        self.local = at + size;
        // Parameters of device functions are local memory under another name.
        let symbol = Symbol::Address(Space::Local, at as u64);
        self.declare(v.name, symbol);
        Ok((at, size))
    }

    fn declare(&mut self, name: &'a str, symbol: Symbol) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.symbols.insert(name, symbol);
        }
    }

    fn run(&mut self) -> Result<()> {
        let function = self.function;
        for statement in &function.body {
            if self.code.len() > MAX_CODE {
                return Err(PtxError::new(
                    function.line,
                    "more than 4 million instructions",
                ));
            }
            match statement {
                Statement::Open => {
                    self.scopes.push(Scope {
                        id: self.next_scope,
                        ..Scope::default()
                    });
                    self.next_scope += 1;
                }
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Label(name, line) => {
                    let scope = self.scopes.last().map_or(0, |s| s.id);
                    if self
                        .labels
                        .insert((scope, name), self.code.len() as u32)
                        .is_some()
                    {
                        return Err(PtxError::new(*line, format!("label {name} stands twice")));
                    }
                }
                Statement::Reg {
                    ty,
                    name,
                    count,
                    line,
                } => match count {
                    Some(n) => {
                        if let Some(scope) = self.scopes.last_mut() {
                            scope.counted.push((name, *n, *ty));
                        }
                    }
                    None => {
                        let symbol = self.new_register(*ty, *line)?;
                        self.declare(name, symbol);
                    }
                },
                Statement::Variable(v) => match v.space {
                    Space::Local | Space::Param => {
                        self.local_variable(v)?;
                    }
                    Space::Shared => {
                        if let Some(at) = self.decoder.shared.get(&(function.name, v.name)) {
                            self.declare(v.name, Symbol::Address(Space::Shared, *at as u64));
                        }
                    }
                    _ => {
                        let message =
                            "global and constant variables in functions are not implemented";
                        return Err(PtxError::new(v.line, message));
                    }
                },
                Statement::Targets(name, labels, _) => {
                    self.targets.insert(name, labels.clone());
                }
                Statement::Loc(file, line) => self.source = (*file, *line),
                Statement::Instruction(i) => self.instruction(i)?,
            }
        }
        // Running off the end of a body returns.
        let end = Instruction {
            guard: None,
            opcode: "ret",
            modifiers: Vec::new(),
            operands: Vec::new(),
            line: function.line,
        };
        self.instruction(&end)
    }

    fn finish(mut self) -> Result<(Function, Vec<Instr>)> {
        for fixup in std::mem::take(&mut self.fixups) {
            let mut found = Vec::new();
            for label in &fixup.labels {
                let target = fixup
                    .scopes
                    .iter()
                    .rev()
                    .find_map(|s| self.labels.get(&(*s, *label)));
                match target {
                    Some(t) => found.push(*t),
                    None => {
                        let message = format!("label {label} is not in this function");
                        return Err(PtxError::new(fixup.line, message));
                    }
                }
            }
            match &mut self.code[fixup.at].op {
                Op::Branch { target } => *target = found[0],
                Op::BranchTable { targets, .. } => *targets = found.into(),
                _ => {}
            }
        }
        let function = Function {
            name: self.function.name.to_string(),
            entry: self.entry,
            slots: self.slots,
            preds: self.preds,
            starts: self.starts,
            local: self.local.next_multiple_of(16),
            params: self.params,
            returns: self.returns,
        };
        Ok((function, self.code))
    }

    fn instruction(&mut self, i: &Instruction<'a>) -> Result<()> {
        let (guard, negated) = match i.guard {
            None => (0, false),
            Some((name, negated)) => match self.lookup(name, i.line)? {
                Symbol::Pred(p) => (p, negated),
                _ => {
                    return Err(PtxError::new(
                        i.line,
                        format!("guard {name} is not a predicate"),
                    ));
                }
            },
        };
        let negate = if negated { !0 } else { 0 };
        let mut ins = Ins {
            i,
            mods: i.modifiers.clone(),
            guard,
            negate,
        };
        let ins = &mut ins;
        match i.opcode {
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "abs" | "neg" | "min"
            | "max" | "sad" | "mul24" | "mad24" | "addc" | "subc" | "madc" => self.arithmetic(ins),
            "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "popc"
            | "clz" | "bfind" | "brev" | "bfe" | "bfi" | "bmsk" | "szext" | "prmt" | "fns"
            | "dp4a" | "dp2a" => self.bits(ins),
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
                self.function1(ins)
            }
            "copysign" | "testp" => self.float_misc(ins),
            "setp" | "set" | "selp" | "slct" => self.compare(ins),
            "mov" | "cvt" | "cvta" | "isspacep" => self.convert(ins),
            "ld" | "ldu" | "st" | "atom" | "red" | "prefetch" | "prefetchu" | "cp" | "ldmatrix"
            | "stmatrix" | "movmatrix" | "discard" | "applypriority" | "createpolicy" => {
                self.memory(ins)
            }
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" | "nanosleep"
            | "griddepcontrol" => self.control(ins),
            "bar" | "barrier" | "membar" | "fence" | "shfl" | "vote" | "match" | "activemask"
            | "redux" | "elect" | "mma" => self.warp(ins),
            _ => ins.error("this instruction is not implemented"),
        }
    }

    fn emit(&mut self, ins: &Ins<'_, 'a>, class: Class, op: Op) {
        self.emit_flops(ins, class, 0, op);
    }

    fn emit_flops(&mut self, ins: &Ins<'_, 'a>, class: Class, flops: u8, op: Op) {
        self.code.push(Instr {
            op,
            guard: ins.guard,
            negate: ins.negate,
            class,
            flops,
            line: ins.i.line,
            source: self.source,
        });
    }

    fn alu(
        &mut self,
        ins: &Ins<'_, 'a>,
        class: Class,
        f: super::lanes::AluFn,
        d: Slot,
        s: [Slot; 3],
    ) {
        self.emit(
            ins,
            class,
            Op::Alu {
                f,
                d,
                a: s[0],
                b: s[1],
                c: s[2],
            },
        );
    }

    fn scope_ids(&self) -> Vec<u32> {
        self.scopes.iter().map(|s| s.id).collect()
    }

    fn new_slot(&mut self, wide: bool) -> Slot {
        let slot = self.slots;
        self.slots += 1 + wide as u32;
        slot
    }

    fn new_register(&mut self, ty: Type, line: u32) -> Result<Symbol> {
        match ty {
            Type::Pred => {
                self.preds += 1;
                Ok(Symbol::Pred(self.preds - 1))
            }
            Type::B128 => Err(PtxError::new(line, "128-bit registers are not implemented")),
            _ => Ok(Symbol::Reg(self.new_slot(wide(ty)), ty)),
        }
    }

    fn lookup(&mut self, name: &'a str, line: u32) -> Result<Symbol> {
        for at in (0..self.scopes.len()).rev() {
            if let Some(symbol) = self.scopes[at].symbols.get(name) {
                return Ok(*symbol);
            }
            let digits = name.len() - name.bytes().rev().take_while(u8::is_ascii_digit).count();
            // `%r12` may be prefix `%r` and 12, or, with a prefix that ends in digits, `%r1` and 2.
            for split in digits..name.len() {
                let (prefix, number) = name.split_at(split);
                if number.len() > 1 && number.starts_with('0') {
                    continue;
                }
                let counted = self.scopes[at].counted.iter().find(|c| c.0 == prefix);
                let Some(&(_, count, ty)) = counted else {
                    continue;
                };
                if number.parse::<u32>().is_ok_and(|n| n < count) {
                    let symbol = self.new_register(ty, line)?;
                    self.scopes[at].symbols.insert(name, symbol);
                    return Ok(symbol);
                }
            }
        }
        let decoder = self.decoder;
        if let Some(at) = decoder.shared.get(&("", name)) {
            return Ok(Symbol::Address(Space::Shared, *at as u64));
        }
        if let Some(address) = decoder.globals.get(name) {
            return Ok(Symbol::Address(Space::Global, *address));
        }
        if let Some(index) = decoder.index.get(name) {
            return Ok(Symbol::Function(*index));
        }
        Err(PtxError::new(line, format!("{name} is not declared")))
    }

    /// A register that holds the constant.
    fn constant(&mut self, bits: u64, wide: bool) -> Slot {
        if let Some(slot) = self.constants.get(&(bits, wide)) {
            return *slot;
        }
        let slot = self.new_slot(wide);
        self.starts.push((slot, wide, Start::Bits(bits)));
        self.constants.insert((bits, wide), slot);
        slot
    }

    fn special(&mut self, special: Special, wide: bool) -> Slot {
        if let Some(slot) = self.specials.get(&(special, wide)) {
            return *slot;
        }
        let slot = self.new_slot(wide);
        self.starts.push((slot, wide, Start::Special(special)));
        self.specials.insert((special, wide), slot);
        slot
    }

    fn address_constant(&mut self, space: Space, at: u64, wide: bool) -> Slot {
        if space != Space::Local {
            return self.constant(at, wide);
        }
        let slot = self.new_slot(wide);
        self.starts.push((slot, wide, Start::Local(at as u32)));
        slot
    }

    /// A source operand of the given type.
    fn src(&mut self, ins: &Ins<'_, 'a>, operand: &Operand<'a>, ty: Type) -> Result<Slot> {
        let mask = match ty.size() {
            1 => 0xff,
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let is_wide = wide(ty);
        match operand {
            Operand::Int(v) if !ty.float() => {
                // A negative or unsigned constant must be one that the type can hold.
                let extended = *v as i64;
                let bits = 8 * ty.size();
                let fits =
                    bits == 64 || *v <= mask || extended >= -(1i64 << (bits - 1)) && extended < 0;
                if !fits {
                    return ins.error(format!("constant {v} does not fit .{}", ty.name()));
                }
                Ok(self.constant(v & mask, is_wide))
            }
            Operand::F32(bits) if matches!(ty, Type::F32 | Type::B32 | Type::Tf32) => {
                Ok(self.constant(*bits as u64, false))
            }
            Operand::F64(bits) if matches!(ty, Type::F64 | Type::B64) => {
                Ok(self.constant(*bits, true))
            }
            Operand::F64(bits) if ty == Type::F32 => {
                Ok(self.constant((f64::from_bits(*bits) as f32).to_bits() as u64, false))
            }
            Operand::F32(bits) if ty == Type::F64 => {
                Ok(self.constant((f32::from_bits(*bits) as f64).to_bits(), true))
            }
            Operand::Decimal(v) if ty == Type::F64 => Ok(self.constant(v.to_bits(), true)),
            Operand::Decimal(v) if ty == Type::F32 => {
                Ok(self.constant((*v as f32).to_bits() as u64, false))
            }
            Operand::Name("WARP_SZ", None) => Ok(self.constant(32, is_wide)),
            Operand::Name(name, part) => {
                if let Some(special) = special_register(name, *part) {
                    return Ok(self.special(special, is_wide));
                }
                if part.is_some() {
                    return ins.error(format!(
                        "operand {name} with a component is not implemented"
                    ));
                }
                match self.lookup(name, ins.i.line)? {
                    Symbol::Reg(slot, have)
                        if wide(have) == is_wide && have.size() >= ty.size() =>
                    {
                        Ok(slot)
                    }
                    Symbol::Reg(_, have) => ins.error(format!(
                        "register {name} is .{}, the instruction wants .{}",
                        have.name(),
                        ty.name()
                    )),
                    _ => ins.error(format!("{name} is not a register")),
                }
            }
            other => ins.error(format!(
                "operand {other:?} is not implemented for .{}",
                ty.name()
            )),
        }
    }

    /// A destination register of the given type.
    fn dst(&mut self, ins: &Ins<'_, 'a>, operand: &Operand<'a>, ty: Type) -> Result<Slot> {
        match operand {
            Operand::Name("_", None) => Ok(self.new_slot(wide(ty))),
            Operand::Name(name, None) => match self.lookup(name, ins.i.line)? {
                Symbol::Reg(slot, have) if wide(have) == wide(ty) && have.size() >= ty.size() => {
                    Ok(slot)
                }
                Symbol::Reg(_, have) => ins.error(format!(
                    "register {name} is .{}, the instruction gives .{}",
                    have.name(),
                    ty.name()
                )),
                _ => ins.error(format!("{name} is not a register")),
            },
            other => ins.error(format!("destination {other:?} is not implemented")),
        }
    }

    /// A register whatever its width; with its declared type.
    fn any_register(&mut self, ins: &Ins<'_, 'a>, operand: &Operand<'a>) -> Result<(Slot, Type)> {
        match operand {
            Operand::Name(name, None) => match self.lookup(name, ins.i.line)? {
                Symbol::Reg(slot, ty) => Ok((slot, ty)),
                _ => ins.error(format!("{name} is not a register")),
            },
            other => ins.error(format!("operand {other:?} is not a register")),
        }
    }

    fn pred_dst(&mut self, ins: &Ins<'_, 'a>, name: &'a str) -> Result<Pred> {
        if name == "_" {
            self.preds += 1;
            return Ok(self.preds - 1);
        }
        match self.lookup(name, ins.i.line)? {
            Symbol::Pred(p) => Ok(p),
            _ => ins.error(format!("{name} is not a predicate")),
        }
    }

    /// A predicate source and whether it is negated. Constants are the true predicate.
    fn pred_src(&mut self, ins: &Ins<'_, 'a>, operand: &Operand<'a>) -> Result<(Pred, bool)> {
        let (name, negated) = match operand {
            Operand::Name(name, None) => (*name, false),
            Operand::Not(name) => (*name, true),
            Operand::Int(v) => return Ok((0, *v == 0)),
            other => return ins.error(format!("operand {other:?} is not a predicate")),
        };
        match self.lookup(name, ins.i.line)? {
            Symbol::Pred(p) => Ok((p, negated)),
            _ => ins.error(format!("{name} is not a predicate")),
        }
    }

    fn srcs<const N: usize>(
        &mut self,
        ins: &Ins<'_, 'a>,
        operands: [&Operand<'a>; N],
        ty: Type,
    ) -> Result<[Slot; N]> {
        let mut out = [0; N];
        for (slot, operand) in out.iter_mut().zip(operands) {
            *slot = self.src(ins, operand, ty)?;
        }
        Ok(out)
    }
}

fn special_register(name: &str, part: Option<&str>) -> Option<Special> {
    let axis = match part {
        Some("x") => 0,
        Some("y") => 1,
        Some("z") => 2,
        Some(_) => return None,
        None => 3,
    };
    let vector = match name {
        "%tid" => Some(Special::Tid as fn(u8) -> Special),
        "%ntid" => Some(Special::Ntid as fn(u8) -> Special),
        "%ctaid" => Some(Special::Ctaid as fn(u8) -> Special),
        "%nctaid" => Some(Special::Nctaid as fn(u8) -> Special),
        _ => None,
    };
    if let Some(make) = vector {
        return (axis < 3).then(|| make(axis));
    }
    if axis < 3 {
        return None;
    }
    Some(match name {
        "%laneid" => Special::Laneid,
        "%warpid" => Special::Warpid,
        "%nwarpid" => Special::Nwarpid,
        "%smid" => Special::Smid,
        "%nsmid" => Special::Nsmid,
        "%gridid" => Special::Gridid,
        "%lanemask_eq" => Special::LanemaskEq,
        "%lanemask_le" => Special::LanemaskLe,
        "%lanemask_lt" => Special::LanemaskLt,
        "%lanemask_ge" => Special::LanemaskGe,
        "%lanemask_gt" => Special::LanemaskGt,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        _ => return None,
    })
}
