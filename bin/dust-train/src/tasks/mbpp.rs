//! MBPP: `{task_id, text, code, test_list, test_setup_code}` one a line (`mbpp.jsonl`), or the
//! sanitized edition, a JSON list of `{task_id, prompt, code, test_imports, test_list}`.
//!
//! The tests stand in the usual prompt, and a program that hard-codes their answers passes them. Here
//! the statement shows the first test only, which tells the function's name and form; all of them
//! decide.

use std::io::{BufRead, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::jsonl::{Lines, open, record_as_written};
use super::{Broken, Mode, Split, Task, TaskError, TaskSet};

/// A list is read as a whole; the set has less than a megabyte.
const LARGEST: u64 = 64 << 20;

#[derive(Deserialize)]
struct Row {
    task_id: u32,
    #[serde(alias = "prompt")]
    text: String,
    code: String,
    test_list: Vec<String>,
    #[serde(default)]
    test_imports: Vec<String>,
    #[serde(default)]
    test_setup_code: String,
}

impl Row {
    fn task(self) -> Result<Task, Broken> {
        if !self.test_setup_code.trim().is_empty() {
            return Err(Broken::new(
                "test_setup_code",
                "makes objects of the program's own classes, which only the program's process has",
                "leave the problem out",
            ));
        }
        let Some(first) = self.test_list.first() else {
            return Err(Broken::new(
                "test_list",
                "is empty",
                "leave the problem out",
            ));
        };
        let entry_point = functions(&self.code)
            .find(|name| calls(first, name))
            .map(str::to_owned)
            .ok_or_else(|| {
                let problem = "calls no function that `code` defines";
                Broken::new("test_list[0]", problem, "leave the problem out")
            })?;
        let statement = format!(
            "{}\nYour code should pass this test:\n\n{first}",
            self.text.trim_end()
        );
        let mut test_code = self.test_imports;
        test_code.extend(self.test_list);
        let task = Task {
            id: format!("mbpp/{}", self.task_id),
            statement,
            starter_code: None,
            mode: Mode::Assert,
            entry_point: Some(entry_point),
            tests: Vec::new(),
            test_code: Some(test_code.join("\n") + "\n"),
            difficulty: None,
            // The authors': 1 to 10 for prompts, 11 to 510 test, to 600 validation, the rest training.
            split: Some(match self.task_id {
                11..=600 => Split::HeldOut,
                _ => Split::Train,
            }),
            date: None,
            solution: Some(self.code),
        };
        task.check()?;
        Ok(task)
    }
}

/// The names of the functions that `code` defines at the top level.
fn functions(code: &str) -> impl Iterator<Item = &str> {
    code.lines().filter_map(|line| {
        let rest = line.strip_prefix("def ")?.trim_start();
        Some(rest[..rest.find('(')?].trim_end())
    })
}

/// Whether `name(` stands in `test` as a name of its own.
fn calls(test: &str, name: &str) -> bool {
    test.match_indices(name).any(|(at, _)| {
        let before = test[..at].chars().next_back();
        let after = test[at + name.len()..].trim_start();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_') && after.starts_with('(')
    })
}

/// Reads `mbpp.jsonl` or `sanitized-mbpp.json`, plain or gzipped.
pub fn mbpp(path: &Path) -> Result<TaskSet, TaskError> {
    let mut set = TaskSet::empty(path);
    let mut file = open(path)?;
    let io = |source| TaskError::Io {
        path: path.to_path_buf(),
        source,
    };
    if file
        .fill_buf()
        .map_err(io)?
        .trim_ascii_start()
        .starts_with(b"[")
    {
        let mut text = Vec::new();
        file.take(LARGEST).read_to_end(&mut text).map_err(io)?;
        let rows: Vec<Box<RawValue>> =
            record_as_written(&text).map_err(|broken| broken.at(path, 1))?;
        for (row, number) in rows.iter().zip(1..) {
            let row = record_as_written::<Row>(row.get().as_bytes()).and_then(Row::task);
            set.add(path, number, row);
        }
        return Ok(set);
    }
    for record in Lines::new(path, file) {
        let (line, text) = record?;
        set.add(
            path,
            line,
            record_as_written::<Row>(&text).and_then(Row::task),
        );
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> TaskSet {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mbpp.jsonl");
        std::fs::write(&path, text).unwrap();
        mbpp(&path).unwrap()
    }

    fn row(id: u32) -> Value {
        json!({
            "text": "Write a function to double.", "task_id": id, "challenge_test_list": [],
            "code": "def helper(x):\r\n  return x\r\ndef double (x):\r\n  return 2 * helper(x)",
            "test_setup_code": "",
            "test_list": ["assert double(2) == 4", "assert double(helper(1)) == 2"],
        })
    }

    #[test]
    fn the_first_test_is_shown_and_all_decide() {
        let set = read(&row(11).to_string());
        let task = &set.tasks[0];
        assert_eq!(
            (task.id.as_str(), task.entry_point.as_deref()),
            ("mbpp/11", Some("double"))
        );
        assert!(
            task.statement
                .ends_with("this test:\n\nassert double(2) == 4")
        );
        assert!(!task.statement.contains("helper"));
        assert_eq!(task.test_code.as_ref().unwrap().lines().count(), 2);
    }

    #[test]
    fn the_sanitized_list_is_read_too() {
        let sanitized = json!([
            {"source_file": "x.ipynb", "task_id": 2, "prompt": "Write it.", "code": "def f(): return 1",
             "test_imports": ["import math"], "test_list": ["assert math.isclose(f(), 1)"]},
            {"task_id": 3},
        ]);
        let set = read(&format!("\n{sanitized:#}"));
        assert_eq!((set.records, set.tasks.len()), (2, 1));
        let code = set.tasks[0].test_code.as_deref();
        assert_eq!(code, Some("import math\nassert math.isclose(f(), 1)\n"));
        assert!(
            set.refused[0].to_string().contains(":2: field `text`"),
            "{}",
            set.refused[0]
        );
    }

    #[test]
    fn the_authors_halves() {
        for (id, split) in [
            (1, Split::Train),
            (10, Split::Train),
            (11, Split::HeldOut),
            (600, Split::HeldOut),
            (601, Split::Train),
        ] {
            assert_eq!(
                read(&row(id).to_string()).tasks[0].split,
                Some(split),
                "{id}"
            );
        }
    }

    #[test]
    fn rows_that_cannot_be_graded_are_refused() {
        let with = |field: &str, value: Value| {
            let mut row = row(1);
            row[field] = value;
            row.to_string()
        };
        for (text, field) in [
            (
                with("test_setup_code", json!("root = Node(1)")),
                "test_setup_code",
            ),
            (with("test_list", json!([])), "test_list"),
            (
                with("test_list", json!(["assert redouble(2) == 4"])),
                "test_list[0]",
            ),
            (
                with("code", json!("double = lambda x: 2 * x")),
                "test_list[0]",
            ),
            (with("task_id", json!("one")), "task_id"),
        ] {
            let set = read(&text);
            let error = set.refused[0].to_string();
            assert!(
                error.contains(&format!("`{field}`")),
                "{error} should name {field}"
            );
        }
    }
}
