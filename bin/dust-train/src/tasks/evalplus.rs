//! HumanEval+ and MBPP+ as EvalPlus ships them: `{task_id, prompt, entry_point, canonical_solution,
//! base_input, plus_input, atol}`, one a line, plain or gzipped.
//!
//! A row has inputs and a reference solution but no outputs. The test code (`evalplus.py`) runs the
//! reference beside the comparison, in the box that no program enters, so that expected values are
//! made where they are needed and nowhere else.

use std::path::Path;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::jsonl::{Lines, open, record_as_written};
use super::{Broken, Mode, Task, TaskError, TaskSet};

const HARNESS: &str = include_str!("evalplus.py");

/// The inputs stay text: Python reads them, integers of any size included.
#[derive(Deserialize)]
struct Row {
    task_id: String,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    base_input: Box<RawValue>,
    plus_input: Box<RawValue>,
    atol: f64,
}

impl Row {
    fn task(self) -> Result<Task, Broken> {
        let mbpp = match self.task_id.split_once('/') {
            Some(("HumanEval", _)) => None,
            Some(("Mbpp", number)) => number.parse::<u32>().ok(),
            _ => None,
        };
        if mbpp.is_none() && !self.task_id.starts_with("HumanEval/") {
            return Err(Broken::new(
                "task_id",
                format!("`{}` is not of HumanEval+ or MBPP+", self.task_id),
                "give HumanEvalPlus.jsonl or MbppPlus.jsonl, version 0.2.0 or later",
            ));
        }
        // `{}` is the empty input of a problem that has none beyond the base.
        let list = |name: &str, value: &RawValue| match value.get().trim_start().as_bytes() {
            [b'[', ..] => Ok(value.get().to_owned()),
            b"{}" => Ok("[]".to_owned()),
            _ => Err(Broken::new(
                name,
                "is not a list",
                "correct the line or remove it",
            )),
        };
        let reference = format!("{}{}", self.prompt, self.canonical_solution);
        let problem = format!(
            r#"{{"reference": {}, "entry_point": {}, "atol": {}, "mbpp": {}, "base_input": {}, "plus_input": {}}}"#,
            quoted(&reference),
            quoted(&self.entry_point),
            self.atol,
            mbpp.map_or("null".to_owned(), |number| number.to_string()),
            list("base_input", &self.base_input)?,
            list("plus_input", &self.plus_input)?,
        );
        // A JSON string is a Python string, too.
        let test_code = format!(
            "import json\nPROBLEM = json.loads({})\n{HARNESS}",
            quoted(&problem)
        );
        let statement = match mbpp {
            // The prompt is a docstring and nothing else.
            Some(_) => self
                .prompt
                .trim()
                .trim_matches(['"', '\''])
                .trim()
                .to_owned(),
            None => self.prompt.trim_end().to_owned(),
        };
        let task = Task {
            id: self.task_id.replacen('/', "+/", 1),
            statement,
            starter_code: mbpp.is_none().then_some(self.prompt),
            mode: Mode::Assert,
            entry_point: Some(self.entry_point),
            tests: Vec::new(),
            test_code: Some(test_code),
            difficulty: None,
            split: None,
            date: None,
            solution: Some(reference),
        };
        task.check()?;
        Ok(task)
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Reads `HumanEvalPlus.jsonl` or `MbppPlus.jsonl`, plain or gzipped.
pub fn evalplus(path: &Path) -> Result<TaskSet, TaskError> {
    let mut set = TaskSet::empty(path);
    for record in Lines::new(path, open(path)?) {
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
    use serde_json::json;

    fn read(rows: &[String]) -> TaskSet {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plus.jsonl");
        std::fs::write(&path, rows.join("\n")).unwrap();
        evalplus(&path).unwrap()
    }

    fn row(id: &str, prompt: &str) -> String {
        json!({
            "task_id": id, "prompt": prompt, "entry_point": "f", "contract": "",
            "canonical_solution": "    return x\n", "base_input": [[1]], "plus_input": [[2], [3]],
            "atol": 0,
        })
        .to_string()
    }

    #[test]
    fn both_sets_become_assert_tasks() {
        let set = read(&[
            row("HumanEval/3", "def f(x):\n    \"\"\"Same.\"\"\"\n"),
            row("Mbpp/2", "\"\"\"\nWrite f.\nassert f(1) == 1\n\"\"\"\n"),
        ]);
        assert!(set.refused.is_empty(), "{:?}", set.refused);
        let [human, mbpp] = &set.tasks[..] else {
            panic!("{:?}", set.tasks)
        };
        assert_eq!(
            (human.id.as_str(), mbpp.id.as_str()),
            ("HumanEval+/3", "Mbpp+/2")
        );
        assert_eq!(
            human.starter_code.as_deref(),
            Some("def f(x):\n    \"\"\"Same.\"\"\"\n")
        );
        assert_eq!(mbpp.starter_code, None);
        assert_eq!(mbpp.statement, "Write f.\nassert f(1) == 1");
        assert!(
            human
                .test_code
                .as_ref()
                .unwrap()
                .contains("\\\"mbpp\\\": null")
        );
        assert!(mbpp.test_code.as_ref().unwrap().contains("\\\"mbpp\\\": 2"));
    }

    #[test]
    fn large_integers_are_kept_and_bad_rows_refused() {
        let good =
            row("HumanEval/3", "def f(x):\n").replace("[1]", "[123456789012345678901234567890]");
        let set = read(&[
            good,
            row("Other/3", "def f(x):\n"),
            row("Mbpp/2", "\"\"\"w\"\"\"").replace("\"f\"", "\"f()\""),
            row("Mbpp/2", "\"\"\"w\"\"\"").replace("[[1]]", "1"),
            row("Mbpp/2", "\"\"\"w\"\"\"").replace("[[1]]", "[[NaN]]"),
            row("Mbpp/2", "\"\"\"w\"\"\"").replace("\"atol\"", "\"tolerance\""),
        ]);
        let code = set.tasks[0].test_code.as_ref().unwrap();
        assert!(code.contains("[[123456789012345678901234567890]]"));
        let fields = [
            "`task_id`",
            "`entry_point`",
            "`base_input`",
            "`record`",
            "`atol`",
        ];
        assert_eq!(set.refused.len(), fields.len());
        for (error, field) in set.refused.iter().zip(fields) {
            assert!(
                error.to_string().contains(field),
                "{error} should name {field}"
            );
        }
    }
}
