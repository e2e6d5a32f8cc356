//! HumanEval: `{task_id, prompt, entry_point, canonical_solution, test}`, one a line. The prompt is
//! the head of a function with its documentation; `test` defines `check(candidate)`.
//!
//! Some tests call helpers that only the prompt defines (`poly`, `encode_cyclic`). The test code
//! therefore starts with the prompt, its last function closed by `pass`: what the test relies on is
//! never the program's own.

use std::path::Path;

use serde::Deserialize;

use super::jsonl::{Lines, open, record_from};
use super::{Broken, Mode, Task, TaskError, TaskSet};

/// Fields that other editions of the set add are ignored.
#[derive(Deserialize)]
struct Row {
    task_id: String,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    test: String,
}

impl Row {
    fn task(self) -> Result<Task, Broken> {
        let task = Task {
            id: self.task_id,
            statement: self.prompt.trim_end().to_owned(),
            solution: Some(format!("{}{}", self.prompt, self.canonical_solution)),
            test_code: Some(format!("{}\n    pass\n{}", self.prompt, self.test)),
            starter_code: Some(self.prompt),
            mode: Mode::Assert,
            entry_point: Some(self.entry_point),
            tests: Vec::new(),
            difficulty: None,
            split: None,
            date: None,
        };
        task.check()?;
        Ok(task)
    }
}

/// Reads `HumanEval.jsonl`, plain or gzipped.
pub fn humaneval(path: &Path) -> Result<TaskSet, TaskError> {
    let mut set = TaskSet::empty(path);
    for record in Lines::new(path, open(path)?) {
        let (line, text) = record?;
        set.add(path, line, record_from::<Row>(&text).and_then(Row::task));
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_assert_tasks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("HumanEval.jsonl");
        let row = serde_json::json!({
            "task_id": "HumanEval/0", "prompt": "import math\n\ndef f(x):\n    \"\"\"Double.\"\"\"\n",
            "entry_point": "f", "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n", "atol": 0,
        });
        let bad = row.to_string().replace("\"f\"", "\"\"");
        std::fs::write(&path, format!("{row}\n{bad}\n{{}}\n")).unwrap();
        let set = humaneval(&path).unwrap();
        assert_eq!((set.records, set.tasks.len(), set.refused.len()), (3, 1, 2));
        let task = &set.tasks[0];
        assert_eq!(
            (task.mode, task.entry_point.as_deref()),
            (Mode::Assert, Some("f"))
        );
        assert_eq!(
            task.solution.as_deref(),
            Some("import math\n\ndef f(x):\n    \"\"\"Double.\"\"\"\n    return 2 * x\n")
        );
        assert_eq!(
            task.test_code.as_deref(),
            Some(
                "import math\n\ndef f(x):\n    \"\"\"Double.\"\"\"\n\n    pass\n\
                 def check(candidate):\n    assert candidate(2) == 4\n"
            )
        );
        assert_eq!(
            task.program("def f(x):\n    return x\n"),
            "import math\n\ndef f(x):\n    return x\n"
        );
        assert!(
            set.refused[0]
                .to_string()
                .contains(":2: field `entry_point`")
        );
        assert!(set.refused[1].to_string().contains(":3: field `task_id`"));
    }
}
