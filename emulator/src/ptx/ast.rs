//! What a PTX module says, before it is decoded for the machine.

use super::types::Type;

/// A state space of PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// No space named: the generic address space.
    Generic,
    /// Device memory.
    Global,
    /// Memory of a block.
    Shared,
    /// Memory of a thread.
    Local,
    /// Kernel or function parameters.
    Param,
    /// Constant bank.
    Const,
}

/// A whole module.
#[derive(Clone, Debug, Default)]
pub struct Module<'a> {
    /// PTX ISA version, (major, minor).
    pub version: (u32, u32),
    /// `.target`, such as `sm_80`.
    pub target: &'a str,
    /// `.file` table: number and path.
    pub files: Vec<(u32, &'a str)>,
    /// Variables at module scope.
    pub variables: Vec<Variable<'a>>,
    /// Functions and kernels, prototypes left out.
    pub functions: Vec<Function<'a>>,
}

/// A declared variable or parameter.
#[derive(Clone, Debug)]
pub struct Variable<'a> {
    /// Its state space.
    pub space: Space,
    /// Alignment in bytes.
    pub align: u32,
    /// Element type.
    pub ty: Type,
    /// Name.
    pub name: &'a str,
    /// Size in bytes; 0 for `extern` arrays without one.
    pub size: u64,
    /// Declared `.extern`.
    pub external: bool,
    /// Initial values of the first elements.
    pub init: Vec<Init<'a>>,
    /// Line of the declaration.
    pub line: u32,
}

/// One element of an initialiser.
#[derive(Clone, Debug)]
pub enum Init<'a> {
    /// Bits of the element.
    Bits(u64),
    /// Address of a symbol plus an offset.
    Symbol(&'a str, i64),
}

/// A function or kernel with its body.
#[derive(Clone, Debug)]
pub struct Function<'a> {
    /// Name.
    pub name: &'a str,
    /// A kernel (`.entry`) rather than a device function.
    pub entry: bool,
    /// Returned parameters.
    pub returns: Vec<Variable<'a>>,
    /// Parameters.
    pub params: Vec<Variable<'a>>,
    /// `.maxntid` or `.reqntid`: the most threads a block may have, 0 if not said.
    pub max_threads: u32,
    /// Body, in order.
    pub body: Vec<Statement<'a>>,
    /// Line of the header.
    pub line: u32,
}

/// One statement of a body.
#[derive(Clone, Debug)]
pub enum Statement<'a> {
    /// `{`: names declared from here are local to the scope.
    Open,
    /// `}`.
    Close,
    /// A label.
    Label(&'a str, u32),
    /// `.reg`: type, name, and how many for `name<count>`.
    Reg {
        /// Type.
        ty: Type,
        /// Name, or prefix if counted.
        name: &'a str,
        /// Number of registers `name0 ..`, if counted.
        count: Option<u32>,
        /// Line.
        line: u32,
    },
    /// A variable in shared, local or parameter space.
    Variable(Variable<'a>),
    /// `name: .branchtargets a, b;`
    Targets(&'a str, Vec<&'a str>, u32),
    /// `.loc`: file number and line of the instructions that follow.
    Loc(u32, u32),
    /// An instruction.
    Instruction(Instruction<'a>),
}

/// An instruction.
#[derive(Clone, Debug)]
pub struct Instruction<'a> {
    /// `@p` or `@!p`: register and whether negated.
    pub guard: Option<(&'a str, bool)>,
    /// Opcode without modifiers.
    pub opcode: &'a str,
    /// Modifiers in order, without dots.
    pub modifiers: Vec<&'a str>,
    /// Operands in order.
    pub operands: Vec<Operand<'a>>,
    /// Line in the PTX text.
    pub line: u32,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'a> {
    /// Register, label, symbol or `_`, with an optional component (`%tid.x`).
    Name(&'a str, Option<&'a str>),
    /// Symbol plus constant.
    NameOffset(&'a str, i64),
    /// `!p`.
    Not(&'a str),
    /// An integer literal, two's complement.
    Int(u64),
    /// A decimal literal.
    Decimal(f64),
    /// Bits of an f32.
    F32(u32),
    /// Bits of an f64.
    F64(u64),
    /// `{a, b}`.
    Vector(Vec<Operand<'a>>),
    /// `p|q`.
    Pair(&'a str, &'a str),
    /// `[base+offset]`; the base is a name or absent.
    Address(Option<&'a str>, i64),
    /// `(a, b)` of a call.
    List(Vec<Operand<'a>>),
}
