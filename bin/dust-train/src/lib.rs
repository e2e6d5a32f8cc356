//! Trainer.
pub mod judge;
pub mod metrics;
pub mod tasks;
