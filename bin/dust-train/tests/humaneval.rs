//! HumanEval through the sandbox: every canonical solution passes; a body that returns `None` fails,
//! and a mutant fails exactly where it fails when Python runs it directly.

mod sandbox_support;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use dust_train::sandbox::{Limits, Mode, Outcome, Program, Verdict};
use dust_train::tasks::{HUMANEVAL_FILE, Task, load};
use sandbox_support::sandbox;
use serde::Deserialize;
use serde_json::json;

fn problems() -> Vec<Task> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let file = root.join(HUMANEVAL_FILE);
    assert!(
        file.exists(),
        "{} is missing: run `make humaneval`",
        file.display()
    );
    let set = load(&format!("humaneval:{}", file.display())).expect("HumanEval");
    assert!(set.refused.is_empty(), "{:?}", set.refused);
    assert_eq!(set.tasks.len(), 164);
    set.tasks
}

fn program(task: &Task, source: String) -> Program {
    Program {
        source,
        mode: Mode::Assert,
        entry_point: task.entry_point.clone(),
        tests: Vec::new(),
        test_code: task.test_code.clone(),
    }
}

/// Runs all. CPU time decides: the clock is left out, so that a loaded host changes nothing.
fn outcomes(programs: &[Program]) -> Vec<Outcome> {
    let limits = Limits {
        cpu_s: 2.0,
        wall_s: 600.0,
        ..Limits::default()
    };
    let mut outcomes = vec![None; programs.len()];
    sandbox().run_all(programs, &limits, |i, outcome| outcomes[i] = Some(outcome));
    outcomes.into_iter().map(|o| o.expect("ran")).collect()
}

#[test]
fn canonical_solutions_pass_and_empty_ones_fail() {
    let tasks = problems();
    let solution = |task: &Task| task.solution.clone().expect("a solution");
    let right: Vec<_> = tasks.iter().map(|t| program(t, solution(t))).collect();
    for (task, outcome) in tasks.iter().zip(outcomes(&right)) {
        assert_eq!(outcome.verdict, Verdict::Passed, "{} {outcome:#?}", task.id);
    }
    let empty = |task: &Task| {
        let prompt = task.starter_code.as_ref().expect("a prompt");
        program(task, format!("{prompt}\n    return None\n"))
    };
    let wrong: Vec<_> = tasks.iter().map(empty).collect();
    for (task, outcome) in tasks.iter().zip(outcomes(&wrong)) {
        // The test may also trip over the `None`, which is a failure, too.
        assert!(
            matches!(
                outcome.verdict,
                Verdict::WrongAnswer | Verdict::RuntimeError
            ),
            "{} {outcome:#?}",
            task.id
        );
    }
}

#[derive(Deserialize)]
struct Mutant {
    id: String,
    operator: String,
    program: String,
    /// When Python runs it directly, by HumanEval's own rule.
    passes: bool,
}

/// Changed comparisons, constants and operators of the canonical solutions.
fn mutants(tasks: &[Task]) -> Vec<Mutant> {
    let mut child = Command::new("python3")
        .args(["-I", "-S", "-c", include_str!("humaneval/mutants.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is needed");
    let mut stdin = child.stdin.take().expect("stdin");
    let requests: String = tasks
        .iter()
        .map(|task| {
            let row = json!({"id": task.id, "program": task.solution, "test": task.test_code,
                             "entry_point": task.entry_point});
            format!("{row}\n")
        })
        .collect();
    let feeder = std::thread::spawn(move || stdin.write_all(requests.as_bytes()));
    let output = child.wait_with_output().expect("mutants");
    feeder.join().expect("feeder").expect("stdin");
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str(line).expect("a mutant"))
        .collect()
}

/// Some mutants are equivalent to the solution, and some are wrong in ways that HumanEval's tests do
/// not look at. Neither is listed by hand: the rule is that a mutant which passes directly must pass
/// here, and every other must fail.
#[test]
fn mutants_fail_as_they_do_directly() {
    let tasks = problems();
    let by_id: HashMap<_, _> = tasks.iter().map(|task| (task.id.as_str(), task)).collect();
    let mutants = mutants(&tasks);
    let programs: Vec<_> = mutants
        .iter()
        .map(|mutant| program(by_id[mutant.id.as_str()], mutant.program.clone()))
        .collect();
    let mut killed: HashMap<&str, usize> = HashMap::new();
    for (mutant, outcome) in mutants.iter().zip(outcomes(&programs)) {
        let what = format!("{} {}\n{}", mutant.id, mutant.operator, mutant.program);
        assert_eq!(outcome.label(), Some(mutant.passes), "{what}\n{outcome:#?}");
        if !mutant.passes {
            *killed.entry(mutant.operator.as_str()).or_default() += 1;
        }
    }
    // So that an operator which finds no place any more is noticed.
    for operator in ["comparison", "constant", "arithmetic"] {
        assert!(killed.get(operator) >= Some(&90), "{killed:?}");
    }
}
