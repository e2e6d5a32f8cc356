//! The run folder: plain files that each stage reads and writes, so that any run can be killed at
//! any moment and go on.
//!
//! Lines are appended to `NAME.partial`; when a stage is done, its lines are sorted into `NAME` in one
//! step. A line that a kill cut short is dropped and made again.

use super::bad_input;
use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

/// A run folder.
#[derive(Debug, Clone)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Opens a folder, which is made if it is not there.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("{}: cannot be made", path.display()))?;
        Ok(Self {
            path: path.to_path_buf(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether a stage's file is there, and so the stage done.
    pub fn has(&self, name: &str) -> bool {
        self.file(name).exists()
    }

    /// Writes a file in one step.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.file(name);
        let mut file = tempfile::NamedTempFile::new_in(&self.path)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        file.write_all(bytes)
            .and_then(|()| file.as_file().sync_all())
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        file.persist(&path)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(())
    }

    /// Writes a value as indented JSON, in one step.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        self.write(name, &text)
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// A missing file or malformed JSON, with the place.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.file(name);
        let text =
            fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{}: malformed", path.display()))
    }

    /// Reads a stage's lines; `stage` is the command that makes the file.
    ///
    /// # Errors
    /// A missing file or a malformed line, with its number.
    pub fn read_lines<T: DeserializeOwned>(&self, name: &str, stage: &str) -> Result<Vec<T>> {
        let path = self.file(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => bad_input!(
                "{}: is not there; run `dust-train {stage}` first",
                path.display()
            ),
            Err(e) => bad_input!("{}: cannot be read: {e}", path.display()),
        };
        parse_lines(&path, &text)
    }

    /// The SHA-256 of a file, in hex.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn hash(&self, name: &str) -> Result<String> {
        let path = self.file(name);
        let bytes =
            fs::read(&path).with_context(|| format!("{}: cannot be read", path.display()))?;
        Ok(hex(&Sha256::digest(&bytes)))
    }

    /// Opens a stage's unfinished lines, to go on after them.
    ///
    /// # Errors
    /// What the file system reports; a malformed whole line.
    pub fn resume<T: Serialize + DeserializeOwned>(&self, name: &str) -> Result<Partial<T>> {
        let path = self.file(&format!("{name}.partial"));
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .with_context(|| format!("{}: cannot be opened", path.display()))?;
        let bytes = fs::read(&path)?;
        // What follows the last line end was cut short.
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        file.set_len(whole as u64)?;
        file.seek(std::io::SeekFrom::End(0))?;
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let done = parse_lines(&path, &text)?;
        Ok(Partial {
            path,
            file,
            lines: done,
        })
    }

    /// Ends a stage: its lines, sorted by `key`, become `name` in one step.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn finish<T: Serialize + DeserializeOwned, K: Ord>(
        &self,
        name: &str,
        mut partial: Partial<T>,
        key: impl Fn(&T) -> K,
    ) -> Result<Vec<T>> {
        partial.lines.sort_by_key(key);
        self.write(name, &lines(&partial.lines)?)?;
        fs::remove_file(&partial.path)?;
        Ok(partial.lines)
    }

    /// Takes back [`RunFolder::finish`].
    ///
    /// # Errors
    /// What the file system reports.
    pub fn reopen(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        fs::rename(&path, self.file(&format!("{name}.partial")))
            .with_context(|| format!("{}: cannot be moved", path.display()))
    }

    /// Writes lines in one step.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn write_lines<T: Serialize>(&self, name: &str, values: &[T]) -> Result<()> {
        self.write(name, &lines(values)?)
    }
}

/// A stage's lines so far.
pub struct Partial<T> {
    path: PathBuf,
    file: File,
    /// The lines, those from before a resumption first.
    pub lines: Vec<T>,
}

impl<T: Serialize> Partial<T> {
    /// Appends a line, which a kill can no longer take away.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn push(&mut self, value: T) -> Result<()> {
        let line = lines(std::slice::from_ref(&value))?;
        self.file
            .write_all(&line)
            .with_context(|| format!("{}: cannot be written", self.path.display()))?;
        self.lines.push(value);
        Ok(())
    }
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn lines<T: Serialize>(values: &[T]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for value in values {
        serde_json::to_writer(&mut bytes, value)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

pub(super) fn parse_lines<T: DeserializeOwned>(path: &Path, text: &str) -> Result<Vec<T>> {
    text.lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line).map_err(|e| {
                let file = path.display();
                super::BadInput(format!("{file}: line {}: malformed: {e}", i + 1)).into()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_short_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        let mut partial = run.resume::<u32>("numbers.jsonl").unwrap();
        partial.push(3).unwrap();
        partial.push(1).unwrap();
        drop(partial);
        let mut file = OpenOptions::new()
            .append(true)
            .open(run.file("numbers.jsonl.partial"))
            .unwrap();
        file.write_all(b"12").unwrap();
        let mut partial = run.resume::<u32>("numbers.jsonl").unwrap();
        assert_eq!(partial.lines, [3, 1]);
        partial.push(2).unwrap();
        run.finish("numbers.jsonl", partial, |&n| n).unwrap();
        assert_eq!(
            run.read_lines::<u32>("numbers.jsonl", "sample").unwrap(),
            [1, 2, 3]
        );
        assert!(!run.has("numbers.jsonl.partial"));
    }

    #[test]
    fn errors_name_the_file_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunFolder::open(dir.path()).unwrap();
        let error = run.read_lines::<u32>("candidates.jsonl", "sample");
        assert!(format!("{:#}", error.unwrap_err()).contains("run `dust-train sample` first"));
        run.write("candidates.jsonl", b"1\nx\n").unwrap();
        let error = run.read_lines::<u32>("candidates.jsonl", "sample");
        assert!(format!("{:#}", error.unwrap_err()).contains("line 2"));
    }
}
