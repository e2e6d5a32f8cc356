//! The compact form that the machine executes.

use super::lanes::{AluFn, CmpFn};
use super::num::Round;
use crate::ptx::Type;
use crate::ptx::ast::Space;
use serde::{Deserialize, Serialize};

/// Index of a register within a frame.
pub type Slot = u32;
/// Index of a predicate within a frame; predicate 0 is always true.
pub type Pred = u32;

/// What an instruction is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Integer arithmetic and logic.
    Integer,
    /// f32 arithmetic.
    Single,
    /// f16 and bf16 arithmetic.
    Half,
    /// f64 arithmetic.
    Double,
    /// Approximate functions.
    Special,
    /// Conversions.
    Convert,
    /// Moves and selections.
    Move,
    /// Comparisons and predicate logic.
    Compare,
    /// Branches, calls, exits.
    Control,
    /// Parameter and constant loads.
    Parameter,
    /// Global loads and stores, prefetches.
    Global,
    /// Shared loads and stores, matrix loads and stores.
    Shared,
    /// Local loads and stores.
    Local,
    /// Atomics and reductions in memory.
    Atomic,
    /// Barriers, fences and warp synchronisation.
    Barrier,
    /// Shuffles, votes and matches.
    Collective,
    /// Matrix multiply-adds.
    Matrix,
    /// Asynchronous copies.
    Async,
}

/// All classes, in the order of reports.
pub const CLASSES: [Class; 18] = [
    Class::Integer,
    Class::Single,
    Class::Half,
    Class::Double,
    Class::Special,
    Class::Convert,
    Class::Move,
    Class::Compare,
    Class::Control,
    Class::Parameter,
    Class::Global,
    Class::Shared,
    Class::Local,
    Class::Atomic,
    Class::Barrier,
    Class::Collective,
    Class::Matrix,
    Class::Async,
];

/// One decoded instruction.
#[derive(Clone, Debug)]
pub struct Instr {
    /// What it does.
    pub op: Op,
    /// Predicate that turns it on.
    pub guard: Pred,
    /// All ones if the guard is negated.
    pub negate: u32,
    /// What it is counted as.
    pub class: Class,
    /// Floating-point operations a lane does.
    pub flops: u8,
    /// Line in the PTX text.
    pub line: u32,
    /// File number and line of the source, from `.loc`; 0 if unknown.
    pub source: (u32, u32),
}

/// How a loaded value fills its register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extend {
    /// Zeros above.
    Zero,
    /// Copies of the sign bit above.
    Sign,
}

/// Address operand: register (zero slot if absent) plus constant.
#[derive(Clone, Copy, Debug)]
pub struct Addr {
    /// State space.
    pub space: Space,
    /// Register of the base.
    pub slot: Slot,
    /// The base is a 64-bit register.
    pub wide: bool,
    /// Constant added.
    pub offset: i64,
}

/// Logic of predicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Bool {
    And,
    Or,
    Xor,
}

/// Read-modify-write of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AtomOp {
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Add,
    Inc,
    Dec,
    Min,
    Max,
}

/// Lane exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

/// Vote across lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// Special registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    Laneid,
    Warpid,
    Nwarpid,
    Smid,
    Nsmid,
    Gridid,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    DynamicShared,
    TotalShared,
}

impl Special {
    /// All lanes of a warp read the same.
    pub fn same_in_warp(self) -> bool {
        use Special::*;
        let lane = matches!(
            self,
            LanemaskEq | LanemaskLe | LanemaskLt | LanemaskGe | LanemaskGt
        );
        !lane && !matches!(self, Tid(_) | Laneid)
    }
}

/// Registers that change as the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Timer {
    Clock,
    Clock64,
    ClockHi,
    GlobalTimer,
}

/// Approximate functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Approx {
    Rcp,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Lg2,
    Ex2,
    Tanh,
    Div,
}

/// Element of an mma operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

/// A matrix multiply-add of one warp, m16n8.
#[derive(Clone, Debug)]
pub struct MmaOp {
    /// Depth.
    pub k: u32,
    /// Elements of A.
    pub a_type: Element,
    /// Elements of B.
    pub b_type: Element,
    /// C is packed f16.
    pub c_half: bool,
    /// D is packed f16.
    pub d_half: bool,
    /// Integer results saturate.
    pub saturate: bool,
    /// Registers of D.
    pub d: Vec<Slot>,
    /// Registers of A.
    pub a: Vec<Slot>,
    /// Registers of B.
    pub b: Vec<Slot>,
    /// Registers of C.
    pub c: Vec<Slot>,
}

/// A conversion that has no warp-wide function of its own.
#[derive(Clone, Debug)]
pub struct ConvertOp {
    /// Result type.
    pub to: Type,
    /// Operand type.
    pub from: Type,
    /// Rounding of the result, or to an integer.
    pub round: Round,
    /// Round to an integral value (float to float).
    pub integral: bool,
    /// Flush subnormal f32 values.
    pub ftz: bool,
    /// Clamp: to the integer range, to [0, 1], or to the finite range.
    pub saturate: bool,
    /// Negative results become zero.
    pub relu: bool,
}

/// A call of a device function.
#[derive(Clone, Debug)]
pub struct CallOp {
    /// Function by index, or the register that holds its address.
    pub target: Result<u32, Slot>,
    /// Local offsets and sizes of the arguments in the caller's frame.
    pub args: Vec<(u32, u32)>,
    /// Likewise, for the results.
    pub returns: Vec<(u32, u32)>,
}

/// Operations.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // operands carry PTX's own letters
pub enum Op {
    /// Nothing to do (prefetches, hints, sleeps).
    Nop,
    Alu {
        f: AluFn,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Approx {
        f: Approx,
        d: Slot,
        a: Slot,
        b: Slot,
        half: Option<Type>,
        ftz: bool,
        sat: bool,
    },
    Convert {
        op: Box<ConvertOp>,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    /// `d = (a ? b) op (p ^ n)`, `q = !(a ? b) op (p ^ n)`.
    Cmp {
        f: CmpFn,
        d: Pred,
        q: Option<Pred>,
        a: Slot,
        b: Slot,
        with: Option<(Bool, Pred, bool)>,
    },
    /// Two independent comparisons of packed halves.
    Cmp2 {
        lo: CmpFn,
        hi: CmpFn,
        d: Pred,
        q: Pred,
        a: Slot,
        b: Slot,
        with: Option<(Bool, Pred, bool)>,
    },
    Select {
        d: Slot,
        a: Slot,
        b: Slot,
        p: Pred,
        negate: bool,
        wide: bool,
    },
    PredLogic {
        op: Bool,
        d: Pred,
        a: Pred,
        a_not: bool,
        b: Pred,
        b_not: bool,
    },
    Timer {
        d: Slot,
        which: Timer,
    },
    Lop3 {
        lut: u8,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// `count` elements of `size` bytes joined, the first lowest.
    Pack {
        size: u8,
        count: u8,
        wide: bool,
        d: Slot,
        src: [Slot; 4],
    },
    Unpack {
        size: u8,
        count: u8,
        wide: bool,
        a: Slot,
        dst: [Slot; 4],
    },
    Load {
        addr: Addr,
        size: u8,
        count: u8,
        dst: [Slot; 4],
        extend: Extend,
        wide: bool,
        strong: bool,
    },
    Store {
        addr: Addr,
        size: u8,
        count: u8,
        src: [Slot; 4],
        strong: bool,
    },
    /// Kernel parameter at a fixed offset.
    LoadParam {
        offset: u32,
        size: u8,
        count: u8,
        dst: [Slot; 4],
        extend: Extend,
        wide: bool,
    },
    Atom {
        addr: Addr,
        op: AtomOp,
        ty: Type,
        d: Option<Slot>,
        b: Slot,
        c: Slot,
        release: bool,
    },
    IsSpace {
        d: Pred,
        a: Slot,
        space: Space,
    },
    Branch {
        target: u32,
    },
    BranchTable {
        a: Slot,
        targets: Box<[u32]>,
    },
    Call(Box<CallOp>),
    Return,
    Exit,
    Trap,
    Barrier {
        id: Slot,
        count: Option<Slot>,
        aligned: bool,
        arrive: bool,
        reduce: Option<(BarReduce, u32, Pred, bool)>,
    },
    WarpSync {
        mask: Slot,
    },
    Fence {
        global: bool,
    },
    ActiveMask {
        d: Slot,
    },
    Vote {
        kind: Vote,
        d: u32,
        p: Pred,
        negate: bool,
        mask: Slot,
    },
    Match {
        all: bool,
        d: Slot,
        p: Option<Pred>,
        a: Slot,
        wide: bool,
        mask: Slot,
    },
    Shuffle {
        kind: Shuffle,
        d: Slot,
        p: Option<Pred>,
        a: Slot,
        b: Slot,
        c: Slot,
        mask: Slot,
    },
    Redux {
        f: Redux,
        d: Slot,
        a: Slot,
        mask: Slot,
    },
    Elect {
        d: Slot,
        p: Pred,
        mask: Slot,
    },
    CopyAsync {
        to: Addr,
        from: Addr,
        size: u8,
        bytes: Option<Slot>,
        ignore: Option<(Pred, bool)>,
    },
    CopyCommit,
    /// Waits until at most that many groups are pending.
    CopyWait {
        pending: u32,
    },
    LoadMatrix {
        addr: Addr,
        count: u8,
        transpose: bool,
        dst: [Slot; 4],
    },
    StoreMatrix {
        addr: Addr,
        count: u8,
        transpose: bool,
        src: [Slot; 4],
    },
    MoveMatrix {
        d: Slot,
        a: Slot,
    },
    Mma(Box<MmaOp>),
}

/// Reduction over a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BarReduce {
    Popc,
    And,
    Or,
}

/// Reduction over lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Redux {
    Add,
    MinS,
    MaxS,
    MinU,
    MaxU,
    And,
    Or,
    Xor,
}

/// What a register holds when its frame starts.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// The same bits in every lane.
    Bits(u64),
    /// An offset from the frame's local memory.
    Local(u32),
    /// A special register.
    Special(Special),
}

/// A function of a decoded kernel.
#[derive(Clone, Debug)]
pub struct Function {
    /// Name in the PTX text.
    pub name: String,
    /// Where its code starts.
    pub entry: u32,
    /// Registers of a frame.
    pub slots: u32,
    /// Predicates of a frame.
    pub preds: u32,
    /// Registers with a value from the start: slot, whether 64-bit, value.
    pub starts: Vec<(Slot, bool, Start)>,
    /// Bytes of local memory a frame takes.
    pub local: u32,
    /// Local offsets and sizes of parameters.
    pub params: Vec<(u32, u32)>,
    /// Local offsets and sizes of results.
    pub returns: Vec<(u32, u32)>,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Offset in the parameter buffer.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
}

/// A kernel ready to run.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Name in the PTX text.
    pub name: String,
    /// Code of the kernel and of all functions it may call.
    pub code: Vec<Instr>,
    /// The kernel's own function is the first.
    pub functions: Vec<Function>,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Size of the parameter buffer.
    pub param_size: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Alignment of the shared memory.
    pub shared_align: u32,
    /// Most threads a block may have.
    pub max_threads: u32,
    /// Virtual 32-bit registers of the largest frame; not what ptxas would allocate.
    pub virtual_registers: u32,
    /// `.file` table.
    pub files: Vec<(u32, String)>,
}

/// Base of code addresses, as taken by `mov` from a function name.
pub const CODE_WINDOW: u64 = 0x4_0000_0000;
/// Base of the generic window onto shared memory.
pub const SHARED_WINDOW: u64 = 0x1_0000_0000;
/// Base of the generic window onto local memory.
pub const LOCAL_WINDOW: u64 = 0x2_0000_0000;
/// Base of the generic window onto kernel parameters.
pub const PARAM_WINDOW: u64 = 0x3_0000_0000;
/// Size of each window.
pub const WINDOW: u64 = 0x1_0000_0000;
