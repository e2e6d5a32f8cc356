//! The problems that the project ships, written for it: small functions that a model of a hundred
//! million parameters solves sometimes, so that its groups are often mixed.

use std::path::Path;

use super::{Task, TaskError, parse_jsonl};

/// The built-in problems.
pub fn builtin() -> Result<Vec<Task>, TaskError> {
    let text = include_str!("../../tasks/builtin.jsonl");
    parse_jsonl(Path::new("builtin.jsonl"), text.as_bytes())
}
