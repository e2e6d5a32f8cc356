//! PTX text: tokens, syntax tree, types.

pub mod ast;
pub mod lexer;
mod parser;
pub mod types;

pub use ast::Module;
pub use parser::parse;
pub use types::Type;

/// Why PTX text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ptx line {line}: {message}")]
pub struct PtxError {
    /// Line in the PTX text, from 1.
    pub line: u32,
    /// What is wrong there.
    pub message: String,
}

impl PtxError {
    /// An error at a line.
    pub fn new(line: u32, message: impl Into<String>) -> PtxError {
        PtxError {
            line,
            message: message.into(),
        }
    }
}
