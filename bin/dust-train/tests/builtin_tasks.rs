//! The built-in problems: every solution passes its tests, and an answer that does nothing fails
//! every one of them.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use dust_train::tasks::{Difficulty, Mode, Split, Task, load};

/// Runs every (source, tests) pair and prints a line with the share of the tests passed.
const RUNNER: &str = r#"
import json, sys
for line in sys.stdin:
    task = json.loads(line)
    space = {}
    exec(task["source"], space)
    f = space[task["entry_point"]]
    passed = sum(f(*t["input"]) == t["output"] for t in task["tests"])
    print(passed, len(task["tests"]))
"#;

fn passed(tasks: &[Task], source: impl Fn(&Task) -> String) -> Vec<(usize, usize)> {
    let mut child = Command::new("python3")
        .args(["-I", "-c", RUNNER])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is needed");
    let mut stdin = child.stdin.take().unwrap();
    for task in tasks {
        let request = serde_json::json!({
            "source": source(task), "entry_point": task.entry_point, "tests": task.tests,
        });
        writeln!(stdin, "{request}").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    let results: Vec<_> = lines
        .lines()
        .map(|line| {
            let (a, b) = line.split_once(' ').unwrap();
            (a.parse().unwrap(), b.parse().unwrap())
        })
        .collect();
    assert_eq!(results.len(), tasks.len());
    results
}

#[test]
fn every_solution_passes_and_doing_nothing_fails() {
    let tasks = load("builtin").unwrap().tasks;
    let right = passed(&tasks, |task| task.program(task.solution.as_ref().unwrap()));
    let wrong = passed(&tasks, |task| {
        format!("{}\n    return None\n", task.starter_code.as_ref().unwrap())
    });
    for ((task, right), wrong) in tasks.iter().zip(right).zip(wrong) {
        assert_eq!(right.0, right.1, "{}: the solution fails", task.id);
        assert_eq!(wrong.0, 0, "{}: `return None` passes a test", task.id);
    }
}

#[test]
fn the_set_is_large_varied_and_split() {
    let tasks = load("builtin").unwrap().tasks;
    assert!(tasks.len() >= 64);
    let mut strata: BTreeMap<Difficulty, [usize; 2]> = BTreeMap::new();
    for task in &tasks {
        let name = task.entry_point.as_ref().unwrap();
        assert_eq!(task.mode, Mode::Function);
        assert!(task.statement.contains(&format!("`{name}(")), "{name}");
        assert!(
            task.starter_code
                .as_ref()
                .unwrap()
                .starts_with(&format!("def {name}("))
        );
        assert!((6..=10).contains(&task.tests.len()), "{name}");
        let inputs: std::collections::HashSet<_> =
            task.tests.iter().map(|t| t.input.to_string()).collect();
        assert_eq!(inputs.len(), task.tests.len(), "{name} repeats a test");
        let half = usize::from(task.split.unwrap() == Split::HeldOut);
        strata.entry(task.difficulty.unwrap()).or_default()[half] += 1;
    }
    assert_eq!(strata.len(), 3);
    for (difficulty, [train, held_out]) in strata {
        let share = held_out as f64 / (train + held_out) as f64;
        assert!((0.25..0.4).contains(&share), "{difficulty}: {share}");
    }
}
