//! Files that commands read and write; `-` is the standard input or output.

use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::NamedTempFile;

use super::InputError;

/// Names an input in messages.
pub(super) fn input_name(path: &Path) -> String {
    if path == Path::new("-") {
        "standard input".to_owned()
    } else {
        path.display().to_string()
    }
}

/// The whole text of an input.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(path)
    };
    let name = input_name(path);
    let bytes = bytes.map_err(|e| {
        InputError::new(
            &name,
            "file",
            format!("cannot read: {e}"),
            "give a readable file",
        )
    })?;
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1;
        InputError::new(
            &name,
            format!("line {line}"),
            "is not UTF-8",
            "save the text as UTF-8",
        )
        .into()
    })
}

/// An output that appears under its name only when it is whole.
pub(super) enum Output {
    /// The standard output.
    Stdout(BufWriter<io::Stdout>),
    /// A temporary file beside the final one.
    File(BufWriter<NamedTempFile>, PathBuf),
}

impl Output {
    /// Prepares the output, so that a place that cannot be written to is known before the work.
    pub fn create(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout(BufWriter::new(io::stdout())));
        }
        if path.is_dir() {
            let remedy = "give the name of a file";
            return Err(InputError::new(path.display(), "file", "is a folder", remedy).into());
        }
        let folder = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let file = NamedTempFile::new_in(folder).map_err(|e| unwritable(path, &e))?;
        Ok(Self::File(BufWriter::new(file), path.to_owned()))
    }

    /// Gives the output its name.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Stdout(mut out) => out.flush()?,
            Self::File(out, path) => {
                let file = out.into_inner().map_err(|e| unwritable(&path, e.error()))?;
                set_ordinary_permissions(file.path())?;
                file.persist(&path)
                    .map_err(|e| unwritable(&path, &e.error))?;
            }
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(out) => out.write(buf),
            Self::File(out, _) => out.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(out) => out.flush(),
            Self::File(out, _) => out.flush(),
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> InputError {
    let problem = format!("cannot write: {error}");
    InputError::new(
        path.display(),
        "file",
        problem,
        "choose a place that can be written to",
    )
}

/// Temporary files are made for their owner alone; a result is a file like any other.
#[cfg(unix)]
fn set_ordinary_permissions(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_ordinary_permissions(_: &Path) -> io::Result<()> {
    Ok(())
}
