//! HumanEval+ and MBPP(+) through the sandbox: what the readers make of a row grades programs by the
//! publishers' rules.

mod sandbox_support;

use std::path::Path;

use dust_train::sandbox::{Program, Verdict};
use dust_train::tasks::{Task, TaskSet, evalplus, mbpp};
use sandbox_support::{assert_program, limits, sandbox};
use serde_json::{Value, json};

fn read(
    rows: &[Value],
    reader: fn(&Path) -> Result<TaskSet, dust_train::tasks::TaskError>,
) -> Vec<Task> {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("rows.jsonl");
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(&path, text).expect("rows");
    let set = reader(&path).expect("a file");
    assert!(set.refused.is_empty(), "{:?}", set.refused);
    set.tasks
}

fn program(task: &Task, source: &str) -> Program {
    let test_code = task.test_code.as_ref().expect("a test");
    assert_program(
        &task.program(source),
        task.entry_point.as_deref(),
        test_code,
    )
}

#[track_caller]
fn graded(task: &Task, source: &str, verdict: Verdict) {
    let outcome = sandbox().run(&program(task, source), &limits());
    assert_eq!(
        outcome.verdict, verdict,
        "{}\n{source}\n{outcome:#?}",
        task.id
    );
}

#[track_caller]
fn right(task: &Task, source: &str) {
    graded(task, source, Verdict::Passed);
}

#[track_caller]
fn wrong(task: &Task, source: &str) {
    graded(task, source, Verdict::WrongAnswer);
}

fn plus(id: &str, name: &str, reference: &str, inputs: Value, atol: f64) -> Value {
    let prompt = match id.starts_with("Mbpp") {
        true => format!("\"\"\"\nWrite {name}.\n\"\"\"\n"),
        false => format!("def {name}(*a):\n    \"\"\"It.\"\"\"\n"),
    };
    json!({
        "task_id": id, "prompt": prompt, "entry_point": name, "canonical_solution": reference,
        "contract": "", "base_input": inputs, "plus_input": [], "atol": atol,
    })
}

#[test]
fn humaneval_plus() {
    let tasks = read(
        &[
            plus(
                "HumanEval/1",
                "double",
                "    return a[0] * 2\n",
                json!([[1], [[3]], [10_u64.pow(18)]]),
                0.0,
            ),
            plus(
                "HumanEval/2",
                "third",
                "    return a[0] / 3\n",
                json!([[1], [2]]),
                0.0,
            ),
            plus(
                "HumanEval/3",
                "near",
                "    return [a[0], 2]\n",
                json!([[1.0]]),
                0.01,
            ),
            plus(
                "HumanEval/32",
                "find_zero",
                "    return 1.0\n",
                json!([[[-4, 2]]]),
                1e-4,
            ),
            plus(
                "HumanEval/5",
                "grow",
                "    a[0].append(1)\n    return a[0]\n",
                json!([[[]], [[5]]]),
                0.0,
            ),
        ],
        evalplus,
    );
    for task in &tasks[..3] {
        right(task, task.solution.as_deref().expect("a solution"));
        wrong(
            task,
            &format!(
                "def {}(x): return None",
                task.entry_point.as_deref().expect("name")
            ),
        );
    }
    right(&tasks[0], "    return a[0] + a[0]\n");
    wrong(&tasks[0], "def double(x): return x * 2.5");
    // Floats that were expected are compared with a tolerance, their type is not.
    right(&tasks[1], "def third(x): return x / 3 + 1e-8");
    wrong(&tasks[1], "def third(x): return x / 3 + 1e-5");
    wrong(&tasks[1], "def third(x): return str(x / 3)");
    right(&tasks[2], "def near(x): return [x + 0.001, 2]");
    wrong(&tasks[2], "def near(x): return (x + 0.001, 2)");
    wrong(&tasks[2], "def near(x): return [x + 0.001]");
    // Any zero will do, whatever the reference returns.
    right(&tasks[3], "def find_zero(xs): return 2.0");
    wrong(&tasks[3], "def find_zero(xs): return 1.0");
    // What the program does to its arguments does not change the expected value.
    right(&tasks[4], "def grow(a):\n    a.append(1)\n    return a");
}

#[test]
fn mbpp_plus() {
    let tasks = read(
        &[
            plus(
                "Mbpp/2",
                "similar_elements",
                "def similar_elements(a, b): return tuple(set(a) & set(b))",
                json!([[[3, 4], [4, 3]]]),
                0.0,
            ),
            plus(
                "Mbpp/63",
                "f",
                "def f(a): return max(abs(x - y) for x, y in a)",
                json!([[[[3, 5], [1, 7]]]]),
                0.0,
            ),
            plus(
                "Mbpp/124",
                "f",
                "import cmath\ndef f(a, b): return cmath.phase(complex(a, b.imag))",
                json!([["0", "1j"]]),
                0.0,
            ),
            plus(
                "Mbpp/737",
                "check_str",
                "import re\ndef check_str(s): return re.match('a', s)",
                json!([["ab"], ["b"]]),
                0.0,
            ),
            plus(
                "Mbpp/581",
                "surface_Area",
                "def surface_Area(b, s): return 2 * b * s + b * b",
                json!([[3, 4]]),
                0.0,
            ),
            plus(
                "Mbpp/164",
                "are_equivalent",
                "def are_equivalent(a, b): return a == b",
                json!([[1, 2]]),
                0.0,
            ),
            plus(
                "Mbpp/295",
                "sum_div",
                "def sum_div(n): return 1",
                json!([[1]]),
                0.0,
            ),
            plus(
                "Mbpp/558",
                "digit_distance_nums",
                "def digit_distance_nums(a, b): return 0",
                json!([[1, 23]]),
                0.0,
            ),
            plus(
                "Mbpp/115",
                "f",
                "def f(a): return all(not d for d in a)",
                json!([[[[], [1]]]]),
                0.0,
            ),
            plus(
                "Mbpp/580",
                "f",
                "def f(a): return a",
                json!([[[1, [2, [3]]]]]),
                0.0,
            ),
            plus(
                "Mbpp/722",
                "f",
                "def f(d, n): return {k: v for k, v in d.items() if v[0] > n}",
                json!([[{"a": [3, 1]}, 2]]),
                0.0,
            ),
        ],
        evalplus,
    );
    let solution = |task: &Task| task.solution.clone().expect("a solution");
    for task in &tasks {
        right(task, &solution(task));
    }
    let [
        sets,
        tuples,
        complex,
        something,
        area,
        any,
        zero,
        digits,
        falsy,
        deep,
        values,
    ] = &tasks[..]
    else {
        panic!("{}", tasks.len())
    };
    right(sets, "def similar_elements(a, b): return [4, 3, 3]");
    wrong(sets, "def similar_elements(a, b): return [4]");
    right(
        tuples,
        "def f(a):\n    assert type(a) is list and type(a[0]) is tuple\n    return 6",
    );
    right(
        complex,
        "def f(a, b):\n    assert type(a) is float and type(b) is complex\n    return 1.5707963267948966",
    );
    right(something, "def check_str(s): return s.startswith('a')");
    right(
        something,
        "def check_str(s): return 'yes' if s[0] == 'a' else None",
    );
    wrong(something, "def check_str(s): return 'no'");
    // By the perpendicular height, too, and by nothing else.
    right(area, "def surface_Area(b, h): return 35");
    wrong(area, "def surface_Area(b, h): return 34");
    right(any, "def are_equivalent(a, b): return 'anything'");
    right(zero, "def sum_div(n): return 0");
    right(digits, "def digit_distance_nums(a, b): return 4");
    wrong(digits, "def digit_distance_nums(a, b): return 5");
    right(
        falsy,
        "def f(a):\n    assert a == [{}, {1}]\n    return False",
    );
    right(
        deep,
        "def f(a):\n    assert a == (1, (2, (3,)))\n    return a",
    );
    wrong(deep, "def f(a): return [1, [2, [3]]]");
    right(
        values,
        "def f(d, n):\n    assert d == {'a': (3, 1)}\n    return d",
    );
}

#[test]
fn mbpp_tests_decide_and_are_not_all_shown() {
    let tasks = read(
        &[json!({
            "text": "Write a function to double.", "task_id": 601, "code": "def double(x):\r\n  return 2 * x",
            "test_setup_code": "", "challenge_test_list": [],
            "test_list": ["assert double(2) == 4", "assert double('a') == 'aa'"],
        })],
        mbpp,
    );
    right(&tasks[0], "def double(x): return x + x");
    wrong(&tasks[0], "def double(x): return 4");
    wrong(&tasks[0], "def double(x): return 4 if x == 2 else None");
    graded(&tasks[0], "def other(x): return 4", Verdict::RuntimeError);
}

#[test]
fn inspect_shows_what_was_read_and_what_was_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("plus.jsonl");
    let good = plus("Mbpp/3", "f", "def f(a): return a", json!([[1]]), 0.0);
    let bad = plus("Mbpp/4", "f()", "def f(a): return a", json!([[1]]), 0.0);
    std::fs::write(&path, format!("{good}\n{bad}\n{{}}\n")).expect("rows");
    let spec = format!("mbpp+:{}", path.display());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_dust-train"))
        .args(["tasks", "inspect", &spec])
        .output()
        .expect("dust-train");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for part in [
        "1 problems of 3 records, 2 refused",
        "0 function, 0 stdin, 1 assert",
        "plus.jsonl:2: field `entry_point`: `f()` is not a Python identifier",
        "plus.jsonl:3: field `task_id`: missing field",
    ] {
        assert!(text.contains(part), "{text} should say {part}");
    }
}
