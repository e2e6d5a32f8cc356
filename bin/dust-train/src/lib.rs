//! Trainer.
pub mod sandbox;
