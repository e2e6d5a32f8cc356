//! Verdicts: honest programs pass, wrong ones fail in the way that they fail.

mod sandbox_support;

use dust_train::sandbox::{Limits, Mode, Program, Test, Verdict};
use sandbox_support::*;
use serde_json::{Value, json};

#[test]
fn scripts() {
    expect(
        script("print(int(input()) * 2)", "21\n", "42\n"),
        Verdict::Passed,
    );
    expect(script("print(1)", "", "2"), Verdict::WrongAnswer);
    expect(script("1/0", "", ""), Verdict::RuntimeError);
    expect(script("def f(:", "", ""), Verdict::RuntimeError);
    expect(
        script("print(1); raise SystemExit(3)", "", "1"),
        Verdict::RuntimeError,
    );
    expect(
        script("print(1); raise SystemExit", "", "1"),
        Verdict::Passed,
    );
    expect(script("while True: pass", "", ""), Verdict::Timeout);
    let short = Limits {
        wall_s: 1.0,
        ..limits()
    };
    let sleeps = stdin_program("import time\ntime.sleep(60)", "", "");
    expect(sandbox().run(&sleeps, &short), Verdict::Timeout);
    expect(script("x = 'a' * (1 << 30)", "", ""), Verdict::Memory);
    expect(
        script("while True: print('x' * 1000000)", "", ""),
        Verdict::OutputLimit,
    );
}

#[test]
fn functions() {
    let double = "def double(x): return x * 2";
    expect(
        function(double, "double", &[json!(4)], json!(8)),
        Verdict::Passed,
    );
    expect(
        function(double, "double", &[json!([1])], json!([1, 1])),
        Verdict::Passed,
    );
    expect(
        function(double, "double", &[json!(4)], json!(9)),
        Verdict::WrongAnswer,
    );
    expect(
        function(double, "triple", &[json!(4)], json!(9)),
        Verdict::RuntimeError,
    );
    let solution = "class Solution:\n  def f(self, a: List[int]) -> int:\n    return max(a)";
    expect(
        function(solution, "f", &[json!([1, 3])], json!(3)),
        Verdict::Passed,
    );
    expect(
        function("def f(): return (1, (2,))", "f", &[], json!([1, [2]])),
        Verdict::Passed,
    );
    expect(
        function("def f(): return object()", "f", &[], json!(1)),
        Verdict::WrongAnswer,
    );
    expect(
        function("def f(): exit(0)", "f", &[], json!(null)),
        Verdict::RuntimeError,
    );
    let mut test = Test::function(&[json!(25)], &Value::Null);
    test.output = "15511210043330985984000000".into();
    let program = Program {
        source: "def f(n): return math.factorial(n)".into(),
        mode: Mode::Function,
        entry_point: Some("f".into()),
        tests: vec![test],
        test_code: None,
    };
    expect(sandbox().run(&program, &limits()), Verdict::Passed);
}

#[test]
fn assertions() {
    let check = "def check(candidate):\n    assert candidate([3, 1]) == [1, 3]\n    assert candidate([]) == []";
    expect(
        asserts("def f(a): return sorted(a)", Some("f"), check),
        Verdict::Passed,
    );
    expect(
        asserts("def f(a): return a", Some("f"), check),
        Verdict::WrongAnswer,
    );
    expect(
        asserts("def f(a): return 1/0", Some("f"), check),
        Verdict::RuntimeError,
    );
    expect(asserts("1/0", Some("f"), check), Verdict::RuntimeError);
    expect(
        asserts("import os\nos._exit(0)", Some("f"), check),
        Verdict::RuntimeError,
    );
    expect(
        asserts("def f(a):\n  while True: pass", Some("f"), check),
        Verdict::Timeout,
    );
    let mbpp = "assert similar((3, 4), (5, 4)) == (4,)\nassert set(similar((1,), (1,))) == {1}";
    let similar = "def similar(a, b): return tuple(set(a) & set(b))";
    expect(asserts(similar, None, mbpp), Verdict::Passed);
    expect(
        asserts("def similar(a, b): return ()", None, mbpp),
        Verdict::WrongAnswer,
    );
    let raises = "try:\n  f()\n  assert False\nexcept ValueError:\n  pass";
    expect(
        asserts("def f(): raise ValueError('x')", None, raises),
        Verdict::Passed,
    );
    expect(
        asserts("def f(): raise KeyError('x')", None, raises),
        Verdict::RuntimeError,
    );
    expect(
        asserts("def f(g): return g", None, "f(lambda: 1)"),
        Verdict::InfraError,
    );
    expect(
        asserts("def f(g): return g", None, "assert ("),
        Verdict::InfraError,
    );
    // What the test misses is not the program's fault; what the program misses is.
    expect(
        asserts(
            "def f(): return 1",
            None,
            "import no_such_module\nassert f() == 1",
        ),
        Verdict::InfraError,
    );
    expect(
        asserts(
            "import no_such_module\ndef f(): return 1",
            None,
            "assert f() == 1",
        ),
        Verdict::RuntimeError,
    );
}

#[test]
fn exec_protocol() {
    let exec = |request: &str| {
        let mut reply = Vec::new();
        dust_train::sandbox::exec(sandbox(), request.as_bytes(), &mut reply)
            .map(|()| serde_json::from_slice::<Value>(&reply).expect("a reply"))
            .map_err(|error| format!("{error:#}"))
    };
    let reply = exec(
        r#"{"source": "def f(a, b): return a * b", "mode": "function", "entry_point": "f",
            "tests": [{"input": [2, 3], "output": 6}, {"input": [2, 2], "output": 5},
                      {"input": [99999999999, 99999999999], "output": 9999999999800000000001}],
            "limits": {"cpu_s": 1, "wall_s": 30}, "stop_at_first_failure": false}"#,
    )
    .expect("a verdict");
    assert_eq!(reply["verdict"], "wrong_answer");
    assert_eq!(reply["failed_test"], 1);
    let verdicts: Vec<_> = reply["tests"]
        .as_array()
        .expect("tests")
        .iter()
        .map(|t| &t["verdict"])
        .collect();
    assert_eq!(verdicts, ["passed", "wrong_answer", "passed"]);
    assert!(reply["effective"]["layers"].is_object());
    for (request, part) in [
        ("{", "not a request"),
        (
            r#"{"source": "", "mode": "stdin", "tests": [{"input": 1, "output": ""}]}"#,
            "tests[0].input",
        ),
        (
            r#"{"source": "", "mode": "stdin", "limits": {"cpu_s": -1}}"#,
            "limits.cpu_s",
        ),
        (
            r#"{"source": "", "mode": "stdin", "test": []}"#,
            "unknown field",
        ),
    ] {
        let error = exec(request).expect_err(request);
        assert!(error.contains(part), "{error}");
    }

    let requests: String = (0..20)
        .map(|i| format!("{{\"id\": {i}, \"source\": \"print({i})\", \"mode\": \"stdin\", \"tests\": [{{\"input\": \"\", \"output\": \"{}\"}}]}}\n", i % 10))
        .chain(["rubbish\n".to_owned()])
        .collect();
    let mut replies = Vec::new();
    dust_train::sandbox::serve(sandbox(), requests.as_bytes(), &mut replies).expect("serve");
    let replies = String::from_utf8(replies).expect("text");
    assert_eq!(replies.lines().count(), 21);
    for line in replies.lines() {
        let reply: Value = serde_json::from_str(line).expect("json");
        match reply["id"].as_u64() {
            Some(id) => assert_eq!(
                reply["verdict"],
                if id < 10 { "passed" } else { "wrong_answer" }
            ),
            None => assert!(reply["error"].is_string()),
        }
    }
}
