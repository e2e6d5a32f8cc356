use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with a model's files. Every message is one line that names the file, the
/// field in it and a remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The content is damaged, contradictory or not supported.
    #[error("{file}: {field}: {problem}; {remedy}")]
    Invalid {
        /// The file, folder or hub repository.
        file: String,
        /// The field, tensor or part of the file.
        field: String,
        /// What is wrong with it.
        problem: String,
        /// What the reader of the message can do.
        remedy: String,
    },
}

impl Error {
    pub(crate) fn io(file: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io {
            file: file.to_owned(),
            action,
            source,
        }
    }

    pub(crate) fn invalid(
        file: impl AsRef<Path>,
        field: impl AsRef<str>,
        problem: impl AsRef<str>,
        remedy: impl AsRef<str>,
    ) -> Self {
        Self::Invalid {
            file: one_line(&file.as_ref().to_string_lossy()),
            field: one_line(field.as_ref()),
            problem: one_line(problem.as_ref()),
            remedy: one_line(remedy.as_ref()),
        }
    }
}

/// Names and values come from files that nobody vouches for: a message stays one printable line
/// of bounded length whatever they hold.
fn one_line(text: &str) -> String {
    const LIMIT: usize = 400;
    let mut line: String = text
        .chars()
        .take(LIMIT)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(LIMIT).is_some() {
        line.push('…');
    }
    line
}
