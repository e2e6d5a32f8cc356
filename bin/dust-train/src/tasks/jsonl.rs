//! JSON Lines: one record a line, empty lines ignored, gzip recognised by its first bytes.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use serde::de::DeserializeOwned;

use super::{Broken, Task, TaskError};

/// Reads a file of problems; the first line that is not one is an error.
pub fn read_jsonl(path: &Path) -> Result<Vec<Task>, TaskError> {
    parse_jsonl(path, open(path)?)
}

/// Reads problems from `reader`; `path` is only for the errors.
pub fn parse_jsonl(path: &Path, reader: impl BufRead) -> Result<Vec<Task>, TaskError> {
    let mut tasks: Vec<Task> = Vec::new();
    let mut ids = HashSet::new();
    for record in Lines::new(path, reader) {
        let (line, text) = record?;
        let task: Task = record_from(&text).map_err(|broken| broken.at(path, line))?;
        task.check().map_err(|broken| broken.at(path, line))?;
        if !ids.insert(task.id.clone()) {
            let problem = format!("`{}` is the name of an earlier problem", task.id);
            return Err(Broken::new("id", problem, "give every problem its own").at(path, line));
        }
        tasks.push(task);
    }
    Ok(tasks)
}

/// Opens a plain or gzipped file.
pub(super) fn open(path: &Path) -> Result<Box<dyn BufRead>, TaskError> {
    let io = |source| TaskError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
    let gzipped = file.fill_buf().map_err(io)?.starts_with(&[0x1f, 0x8b]);
    Ok(if gzipped {
        Box::new(BufReader::new(MultiGzDecoder::new(file)))
    } else {
        Box::new(file)
    })
}

/// The records of a file with their line numbers, one in memory at a time.
pub(super) struct Lines<'a, R> {
    path: &'a Path,
    reader: R,
    line: usize,
}

/// No line of a public benchmark comes near this; a file without line breaks must not fill memory.
const LONGEST_LINE: u64 = 2 << 30;

impl<'a, R: BufRead> Lines<'a, R> {
    pub(super) fn new(path: &'a Path, reader: R) -> Self {
        Self {
            path,
            reader,
            line: 0,
        }
    }
}

impl<R: BufRead> Iterator for Lines<'_, R> {
    type Item = Result<(usize, Vec<u8>), TaskError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut text = Vec::new();
            let read = (&mut self.reader)
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut text);
            match read {
                Ok(0) => return None,
                Ok(n) if n as u64 == LONGEST_LINE && !text.ends_with(b"\n") => {
                    let problem = format!("is longer than {LONGEST_LINE} bytes");
                    let broken = Broken::new("record", problem, "put one record on each line");
                    return Some(Err(broken.at(self.path, self.line + 1)));
                }
                Ok(_) => self.line += 1,
                Err(source) => {
                    return Some(Err(TaskError::Io {
                        path: self.path.to_path_buf(),
                        source,
                    }));
                }
            }
            if !text.trim_ascii().is_empty() {
                return Some(Ok((self.line, text)));
            }
        }
    }
}

/// Reads one JSON record; the error names the field.
pub(super) fn record_from<T: DeserializeOwned>(text: &[u8]) -> Result<T, Broken> {
    if let Some(number) = oversized_integer(text) {
        return Err(Broken::new(
            "record",
            format!("the integer {number} does not fit in 64 bits and would be rounded"),
            "compare it in test_code, with mode \"assert\"",
        ));
    }
    record_as_written(text)
}

/// The same without a look at the numbers, for records whose values stay text.
pub(super) fn record_as_written<T: DeserializeOwned>(text: &[u8]) -> Result<T, Broken> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let record = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let message = inner.to_string();
        // The position within the line is the column; "line 1" would contradict the line we name.
        let message = message.split(" at line ").next().unwrap_or_default();
        if inner.is_data() {
            let named = message.split('`').nth(1);
            let field = if path == "." {
                named.unwrap_or("record")
            } else {
                &path
            };
            Broken::new(field, message, "correct the line or remove it")
        } else {
            Broken::new(
                "record",
                format!("{message} at column {}", inner.column()),
                "put one whole JSON object on each line",
            )
        }
    })?;
    json.end().map_err(|error| {
        Broken::new(
            "record",
            format!("more text after the object, at column {}", error.column()),
            "put one JSON object on each line",
        )
    })?;
    Ok(record)
}

/// The first integer of a JSON text that would silently become a rounded floating-point number.
fn oversized_integer(text: &[u8]) -> Option<&str> {
    let mut i = 0;
    while i < text.len() {
        match text[i] {
            b'"' => {
                i += 1;
                while i < text.len() && text[i] != b'"' {
                    i += if text[i] == b'\\' { 2 } else { 1 };
                }
                i += 1;
            }
            b'-' | b'0'..=b'9' => {
                let from = i;
                while i < text.len()
                    && matches!(text[i], b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')
                {
                    i += 1;
                }
                let number = std::str::from_utf8(&text[from..i]).ok()?;
                let integer = !number.contains(['.', 'e', 'E']);
                if integer
                    && number.len() > 18
                    && number.parse::<i64>().is_err()
                    && number.parse::<u64>().is_err()
                {
                    return Some(number);
                }
            }
            _ => i += 1,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"id":"a","statement":"s","mode":"function","entry_point":"f","tests":[{"input":[1],"output":2}]}"#;

    fn error(text: &str) -> String {
        parse_jsonl(Path::new("p.jsonl"), text.as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn reads_records_and_skips_empty_lines() {
        let text = format!("\n{GOOD}\r\n  \n{}", GOOD.replace("\"a\"", "\"b\""));
        let tasks = parse_jsonl(Path::new("p"), text.as_bytes()).unwrap();
        assert_eq!(tasks.len(), 2);
        assert_eq!(tasks[1].id, "b");
        let again = serde_json::to_string(&tasks[0]).unwrap();
        assert_eq!(again, GOOD);
    }

    #[test]
    fn errors_name_file_line_field_and_remedy() {
        let cases = [
            (GOOD.replace("\"id\":\"a\",", ""), "`id`: missing field"),
            (
                GOOD.replace("\"s\"", "7"),
                "`statement`: invalid type: integer `7`",
            ),
            (
                GOOD.replace("function", "quiz"),
                "`mode`: unknown variant `quiz`",
            ),
            (
                GOOD.replace("\"tests\"", "\"test\""),
                "`test`: unknown field",
            ),
            (GOOD.replace("[1]", "1"), "`tests[0].input`: is not a list"),
            (GOOD.replace("\"output\"", "\"out\""), "unknown field `out`"),
            (
                GOOD.replace("[{\"input\":[1],\"output\":2}]", "[]"),
                "`tests`: is empty",
            ),
            (
                GOOD.replace("\"f\"", "\"f()\""),
                "`entry_point`: `f()` is not",
            ),
            (
                GOOD.replace("function", "stdin"),
                "`tests[0].input`: is not a string",
            ),
            (
                GOOD.replace("function", "assert"),
                "`test_code`: is missing",
            ),
            (GOOD.replace("\"a\"", "\" \""), "`id`: is empty"),
            (
                GOOD.replace("{\"id\"", "{\"date\":\"soon\",\"id\""),
                "`date`: `soon`",
            ),
            (GOOD[..40].to_owned(), "put one whole JSON object"),
            (format!("{GOOD} {GOOD}"), "more text after the object"),
            (
                GOOD.replace("2}", "123456789012345678901}"),
                "123456789012345678901 does not fit",
            ),
            (
                GOOD.to_owned(),
                "`id`: `a` is the name of an earlier problem",
            ),
            ("[]".to_owned(), "`record`: invalid"),
        ];
        for (line, expected) in cases {
            let text = error(&format!("{GOOD}\n\n{line}\n"));
            assert!(text.starts_with("p.jsonl:3: field `"), "{text}");
            assert!(text.contains(expected), "{text} should say {expected}");
            assert!(!text.contains('\n') && text.contains("; "), "{text}");
        }
    }

    #[test]
    fn integers_that_would_be_rounded() {
        assert_eq!(
            oversized_integer(b"[18446744073709551615, -9223372036854775808]"),
            None
        );
        assert_eq!(
            oversized_integer(b"[18446744073709551616]"),
            Some("18446744073709551616")
        );
        assert_eq!(
            oversized_integer(b"-9223372036854775809"),
            Some("-9223372036854775809")
        );
        assert_eq!(
            oversized_integer(b"\"\\\"99999999999999999999999\" 1e300 0.30000000000000000004"),
            None
        );
    }

    #[test]
    fn floats_are_read_to_the_last_bit() {
        // Expected outputs are compared with ==: one unit in the last place changes a verdict.
        let text = GOOD.replace(":2}", ":1.7976931348623155e308}");
        let tasks = parse_jsonl(Path::new("p"), text.as_bytes()).unwrap();
        assert_eq!(
            tasks[0].tests[0].output.as_f64(),
            Some(1.7976931348623155e308)
        );
        for bits in (0..1000u64).map(|i| 0x3ff0_0000_0000_0001 + i * 0x0003_1415_9265_3589) {
            let x = f64::from_bits(bits);
            let value: serde_json::Value = serde_json::from_str(&format!("{x:e}")).unwrap();
            assert_eq!(value.as_f64(), Some(x));
        }
    }

    #[test]
    fn gzip_is_recognised_and_truncation_is_an_error() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        gz.write_all(GOOD.as_bytes()).unwrap();
        let bytes = gz.finish().unwrap();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_jsonl(&path).unwrap().len(), 1);
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(matches!(read_jsonl(&path), Err(TaskError::Io { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_jsonl(Path::new("p"), &bytes[..]);
        }

        #[test]
        fn no_mutation_panics(at in 0..GOOD.len(), byte in any::<u8>()) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse_jsonl(Path::new("p"), &bytes[..]);
        }
    }
}
