//! Trainer.
pub mod judge;
pub mod metrics;
pub mod report;
pub mod tasks;
