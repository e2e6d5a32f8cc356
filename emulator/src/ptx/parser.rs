//! Tokens to syntax tree.

use super::PtxError;
use super::ast::*;
use super::lexer::{Spanned, Token, tokens};
use super::types::Type;

/// Braces and vectors deeper than this are refused rather than recursed into.
const MAX_DEPTH: u32 = 64;

/// Parses the text of a PTX module.
pub fn parse(text: &str) -> Result<Module<'_>, PtxError> {
    let tokens = tokens(text)?;
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
    };
    parser.module()
}

struct Parser<'t, 'a> {
    tokens: &'t [Spanned<'a>],
    at: usize,
}

type Result<T, E = PtxError> = std::result::Result<T, E>;

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|t| t.token)
    }

    fn peek2(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at + 1).map(|t| t.token)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(1, |t| t.line)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(PtxError::new(self.line(), message))
    }

    fn unexpected<T>(&self, wanted: &str) -> Result<T> {
        match self.peek() {
            Some(token) => self.error(format!("expected {wanted}, found {token:?}")),
            None => self.error(format!("expected {wanted}, found the end of the text")),
        }
    }

    fn is(&self, c: u8) -> bool {
        self.peek() == Some(Token::Punct(c))
    }

    fn eat(&mut self, c: u8) -> bool {
        let found = self.is(c);
        self.at += found as usize;
        found
    }

    fn expect(&mut self, c: u8) -> Result<()> {
        if self.eat(c) {
            Ok(())
        } else {
            self.unexpected(&format!("`{}`", c as char))
        }
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Some(Token::Word(w)) => {
                self.at += 1;
                Ok(w)
            }
            _ => self.unexpected("a name"),
        }
    }

    fn int(&mut self) -> Result<u64> {
        let negative = self.eat(b'-');
        match self.peek() {
            Some(Token::Int(v)) => {
                self.at += 1;
                Ok(if negative { v.wrapping_neg() } else { v })
            }
            _ => self.unexpected("an integer"),
        }
    }

    fn int32(&mut self) -> Result<u32> {
        let v = self.int()?;
        u32::try_from(v).or_else(|_| self.error(format!("{v} is too large here")))
    }

    fn module(&mut self) -> Result<Module<'a>> {
        let mut module = Module::default();
        let mut external = false;
        while let Some(token) = self.peek() {
            let Token::Dot(name) = token else {
                return self.unexpected("a directive");
            };
            match name {
                "version" => {
                    self.at += 1;
                    module.version = self.version()?;
                }
                "target" => {
                    self.at += 1;
                    module.target = self.word()?;
                    while self.eat(b',') {
                        self.word()?;
                    }
                }
                "address_size" => {
                    self.at += 1;
                    let bits = self.int()?;
                    if bits != 64 {
                        return self.error(format!("address size {bits}: only 64 is implemented"));
                    }
                }
                "file" => {
                    self.at += 1;
                    let number = self.int32()?;
                    let Some(Token::Str(path)) = self.peek() else {
                        return self.unexpected("a path");
                    };
                    self.at += 1;
                    while self.eat(b',') {
                        self.int()?;
                    }
                    module.files.push((number, path));
                }
                "section" => self.skip_section()?,
                "pragma" => self.pragma()?,
                "visible" | "weak" | "common" => self.at += 1,
                "extern" => {
                    self.at += 1;
                    external = true;
                    continue;
                }
                "entry" | "func" => {
                    if let Some(function) = self.function()? {
                        if external {
                            return self.error("an extern function cannot have a body");
                        }
                        module.functions.push(function);
                    }
                }
                "global" | "const" | "shared" => {
                    let space = self.space()?;
                    let mut variable = self.variable(space)?;
                    loop {
                        variable.external = external;
                        let (align, ty) = (variable.align, variable.ty);
                        module.variables.push(variable);
                        if !self.eat(b',') {
                            break;
                        }
                        variable = self.declarator(space, align, ty)?;
                    }
                    self.expect(b';')?;
                }
                "loc" => {
                    self.at += 1;
                    self.loc()?;
                }
                other => {
                    return self.error(format!("directive .{other} is not implemented"));
                }
            }
            external = false;
        }
        if module.version == (0, 0) {
            return self.error("no .version directive: is this PTX text?");
        }
        Ok(module)
    }

    fn version(&mut self) -> Result<(u32, u32)> {
        match self.peek() {
            Some(Token::Decimal(v)) if (1.0..100.0).contains(&v) => {
                self.at += 1;
                let tenths = (v * 10.0).round() as u32;
                Ok((tenths / 10, tenths % 10))
            }
            _ => self.unexpected("a version such as 8.0"),
        }
    }

    fn skip_section(&mut self) -> Result<()> {
        while self.peek().is_some() && !self.is(b'{') {
            self.at += 1;
        }
        self.expect(b'{')?;
        while self.peek().is_some() && !self.is(b'}') {
            self.at += 1;
        }
        self.expect(b'}')
    }

    fn pragma(&mut self) -> Result<()> {
        self.at += 1;
        loop {
            match self.peek() {
                Some(Token::Str(_)) => self.at += 1,
                _ => return self.unexpected("a string"),
            }
            if !self.eat(b',') {
                return self.expect(b';');
            }
        }
    }

    fn space(&mut self) -> Result<Space> {
        let space = match self.peek() {
            Some(Token::Dot("global")) => Space::Global,
            Some(Token::Dot("const")) => Space::Const,
            Some(Token::Dot("shared")) => Space::Shared,
            Some(Token::Dot("local")) => Space::Local,
            Some(Token::Dot("param")) => Space::Param,
            _ => return self.unexpected("a state space"),
        };
        self.at += 1;
        Ok(space)
    }

    /// From after the space to the end of the first declarator.
    fn variable(&mut self, space: Space) -> Result<Variable<'a>> {
        let mut align = 0;
        let mut vector = 1;
        loop {
            let Some(Token::Dot(name)) = self.peek() else {
                return self.unexpected("a type");
            };
            self.at += 1;
            match name {
                "align" => align = self.int32()?,
                "v2" => vector = 2,
                "v4" => vector = 4,
                // `.ptr .global .align 16` describes what a parameter points to.
                "ptr" => {
                    if matches!(
                        self.peek(),
                        Some(Token::Dot("global" | "shared" | "const" | "local"))
                    ) {
                        self.at += 1;
                    }
                    if self.peek() == Some(Token::Dot("align")) {
                        self.at += 1;
                        self.int()?;
                    }
                    let ty = Type::U64;
                    return self.declarator(space, 8, ty);
                }
                other => {
                    let Some(ty) = Type::from_name(other) else {
                        return self.error(format!(".{other} is not implemented in a declaration"));
                    };
                    if let Some(Token::Dot("ptr")) = self.peek() {
                        continue;
                    }
                    let natural = ty.size() * vector;
                    let align = if align == 0 { natural } else { align };
                    if !align.is_power_of_two() || align > 1 << 16 {
                        return self.error(format!("alignment {align} is not a power of two"));
                    }
                    let mut variable = self.declarator(space, align, ty)?;
                    variable.size *= vector as u64;
                    return Ok(variable);
                }
            }
        }
    }

    fn declarator(&mut self, space: Space, align: u32, ty: Type) -> Result<Variable<'a>> {
        let line = self.line();
        let name = self.word()?;
        let mut size = ty.size() as u64;
        let mut unsized_array = false;
        while self.eat(b'[') {
            if self.eat(b']') {
                unsized_array = true;
                continue;
            }
            let n = self.int()?;
            self.expect(b']')?;
            size = match size.checked_mul(n) {
                Some(size) if size <= 1 << 36 => size,
                _ => return self.error(format!("{name} is too large")),
            };
        }
        let mut init = Vec::new();
        if self.eat(b'=') {
            self.initialiser(ty, &mut init, 0)?;
        }
        if unsized_array {
            size *= init.len() as u64;
        }
        if init.len() as u64 * ty.size() as u64 > size {
            return self.error(format!("{name} has more initial values than elements"));
        }
        Ok(Variable {
            space,
            align,
            ty,
            name,
            size,
            external: false,
            init,
            line,
        })
    }

    fn initialiser(&mut self, ty: Type, out: &mut Vec<Init<'a>>, depth: u32) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.error("initialiser is nested too deeply");
        }
        if self.eat(b'{') {
            loop {
                self.initialiser(ty, out, depth + 1)?;
                if !self.eat(b',') {
                    return self.expect(b'}');
                }
            }
        }
        let init = match self.peek() {
            Some(Token::Word("generic")) => {
                self.at += 1;
                self.expect(b'(')?;
                let name = self.word()?;
                self.expect(b')')?;
                Init::Symbol(name, self.plus()?)
            }
            Some(Token::Word(name)) => {
                self.at += 1;
                Init::Symbol(name, self.plus()?)
            }
            Some(Token::F32(bits)) if ty == Type::F32 || ty == Type::B32 => {
                self.at += 1;
                Init::Bits(bits as u64)
            }
            Some(Token::F64(bits)) if ty == Type::F64 || ty == Type::B64 => {
                self.at += 1;
                Init::Bits(bits)
            }
            Some(Token::Int(_) | Token::Punct(b'-')) if !ty.float() => Init::Bits(self.int()?),
            _ => return self.unexpected("an initial value"),
        };
        out.push(init);
        Ok(())
    }

    /// An optional `+ constant` or `- constant`.
    fn plus(&mut self) -> Result<i64> {
        // The minus is the integer's own.
        if self.eat(b'+') || self.is(b'-') {
            Ok(self.int()? as i64)
        } else {
            Ok(0)
        }
    }

    fn params(&mut self) -> Result<Vec<Variable<'a>>> {
        let mut out = Vec::new();
        self.expect(b'(')?;
        if self.eat(b')') {
            return Ok(out);
        }
        loop {
            match self.peek() {
                Some(Token::Dot("param")) => self.at += 1,
                Some(Token::Dot("reg")) => {
                    return self.error("parameters in registers are not implemented");
                }
                _ => return self.unexpected("a parameter"),
            }
            out.push(self.variable(Space::Param)?);
            if !self.eat(b',') {
                self.expect(b')')?;
                return Ok(out);
            }
        }
    }

    fn function(&mut self) -> Result<Option<Function<'a>>> {
        let line = self.line();
        let entry = self.peek() == Some(Token::Dot("entry"));
        self.at += 1;
        let returns = if !entry && self.is(b'(') {
            self.params()?
        } else {
            Vec::new()
        };
        let name = self.word()?;
        let params = if self.is(b'(') {
            self.params()?
        } else {
            Vec::new()
        };
        let mut max_threads = 0;
        loop {
            match self.peek() {
                Some(Token::Dot("maxntid" | "reqntid")) => {
                    self.at += 1;
                    let mut product = self.int32()?;
                    while self.eat(b',') {
                        product = product.saturating_mul(self.int32()?);
                    }
                    max_threads = product;
                }
                Some(Token::Dot("minnctapersm" | "maxnctapersm" | "maxnreg")) => {
                    self.at += 1;
                    self.int()?;
                }
                Some(Token::Dot("noreturn")) => self.at += 1,
                Some(Token::Dot("pragma")) => self.pragma()?,
                Some(Token::Dot(other)) => {
                    return self.error(format!("directive .{other} is not implemented"));
                }
                Some(Token::Punct(b';')) => {
                    self.at += 1;
                    return Ok(None);
                }
                _ => break,
            }
        }
        self.expect(b'{')?;
        let body = self.body()?;
        Ok(Some(Function {
            name,
            entry,
            returns,
            params,
            max_threads,
            body,
            line,
        }))
    }

    fn body(&mut self) -> Result<Vec<Statement<'a>>> {
        let mut out = Vec::new();
        let mut depth = 0;
        loop {
            let line = self.line();
            match self.peek() {
                None => return self.error("function body is not closed"),
                Some(Token::Punct(b'{')) => {
                    self.at += 1;
                    depth += 1;
                    out.push(Statement::Open);
                }
                Some(Token::Punct(b'}')) => {
                    self.at += 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    depth -= 1;
                    out.push(Statement::Close);
                }
                Some(Token::Punct(b';')) => self.at += 1,
                Some(Token::Dot("reg")) => self.registers(&mut out)?,
                Some(Token::Dot("loc")) => {
                    self.at += 1;
                    let (file, line) = self.loc()?;
                    out.push(Statement::Loc(file, line));
                }
                Some(Token::Dot("pragma")) => self.pragma()?,
                Some(Token::Dot("shared" | "local" | "param" | "global" | "const")) => {
                    let space = self.space()?;
                    let mut variable = self.variable(space)?;
                    loop {
                        let (align, ty) = (variable.align, variable.ty);
                        out.push(Statement::Variable(variable));
                        if !self.eat(b',') {
                            break;
                        }
                        variable = self.declarator(space, align, ty)?;
                    }
                    self.expect(b';')?;
                }
                Some(Token::Dot(other)) => {
                    return self.error(format!("directive .{other} is not implemented"));
                }
                Some(Token::Word(name)) if self.peek2() == Some(Token::Punct(b':')) => {
                    self.at += 2;
                    match self.peek() {
                        Some(Token::Dot("branchtargets")) => {
                            self.at += 1;
                            let mut targets = vec![self.word()?];
                            while self.eat(b',') {
                                targets.push(self.word()?);
                            }
                            self.expect(b';')?;
                            out.push(Statement::Targets(name, targets, line));
                        }
                        // The prototype of an indirect call says nothing that the callee does not.
                        Some(Token::Dot("callprototype")) => {
                            while self.peek().is_some() && !self.is(b';') {
                                self.at += 1;
                            }
                            self.expect(b';')?;
                        }
                        _ => out.push(Statement::Label(name, line)),
                    }
                }
                _ => out.push(Statement::Instruction(self.instruction()?)),
            }
        }
    }

    fn registers(&mut self, out: &mut Vec<Statement<'a>>) -> Result<()> {
        self.at += 1;
        let ty = match self.peek() {
            Some(Token::Dot(name)) => match Type::from_name(name) {
                Some(ty) => ty,
                None => return self.error(format!("registers of .{name} are not implemented")),
            },
            _ => return self.unexpected("a type"),
        };
        self.at += 1;
        loop {
            let line = self.line();
            let name = self.word()?;
            let mut count = None;
            if self.eat(b'<') {
                let n = self.int32()?;
                if n > 1 << 20 {
                    return self.error(format!("{n} registers are too many"));
                }
                count = Some(n);
                self.expect(b'>')?;
            }
            out.push(Statement::Reg {
                ty,
                name,
                count,
                line,
            });
            if !self.eat(b',') {
                return self.expect(b';');
            }
        }
    }

    fn loc(&mut self) -> Result<(u32, u32)> {
        let file = self.int32()?;
        let line = self.int32()?;
        self.int()?;
        // `, function_name $L+4, inlined_at 1 22 7`: the innermost position is what is reported.
        while self.eat(b',') {
            match self.word()? {
                "function_name" => {
                    self.word()?;
                    self.plus()?;
                }
                "inlined_at" => {
                    self.int()?;
                    self.int()?;
                    self.int()?;
                }
                other => return self.error(format!("`{other}` is not implemented in .loc")),
            }
        }
        Ok((file, line))
    }

    fn instruction(&mut self) -> Result<Instruction<'a>> {
        let mut guard = None;
        if self.eat(b'@') {
            let negated = self.eat(b'!');
            guard = Some((self.word()?, negated));
        }
        let line = self.line();
        let opcode = self.word()?;
        let mut modifiers = Vec::new();
        while let Some(Token::Dot(name)) = self.peek() {
            modifiers.push(name);
            self.at += 1;
        }
        let mut operands = Vec::new();
        if !self.eat(b';') {
            loop {
                operands.push(self.operand(0)?);
                if !self.eat(b',') {
                    break;
                }
            }
            self.expect(b';')?;
        }
        Ok(Instruction {
            guard,
            opcode,
            modifiers,
            operands,
            line,
        })
    }

    fn operands_to(&mut self, close: u8, depth: u32) -> Result<Vec<Operand<'a>>> {
        let mut out = Vec::new();
        if self.eat(close) {
            return Ok(out);
        }
        loop {
            out.push(self.operand(depth + 1)?);
            if !self.eat(b',') {
                self.expect(close)?;
                return Ok(out);
            }
        }
    }

    fn operand(&mut self, depth: u32) -> Result<Operand<'a>> {
        if depth > MAX_DEPTH {
            return self.error("operand is nested too deeply");
        }
        match self.peek() {
            Some(Token::Punct(b'{')) => {
                self.at += 1;
                Ok(Operand::Vector(self.operands_to(b'}', depth)?))
            }
            Some(Token::Punct(b'(')) => {
                self.at += 1;
                Ok(Operand::List(self.operands_to(b')', depth)?))
            }
            Some(Token::Punct(b'[')) => {
                self.at += 1;
                self.address()
            }
            Some(Token::Punct(b'!')) => {
                self.at += 1;
                Ok(Operand::Not(self.word()?))
            }
            Some(Token::Int(_) | Token::Punct(b'-')) => {
                if let Some(Token::Decimal(v)) = self.peek2() {
                    self.at += 2;
                    return Ok(Operand::Decimal(-v));
                }
                Ok(Operand::Int(self.int()?))
            }
            Some(Token::Decimal(v)) => {
                self.at += 1;
                Ok(Operand::Decimal(v))
            }
            Some(Token::F32(bits)) => {
                self.at += 1;
                Ok(Operand::F32(bits))
            }
            Some(Token::F64(bits)) => {
                self.at += 1;
                Ok(Operand::F64(bits))
            }
            Some(Token::Word(name)) => {
                self.at += 1;
                match self.peek() {
                    Some(Token::Dot(part)) => {
                        self.at += 1;
                        Ok(Operand::Name(name, Some(part)))
                    }
                    Some(Token::Punct(b'|')) => {
                        self.at += 1;
                        Ok(Operand::Pair(name, self.word()?))
                    }
                    Some(Token::Punct(b'+' | b'-')) => Ok(Operand::NameOffset(name, self.plus()?)),
                    _ => Ok(Operand::Name(name, None)),
                }
            }
            _ => self.unexpected("an operand"),
        }
    }

    fn address(&mut self) -> Result<Operand<'a>> {
        let address = match self.peek() {
            Some(Token::Word(name)) => {
                self.at += 1;
                Operand::Address(Some(name), self.plus()?)
            }
            Some(Token::Int(_)) => Operand::Address(None, self.int()? as i64),
            _ => return self.unexpected("an address"),
        };
        self.expect(b']')?;
        Ok(address)
    }
}
