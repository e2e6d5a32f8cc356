//! LiveCodeBench (`code_generation_lite`): `test.jsonl`, `test2.jsonl`, …, one problem a line.
//!
//! Public and private tests are strings that hold JSON; private ones may instead be base64 of zlib
//! of a pickled string. Nothing is ever unpickled: [`pickled_text`] accepts the one form that
//! Python's protocol 4 gives a string. The date window is inclusive at both ends, dates standing
//! for midnight, as in the benchmark's own loader.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use serde::Deserialize;
use serde_json::Value;

use super::jsonl::{Lines, open, record_from};
use super::{Broken, Difficulty, Mode, Task, TaskError, TaskSet, Test, is_date};

/// Which problems are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Window {
    /// Those that were published from one day to another, both included.
    Dates {
        /// `YYYY-MM-DD` or `YYYY-MM-DDThh:mm:ss`.
        start: String,
        /// The same.
        end: String,
    },
    /// Those of a release of the benchmark: `release_v3` is the first three shards.
    Release(u32),
}

impl Window {
    /// Whether a problem of that date belongs to the window.
    pub fn holds(&self, date: &str) -> bool {
        let Self::Dates { start, end } = self else {
            return true;
        };
        let midnight = |date: &str| match date.len() {
            10 => format!("{date}T00:00:00"),
            _ => date.to_owned(),
        };
        let date = midnight(date);
        midnight(start) <= date && date <= midnight(end)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dates { start, end } => write!(f, "{start}..{end} inclusive"),
            Self::Release(number) => write!(f, "release_v{number}"),
        }
    }
}

impl FromStr for Window {
    type Err = TaskError;

    /// `v5`, `v6` (the dates that published results mean by these names), `START..END`, or
    /// `release_v1` to `release_v6`.
    fn from_str(text: &str) -> Result<Self, TaskError> {
        if let Some(Ok(number @ 1..)) = text.strip_prefix("release_v").map(str::parse) {
            return Ok(Self::Release(number));
        }
        let dates = match text {
            "v5" => "2024-08-01..2025-02-01",
            "v6" => "2025-02-01..2025-05-01",
            other => other,
        };
        match dates.split_once("..") {
            Some((start, end)) if is_date(start) && is_date(end) && start <= end => {
                Ok(Self::Dates {
                    start: start.to_owned(),
                    end: end.to_owned(),
                })
            }
            _ => Err(TaskError::Spec {
                spec: format!("livecodebench@{text}"),
                problem: format!("`{text}` is neither a window of dates nor a release"),
                remedy: "write v5, v6, START..END (2025-02-01..2025-05-01) or release_v6"
                    .to_owned(),
            }),
        }
    }
}

/// Reads a shard, or all the `test*.jsonl` shards of a folder in their order. Problems outside the
/// window are skipped before their tests are decoded; one record is in memory at a time.
pub fn livecodebench(path: &Path, window: Option<Window>) -> Result<TaskSet, TaskError> {
    let mut set = TaskSet {
        window,
        ..TaskSet::empty(path)
    };
    for shard in shards(path, set.window.as_ref())? {
        for record in Lines::new(&shard, open(&shard)?) {
            let (line, text) = record?;
            set.records += 1;
            let task = record_from::<Head>(&text).and_then(|head| {
                let date = head.contest_date.get(..19).unwrap_or(&head.contest_date);
                if !is_date(date) {
                    let problem = format!("`{}` is not a date", head.contest_date);
                    return Err(Broken::new(
                        "contest_date",
                        problem,
                        "correct the line or remove it",
                    ));
                }
                match &set.window {
                    Some(window) if !window.holds(date) => Ok(None),
                    _ => record_from::<Row>(&text)?.task(date).map(Some),
                }
            });
            match task {
                Ok(task) => set.tasks.extend(task),
                Err(broken) => set.refused.push(broken.at(&shard, line)),
            }
        }
    }
    Ok(set)
}

fn shards(path: &Path, window: Option<&Window>) -> Result<Vec<PathBuf>, TaskError> {
    let wrong = |problem: String| TaskError::Spec {
        spec: path.display().to_string(),
        problem,
        remedy: "give the folder of the LiveCodeBench files".to_owned(),
    };
    if !path.is_dir() {
        return match window {
            Some(Window::Release(_)) => Err(wrong("a release is more than one file".to_owned())),
            _ => Ok(vec![path.to_path_buf()]),
        };
    }
    let io = |source| TaskError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut shards = BTreeMap::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        let number = file
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(
                |name| match name.strip_prefix("test")?.strip_suffix(".jsonl")? {
                    "" => Some(1),
                    digits => digits.parse::<u32>().ok(),
                },
            );
        shards.extend(number.map(|number| (number, file)));
    }
    if let Some(Window::Release(last)) = window {
        if let Some(missing) = (1..=*last).find(|number| !shards.contains_key(number)) {
            return Err(wrong(format!(
                "shard {missing} of release_v{last} is missing"
            )));
        }
        shards.retain(|number, _| number <= last);
    }
    if shards.is_empty() {
        return Err(wrong("the folder holds no test*.jsonl".to_owned()));
    }
    Ok(shards.into_values().collect())
}

#[derive(Deserialize)]
struct Head {
    contest_date: String,
}

#[derive(Deserialize)]
struct Row {
    question_id: String,
    question_content: String,
    starter_code: String,
    difficulty: Difficulty,
    public_test_cases: String,
    private_test_cases: String,
    metadata: String,
}

#[derive(Deserialize)]
struct Metadata {
    func_name: Option<String>,
}

#[derive(Deserialize)]
struct Case {
    input: String,
    output: String,
}

impl Row {
    fn task(self, date: &str) -> Result<Task, Broken> {
        let metadata: Metadata = inner("metadata", &self.metadata)?;
        let mut cases: Vec<Case> = inner("public_test_cases", &self.public_test_cases)?;
        cases.extend(private_cases(&self.private_test_cases)?);
        let function = metadata.func_name.is_some();
        let tests = cases.into_iter().enumerate().map(|(i, case)| {
            if !function {
                return Ok(Test {
                    input: case.input.into(),
                    output: case.output.into(),
                });
            }
            let value = |name: &str, text: &str| -> Result<Value, Broken> {
                inner(&format!("tests[{i}].{name}"), text)
            };
            // One argument a line. A last line break is no argument, though upstream trips over it.
            let arguments = case.input.trim_end_matches(['\r', '\n']).lines();
            Ok(Test {
                input: arguments
                    .map(|line| value("input", line))
                    .collect::<Result<Vec<_>, _>>()?
                    .into(),
                output: value("output", &case.output)?,
            })
        });
        let task = Task {
            id: format!("livecodebench/{}", self.question_id),
            statement: self.question_content,
            starter_code: Some(self.starter_code).filter(|code| !code.is_empty()),
            mode: if function {
                Mode::Function
            } else {
                Mode::Stdin
            },
            entry_point: metadata.func_name,
            tests: tests.collect::<Result<_, _>>()?,
            test_code: None,
            difficulty: Some(self.difficulty),
            split: None,
            date: Some(date.to_owned()),
            solution: None,
        };
        task.check()?;
        Ok(task)
    }
}

/// Reads JSON that a field holds as text.
fn inner<T: serde::de::DeserializeOwned>(field: &str, text: &str) -> Result<T, Broken> {
    record_from(text.as_bytes()).map_err(|broken| Broken {
        field: format!("{field}.{}", broken.field),
        ..broken
    })
}

fn private_cases(text: &str) -> Result<Vec<Case>, Broken> {
    const FIELD: &str = "private_test_cases";
    if text.trim_start().starts_with('[') {
        return inner(FIELD, text);
    }
    let wrong = |problem: String| {
        let remedy = "it must be JSON, or base64 of zlib of one pickled string";
        Broken::new(FIELD, problem, remedy)
    };
    let packed = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .map_err(|e| wrong(format!("neither JSON nor base64 ({e})")))?;
    let mut pickle = Vec::new();
    // A few kilobytes can unpack to any size; no real suite comes near the limit.
    const LARGEST: u64 = 1 << 30;
    flate2::read::ZlibDecoder::new(&packed[..])
        .take(LARGEST + 1)
        .read_to_end(&mut pickle)
        .map_err(|e| wrong(format!("not zlib ({e})")))?;
    if pickle.len() as u64 > LARGEST {
        return Err(wrong(format!("unpacks to more than {LARGEST} bytes")));
    }
    inner(FIELD, pickled_text(&pickle).map_err(wrong)?)
}

/// The text of a pickle that holds one string and nothing else (protocol 4).
///
/// PROTO 4, then any FRAME headers, one of SHORT_BINUNICODE, BINUNICODE and BINUNICODE8, MEMOIZE,
/// STOP. Every other operation code, a second string included, is refused.
fn pickled_text(pickle: &[u8]) -> Result<&str, String> {
    let cut = || "the pickle is cut short".to_owned();
    let take = |at: usize, n: usize| {
        at.checked_add(n)
            .and_then(|end| pickle.get(at..end))
            .ok_or_else(cut)
    };
    let length = |at: usize, n: usize| -> Result<usize, String> {
        let bytes = take(at, n)?;
        let value = bytes.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
        usize::try_from(value).map_err(|_| cut())
    };
    if take(0, 2)? != [0x80, 4] {
        return Err("not a pickle of protocol 4".to_owned());
    }
    let (mut at, mut text) = (2, None);
    loop {
        let op = take(at, 1)?[0];
        at += 1;
        match (op, text) {
            (0x95, _) => at += take(at, 8)?.len(),
            (0x8c | 0x58 | 0x8d, None) => {
                let width = match op {
                    0x8c => 1,
                    0x58 => 4,
                    _ => 8,
                };
                let bytes = take(at + width, length(at, width)?)?;
                at += width + bytes.len();
                text = Some(std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 ({e})"))?);
            }
            (0x94, Some(_)) => {}
            (0x2e, Some(text)) if at == pickle.len() => return Ok(text),
            (0x2e, Some(_)) => return Err("more bytes after the pickle".to_owned()),
            _ => {
                return Err(format!(
                    "the pickle uses operation {op:#04x}, which is refused"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::io::Write;

    fn pickle(text: &str) -> Vec<u8> {
        let mut bytes = vec![0x80, 4];
        if text.len() < 256 {
            bytes.push(0x95);
            bytes.extend((text.len() as u64 + 4).to_le_bytes());
            bytes.extend([0x8c, text.len() as u8]);
        } else {
            // Python writes a long string outside of any frame.
            bytes.push(0x58);
            bytes.extend((text.len() as u32).to_le_bytes());
        }
        bytes.extend(text.as_bytes());
        bytes.extend(b"\x94.");
        bytes
    }

    fn packed(text: &str) -> String {
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
        zlib.write_all(&pickle(text)).unwrap();
        base64::engine::general_purpose::STANDARD.encode(zlib.finish().unwrap())
    }

    fn row(id: &str, date: &str, function: bool, private: &str) -> String {
        let (input, output) = if function {
            ("[1, 2]\n3", "true")
        } else {
            ("1 2\n", "3\n")
        };
        json!({
            "question_title": "t", "question_content": "c", "platform": "atcoder", "question_id": id,
            "contest_id": "x", "contest_date": date, "difficulty": "hard",
            "starter_code": if function { "class Solution:\n    def f(self, a, b):\n        " } else { "" },
            "public_test_cases": json!([{"input": input, "output": output, "testtype": "-"}]).to_string(),
            "private_test_cases": private,
            "metadata": if function { r#"{"func_name": "f"}"# } else { "{}" },
        })
        .to_string()
    }

    fn read(rows: &[String], window: Option<&str>) -> TaskSet {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test6.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        livecodebench(&path, window.map(|w| w.parse().unwrap())).unwrap()
    }

    #[test]
    fn both_kinds_of_private_tests_and_both_modes() {
        let private =
            json!([{"input": "[]\n0\n", "output": "false", "testtype": "functional"}]).to_string();
        let long = json!([{"input": "9".repeat(100_000), "output": "é\n", "testtype": "stdin"}])
            .to_string();
        let set = read(
            &[
                row("a", "2025-02-01T00:00:00", true, &private),
                row("b", "2025-02-01T00:00:00", true, &packed(&private)),
                row("c", "2025-02-01T00:00:00", false, &packed(&long)),
            ],
            None,
        );
        assert!(set.refused.is_empty(), "{:?}", set.refused);
        assert_eq!(set.tasks[0].tests, set.tasks[1].tests);
        let task = &set.tasks[0];
        assert_eq!(
            (task.mode, task.entry_point.as_deref()),
            (Mode::Function, Some("f"))
        );
        assert_eq!(task.tests[0].input, json!([[1, 2], 3]));
        assert_eq!(task.tests[1].input, json!([[], 0]));
        assert_eq!(task.tests[1].output, json!(false));
        let task = &set.tasks[2];
        assert_eq!(
            (task.mode, task.starter_code.as_deref()),
            (Mode::Stdin, None)
        );
        assert_eq!(task.tests[0].input, json!("1 2\n"));
        assert_eq!(task.tests[1].output, json!("é\n"));
    }

    #[test]
    fn the_window_is_inclusive_with_dates_at_midnight() {
        let dates = [
            "2025-01-31T23:59:59",
            "2025-02-01T00:00:00",
            "2025-05-01T00:00:00",
            "2025-05-01T14:30:00",
        ];
        let rows: Vec<_> = dates.iter().map(|d| row(d, d, false, "[]")).collect();
        let set = read(&rows, Some("v6"));
        let ids: Vec<_> = set.tasks.iter().map(|t| t.id.as_str()).collect();
        assert_eq!(
            ids,
            [
                "livecodebench/2025-02-01T00:00:00",
                "livecodebench/2025-05-01T00:00:00"
            ]
        );
        let line = TaskSet {
            spec: "lcb".into(),
            ..set
        }
        .to_string();
        assert_eq!(
            line,
            "lcb: 2 problems (2 hard) of 4 records, 2025-02-01..2025-05-01 inclusive"
        );
        assert!("2025-05-01..2025-02-01".parse::<Window>().is_err());
    }

    #[test]
    fn a_row_outside_of_the_window_is_not_decoded() {
        let set = read(
            &[row("a", "2024-01-01T00:00:00", false, "rubbish")],
            Some("v6"),
        );
        assert!(set.tasks.is_empty() && set.refused.is_empty());
    }

    #[test]
    fn bad_rows_are_refused_by_field() {
        let date = "2025-02-01T00:00:00";
        let cases = [
            (row("a", "soon", false, "[]"), "contest_date"),
            (row("a", date, false, "!"), "private_test_cases"),
            (row("a", date, false, "aGVsbG8="), "private_test_cases"),
            (
                row("a", date, false, "[{\"input\": 1}]"),
                "private_test_cases.[0].input",
            ),
            (
                row("a", date, true, r#"[{"input": "x", "output": "1"}]"#),
                "tests[1].input",
            ),
            (
                row("a", date, false, "[]").replace("hard", "odd"),
                "difficulty",
            ),
            (
                row("a", date, false, "[]").replace("question_content", "content"),
                "question_content",
            ),
        ];
        for (row, field) in cases {
            let set = read(&[row], None);
            assert!(set.tasks.is_empty());
            let text = set.refused[0].to_string();
            assert!(
                text.contains(&format!("test6.jsonl:1: field `{field}")),
                "{text}"
            );
        }
    }

    #[test]
    fn only_a_pickled_string_is_accepted() {
        assert_eq!(pickled_text(&pickle("hé")), Ok("hé"));
        // os.system("true"), as Python pickles it.
        let call = b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.";
        assert!(pickled_text(call).unwrap_err().contains("refused"));
        assert!(pickled_text(b"\x80\x04N.").unwrap_err().contains("0x4e"));
        assert!(pickled_text(b"\x80\x04.").unwrap_err().contains("0x2e"));
        assert!(pickled_text(b"\x80\x02X\x01\0\0\0a.").is_err());
        assert!(pickled_text(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.").is_err());
        let whole = pickle("abc");
        for n in 0..whole.len() {
            assert!(pickled_text(&whole[..n]).is_err(), "{n}");
        }
        assert!(pickled_text(&[&whole[..], b"."].concat()).is_err());
    }

    #[test]
    fn shards_are_read_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "test10.jsonl",
            "test2.jsonl",
            "test.jsonl",
            "notes.jsonl",
            "testx.jsonl",
        ] {
            std::fs::write(
                folder.path().join(name),
                row(name, "2025-01-01", false, "[]"),
            )
            .unwrap();
        }
        let read = |window: Option<&str>| -> Result<Vec<String>, TaskError> {
            let window = window.map(str::parse).transpose()?;
            let set = livecodebench(folder.path(), window)?;
            Ok(set.tasks.into_iter().map(|task| task.id).collect())
        };
        let all = [
            "livecodebench/test.jsonl",
            "livecodebench/test2.jsonl",
            "livecodebench/test10.jsonl",
        ];
        assert_eq!(read(None).unwrap(), all);
        assert_eq!(read(Some("release_v2")).unwrap(), all[..2]);
        let error = |window: &str| read(Some(window)).unwrap_err().to_string();
        assert!(error("release_v4").contains("shard 3 of release_v4 is missing"));
        assert!(error("release_v0").contains("neither a window of dates nor a release"));
        let file = folder.path().join("test.jsonl");
        let error = livecodebench(&file, Some(Window::Release(1))).unwrap_err();
        assert!(error.to_string().contains("more than one file"), "{error}");
    }

    proptest! {
        #[test]
        fn strings_survive(text in ".{0,300}") {
            let bytes = pickle(&text);
            prop_assert_eq!(pickled_text(&bytes), Ok(&text[..]));
        }

        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            bytes.splice(0..0, [0x80, 4]);
            let _ = pickled_text(&bytes);
        }
    }
}
