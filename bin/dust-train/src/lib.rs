//! Dual Self-Training of language models on `dust-kernels`.
//!
//! The library behind the `dust-train` program, so that the model, the losses and the loop can be
//! used and tested from outside.

pub mod checkpoint;
pub mod cli;
pub mod interrupt;
pub mod judge;
pub mod metrics;
pub mod model;
pub mod pipeline;
pub mod report;
pub mod rollout;
pub mod sandbox;
mod shuffle;
pub mod tasks;
pub mod text;
