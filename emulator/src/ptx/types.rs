//! Fundamental types of PTX.

/// A fundamental type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are PTX's own
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    U16x2,
    S16x2,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    E4m3,
    E5m2,
    E4m3x2,
    E5m2x2,
    F32,
    F64,
}

use Type::*;

const NAMES: [(&str, Type); 27] = [
    ("pred", Pred),
    ("b8", B8),
    ("b16", B16),
    ("b32", B32),
    ("b64", B64),
    ("b128", B128),
    ("u8", U8),
    ("u16", U16),
    ("u32", U32),
    ("u64", U64),
    ("s8", S8),
    ("s16", S16),
    ("s32", S32),
    ("s64", S64),
    ("u16x2", U16x2),
    ("s16x2", S16x2),
    ("f16", F16),
    ("f16x2", F16x2),
    ("bf16", Bf16),
    ("bf16x2", Bf16x2),
    ("tf32", Tf32),
    ("e4m3", E4m3),
    ("e5m2", E5m2),
    ("e4m3x2", E4m3x2),
    ("e5m2x2", E5m2x2),
    ("f32", F32),
    ("f64", F64),
];

impl Type {
    /// The type of that name, without dot.
    pub fn from_name(name: &str) -> Option<Type> {
        NAMES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
    }

    /// PTX's name of the type, without dot.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, t)| *t == self)
            .map_or("?", |(n, _)| n)
    }

    /// Size in bytes; predicates count as one.
    pub fn size(self) -> u32 {
        match self {
            Pred | B8 | U8 | S8 | E4m3 | E5m2 => 1,
            B16 | U16 | S16 | F16 | Bf16 | E4m3x2 | E5m2x2 => 2,
            B32 | U32 | S32 | U16x2 | S16x2 | F16x2 | Bf16x2 | Tf32 | F32 => 4,
            B64 | U64 | S64 | F64 => 8,
            B128 => 16,
        }
    }

    /// A signed integer.
    pub fn signed(self) -> bool {
        matches!(self, S8 | S16 | S32 | S64)
    }

    /// An integer, signed or not.
    pub fn integer(self) -> bool {
        self.signed() || matches!(self, U8 | U16 | U32 | U64)
    }

    /// A scalar floating-point type.
    pub fn float(self) -> bool {
        matches!(self, F16 | Bf16 | F32 | F64)
    }
}
