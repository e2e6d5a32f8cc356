//! Trainer.

pub mod checkpoint;
pub mod text;
