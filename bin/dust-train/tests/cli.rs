//! The program from outside: what it prints, its exit status, and what it leaves behind.

use std::borrow::Cow;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use assert_cmd::Command as Program;
use dust_train::checkpoint::{Checkpoint, Dtype, save};
use predicates::prelude::*;
use predicates::str::{contains, is_empty, starts_with};
use serde_json::{Value, json};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/tiny.gguf")
}

fn program() -> Program {
    let mut program = Program::new(env!("CARGO_BIN_EXE_dust-train"));
    program
        .env_remove("RUST_LOG")
        .timeout(std::time::Duration::from_secs(60));
    program
}

/// A command with the test model.
fn with_model(command: &str) -> Program {
    let mut program = program();
    program.args([command, "--model"]).arg(model());
    program
}

/// One line that begins with `error: `.
fn one_line() -> impl Predicate<str> {
    starts_with("error: ").and(predicate::function(|text: &str| text.lines().count() == 1))
}

fn score(input: &str) -> Program {
    let mut program = with_model("score");
    program
        .args(["--input", "-", "--output", "-"])
        .write_stdin(input);
    program
}

fn lines(out: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(out).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn every_command_explains_itself() {
    for command in ["doctor", "generate", "score", "judge", "bench"] {
        let help = program().args([command, "--help"]).assert().success();
        help.stdout(contains("Example").and(contains("--threads")));
    }
    program()
        .args(["tasks", "inspect", "--help"])
        .assert()
        .success();
    program().assert().code(2);
}

#[test]
fn the_doctor_ends_with_a_verdict() {
    let output = program().arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let verdict = text.lines().last().unwrap();
    match output.status.code() {
        Some(0) => assert!(verdict.starts_with("Ready: "), "{verdict}"),
        Some(1) => assert!(verdict.starts_with("Not ready: "), "{verdict}"),
        other => panic!("{other:?}"),
    }
    for name in [
        "SIMD in use",
        "Landlock",
        "python3",
        "back ends",
        "model cache",
    ] {
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn scores_do_not_depend_on_the_batch_and_keep_the_order() {
    let input = r#"{"id": {"deep": [1]}, "tokens": [5, 6, 7, 8, 9]}

{"id": "text", "text": "<|im_start|>user\nhi<|im_end|>"}
{"id": null, "tokens": [3]}
{"id": 4, "tokens": [9, 8, 7]}
"#;
    let packed = score(input).output().unwrap();
    assert!(packed.status.success(), "{packed:?}");
    let alone = score(input).args(["--batch-tokens", "1"]).output().unwrap();
    assert_eq!(packed.stdout, alone.stdout);
    let one_thread = score(input).args(["--threads", "1"]).output().unwrap();
    assert_eq!(packed.stdout, one_thread.stdout);

    let found = lines(&packed.stdout);
    let ids: Vec<_> = found.iter().map(|line| line["id"].clone()).collect();
    assert_eq!(
        ids,
        [json!({"deep": [1]}), json!("text"), Value::Null, json!(4)]
    );
    for line in &found {
        let len = |name: &str| line[name].as_array().unwrap().len();
        assert_eq!(len("logprobs"), len("tokens") - 1);
        assert_eq!(len("entropy"), len("tokens") - 1);
        assert!(
            line["logprobs"]
                .as_array()
                .unwrap()
                .iter()
                .all(|x| x.as_f64().unwrap() < 0.0)
        );
    }
    // The names of special tokens are tokens here, as in a rendered prompt.
    let tokenizer = Checkpoint::open(model().to_str().unwrap())
        .unwrap()
        .tokenizer()
        .unwrap();
    let expected = tokenizer
        .encode("<|im_start|>user\nhi<|im_end|>", true)
        .unwrap();
    assert_eq!(found[1]["tokens"], json!(expected));
}

#[test]
fn scores_are_a_distribution() {
    // The log-probabilities of all continuations of the same token sum to 1, and their mean
    // surprise is the entropy.
    let vocab = Checkpoint::open(model().to_str().unwrap())
        .unwrap()
        .config()
        .vocab_size;
    let input: String = (0..vocab)
        .map(|t| format!("{{\"id\": {t}, \"tokens\": [5, {t}]}}\n"))
        .collect();
    let output = score(&input).output().unwrap();
    let found = lines(&output.stdout);
    assert_eq!(found.len(), vocab);
    let logprobs: Vec<f64> = found
        .iter()
        .map(|l| l["logprobs"][0].as_f64().unwrap())
        .collect();
    let total: f64 = logprobs.iter().map(|l| l.exp()).sum();
    assert!((total - 1.0).abs() < 1e-5, "{total}");
    let entropy: f64 = logprobs.iter().map(|l| -l * l.exp()).sum();
    let stated = found[0]["entropy"][0].as_f64().unwrap();
    assert!((entropy - stated).abs() < 1e-4, "{entropy} {stated}");
}

#[test]
fn a_bad_line_is_named_and_nothing_is_written() {
    let good = r#"{"id": 1, "tokens": [1, 2]}"#;
    for (line, expected) in [
        (
            r#"{"id": 1, "tokens": [1, 99999999]}"#,
            ":2: tokens: token 99999999 at index 1",
        ),
        (
            r#"{"id": 1, "tokens": [1, -1]}"#,
            ":2: tokens[1]: invalid value",
        ),
        (r#"{"id": 1, "tokens": []}"#, ":2: tokens: has no tokens"),
        (r#"{"id": 1, "text": ""}"#, ":2: text: has no tokens"),
        (r#"{"id": 1}"#, ":2: tokens: is missing"),
        (r#"{"tokens": [1, 2]}"#, ":2: id: missing field"),
        (r#"{"id": 1, "token": [1]}"#, ":2: token: unknown field"),
        (
            r#"{"id": 1, "tokens": [1], "text": "a"}"#,
            ":2: tokens: stands beside",
        ),
        (r#"{"id": 1, "tokens": [1"#, ":2: tokens: EOF while parsing"),
        (r#"{"id": 1, "tokens": [1]} x"#, ":2: record: more text"),
        ("[1, 2]", ":2: "),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("out.jsonl");
        let mut run = with_model("score");
        run.args(["--input", "-", "--output"]).arg(&output);
        run.write_stdin(format!("{good}\n{line}\n"));
        let wanted = format!("error: standard input{expected}");
        run.assert()
            .code(2)
            .stdout(is_empty())
            .stderr(one_line().and(starts_with(wanted)));
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "{line}");

        let to_stdout = score(&format!("{good}\n{line}\n")).assert().code(2);
        to_stdout.stdout(is_empty());
    }
}

#[test]
fn bad_files_and_arguments_are_one_line() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("bytes"), b"ok\n\xff").unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path("model.gguf"), &fs::read(model()).unwrap()[..5000]).unwrap();
    let good = model().to_str().unwrap().to_owned();
    for (args, expected) in [
        (
            vec![
                "score",
                "--model",
                &good,
                "--input",
                &path("none"),
                "--output",
                "-",
            ],
            "none: file: cannot read",
        ),
        (
            vec![
                "score",
                "--model",
                &good,
                "--input",
                &path("bytes"),
                "--output",
                "-",
            ],
            "bytes: line 2: is not UTF-8",
        ),
        (
            vec![
                "score",
                "--model",
                &good,
                "--input",
                &path("empty"),
                "--output",
                "-",
            ],
            "empty: lines: there is none",
        ),
        (
            vec![
                "score",
                "--model",
                &good,
                "--input",
                &path("empty"),
                "--output",
                &path("no/out"),
            ],
            "out: file: cannot write",
        ),
        (
            vec![
                "score",
                "--model",
                &good,
                "--input",
                &path("empty"),
                "--output",
                &path(""),
            ],
            "is a folder",
        ),
        (
            vec![
                "score",
                "--model",
                &path("model.gguf"),
                "--input",
                &path("empty"),
                "--output",
                "-",
            ],
            "model.gguf",
        ),
        (
            vec![
                "score",
                "--model",
                "no such model",
                "--input",
                &path("empty"),
                "--output",
                "-",
            ],
            "no such model: model",
        ),
        (
            vec!["generate", "--model", &good, "--prompt", "", "--raw"],
            "--prompt: text: is empty",
        ),
        (
            vec![
                "generate", "--model", &good, "--prompt", "a", "--top-p", "0",
            ],
            "above 0 and at most 1",
        ),
        (
            vec![
                "generate",
                "--model",
                &good,
                "--prompt",
                "a",
                "--temperature",
                "nan",
            ],
            "from 0 on",
        ),
        (vec!["generate", "--model", &good], "--prompt <TEXT>"),
        (
            vec![
                "judge",
                "--model",
                &good,
                "--problem",
                &path("empty"),
                &path("bytes"),
                &path("empty"),
            ],
            "empty: text: is empty",
        ),
        (vec!["tasks", "inspect", &path("none")], "none: "),
        (vec!["tasks", "inspect", &path("bytes")], "bytes:1: field"),
        (vec!["score", "--threads", "0"], "0 is not in 1..=1024"),
    ] {
        let assert = program().args(&args).assert().code(2).stdout(is_empty());
        assert.stderr(one_line().and(contains(expected)));
    }
}

#[test]
fn a_seed_gives_the_same_text_whatever_runs_beside_it() {
    let generate = |args: &[&str]| {
        let mut run = with_model("generate");
        run.args([
            "--raw",
            "--prompt",
            "hi",
            "--max-tokens",
            "12",
            "--temperature",
            "1.5",
        ])
        .args(args);
        let output = run.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let one = generate(&["--seed", "7"]);
    assert_eq!(one, generate(&["--seed", "7"]));
    assert_ne!(one, generate(&["--seed", "8"]));
    let three = generate(&["--seed", "7", "--samples", "3"]);
    assert_eq!(three.matches("--- sample ").count(), 3);
    assert!(
        three.contains(&format!("--- sample 1 ---\n{one}")),
        "{one:?} {three:?}"
    );
}

#[test]
fn a_chat_ends_with_a_note_where_it_is_cut_off() {
    let mut run = with_model("generate");
    run.args(["--prompt", "-", "--max-tokens", "1", "--seed", "1"])
        .write_stdin("hi");
    run.assert().success().stderr(contains("prompt tokens"));
}

#[test]
fn the_judge_says_plainly_that_a_random_model_gives_no_ranking() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    fs::write(path("problem"), "Add two numbers.").unwrap();
    fs::write(path("a.py"), "a").unwrap();
    fs::write(path("b.py"), "b").unwrap();
    fs::write(
        path("run.toml"),
        "[model]\npath = \"m\"\n[judge]\nprefix = \"Ranking:\"\n",
    )
    .unwrap();
    let judge = |asked: &[&str]| {
        let mut run = with_model("judge");
        run.current_dir(&scratch).args(asked);
        let programs = ["--max-tokens", "4", "--problem", "problem", "a.py", "b.py"];
        let assert = run.args(programs).assert().success();
        String::from_utf8(assert.get_output().stdout.clone()).unwrap()
    };
    let reason = "No ranking: the answer is invalid, because the answer was cut off";
    let text = judge(&[]);
    assert!(text.contains(reason), "{text}");
    let text = judge(&["--config", "run.toml"]);
    assert!(text.contains("It answers:\nRanking:"), "{text}");
}

/// The test model in a folder, with room for longer texts than the original has.
fn long_model(folder: &Path) {
    let gguf = Checkpoint::open(model().to_str().unwrap()).unwrap();
    let mut config = gguf.config().clone();
    config.max_positions = 1024;
    let files = gguf.text_files().unwrap();
    save(folder, &config, Dtype::F32, &files, |name| {
        Ok(Cow::Owned(gguf.tensor(name)?.data))
    })
    .unwrap();
}

#[test]
fn the_benchmark_gives_every_figure() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("model");
    long_model(&folder);
    let bench = |args: &[&str]| {
        let mut run = program();
        run.args(["bench", "--rounds", "1", "--json", "--model"]);
        let output = run.arg(&folder).args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let [line] = lines(&output.stdout).try_into().unwrap();
        line
    };
    let speeds = bench(&["--dtype", "bf16"]);
    assert_eq!(speeds["dtype"], "bf16");
    for name in [
        "prefill_512",
        "decode_1",
        "decode_8",
        "decode_16",
        "train_4x512",
    ] {
        assert!(speeds[name].as_f64().unwrap() > 0.0, "{name}: {speeds}");
    }
    let steps = bench(&["--shared-prefix"]);
    let ratio =
        steps["unshared_step_s"].as_f64().unwrap() / steps["shared_step_s"].as_f64().unwrap();
    assert!(
        (ratio / steps["speedup"].as_f64().unwrap() - 1.0).abs() < 1e-9,
        "{steps}"
    );

    let short = with_model("bench").assert().code(2).stdout(is_empty());
    short.stderr(one_line().and(contains("context: the model's context is 256")));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dust-train"))
        .args(["tasks", "inspect", "builtin"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), text.as_str()), (Some(0), ""));
}
