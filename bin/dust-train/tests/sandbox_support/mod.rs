//! What the sandbox's tests share.
#![allow(dead_code)]

use std::sync::OnceLock;

use dust_train::sandbox::{
    Layer, Limits, Mode, Outcome, Program, Sandbox, SandboxConfig, Test, Verdict,
};
use serde_json::Value;

/// One sandbox for all tests of a binary. Continuous integration may lack a layer; a test that
/// needs one asks `effective`.
pub fn sandbox() -> &'static Sandbox {
    static SANDBOX: OnceLock<Sandbox> = OnceLock::new();
    SANDBOX.get_or_init(|| {
        let config = SandboxConfig {
            allow_weak: Layer::ALL.to_vec(),
            ..Default::default()
        };
        let sandbox = Sandbox::new(config).expect("sandbox");
        eprintln!("{}", sandbox.effective());
        sandbox
    })
}

/// CPU time decides; the clock is far off, or a loaded host would decide instead.
pub fn limits() -> Limits {
    Limits {
        cpu_s: 1.0,
        wall_s: 30.0,
        memory_mb: 128,
        ..Default::default()
    }
}

pub fn stdin_program(source: &str, input: &str, output: &str) -> Program {
    Program {
        source: source.into(),
        mode: Mode::Stdin,
        entry_point: None,
        tests: vec![Test::stdin(input, output)],
        test_code: None,
    }
}

pub fn script(source: &str, input: &str, output: &str) -> Outcome {
    sandbox().run(&stdin_program(source, input, output), &limits())
}

pub fn function(source: &str, name: &str, arguments: &[Value], output: Value) -> Outcome {
    let program = Program {
        source: source.into(),
        mode: Mode::Function,
        entry_point: Some(name.into()),
        tests: vec![Test::function(arguments, &output)],
        test_code: None,
    };
    sandbox().run(&program, &limits())
}

pub fn assert_program(source: &str, entry_point: Option<&str>, test_code: &str) -> Program {
    Program {
        source: source.into(),
        mode: Mode::Assert,
        entry_point: entry_point.map(str::to_owned),
        tests: Vec::new(),
        test_code: Some(test_code.into()),
    }
}

pub fn asserts(source: &str, entry_point: Option<&str>, test_code: &str) -> Outcome {
    let program = assert_program(source, entry_point, test_code);
    sandbox().run(&program, &limits())
}

#[track_caller]
pub fn expect(outcome: Outcome, verdict: Verdict) {
    assert_eq!(outcome.verdict, verdict, "{outcome:#?}");
}
