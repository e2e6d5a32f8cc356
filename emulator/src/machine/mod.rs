//! The machine: decoded code, memory, warps, blocks, checks.

mod access;
mod barrier;
pub mod block;
mod calls;
pub mod code;
pub mod decode;
mod exchange;
mod execute;
pub mod lanes;
pub mod launch;
mod local;
pub mod memory;
mod mma;
pub mod num;
pub mod race;
mod shared;
pub mod warp;
