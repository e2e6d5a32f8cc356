//! Verdicts: honest programs pass, wrong ones fail in the way that they fail.

mod sandbox_support;

use dust_train::sandbox::{Mode, Program, Test, Verdict};
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
    expect(
        script("import time\ntime.sleep(60)", "", ""),
        Verdict::Timeout,
    );
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
}
