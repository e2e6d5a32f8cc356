//! Errors that the user can mend.

use std::fmt::Display;

use crate::{checkpoint, pipeline, tasks};

/// Bad input: one line that names where, what and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {field}: {problem}; {remedy}")]
pub struct InputError {
    /// The file, with the line where there is one, or the argument.
    pub place: String,
    /// The field in it.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl InputError {
    /// An error at `place`.
    pub fn new(
        place: impl Display,
        field: impl Display,
        problem: impl Display,
        remedy: impl Display,
    ) -> Self {
        Self {
            place: place.to_string(),
            field: field.to_string(),
            problem: problem.to_string(),
            remedy: remedy.to_string(),
        }
    }
}

/// Whether the input is to blame, and not the program.
pub(super) fn is_input(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<InputError>()
            || cause.is::<checkpoint::Error>()
            || cause.is::<tasks::TaskError>()
            || cause.is::<pipeline::BadInput>()
    })
}
