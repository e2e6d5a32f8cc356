//! The stages of DuST from outside, on a tiny random model and candidates made by hand: real labels,
//! real training, a real kill.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dust_train::checkpoint::{Checkpoint, Dtype, save};
use dust_train::tasks::{Split, builtin};
use serde_json::{Value, json};

/// The tiny model with room for long prompts, as a folder.
fn model(dir: &Path) -> PathBuf {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/tiny.gguf");
    let tiny = Checkpoint::open(gguf.to_str().unwrap()).unwrap();
    let mut config = tiny.config().clone();
    config.max_positions = 8192;
    let folder = dir.join("tiny");
    save(
        &folder,
        &config,
        Dtype::F32,
        &tiny.text_files().unwrap(),
        |name| Ok(Cow::Owned(tiny.tensor(name)?.data)),
    )
    .unwrap();
    folder
}

/// A run folder with a configuration and four candidates, two of them right, for three problems.
fn begin(dir: &Path, name: &str, steps: usize) -> PathBuf {
    begin_with(dir, name, &format!("steps = {steps}\nlearning_rate = 1e-3"))
}

/// The same with other lines under `[train]`.
fn begin_with(dir: &Path, name: &str, train: &str) -> PathBuf {
    let folder = dir.join("tiny");
    let model = if folder.exists() { folder } else { model(dir) };
    let config = format!(
        "seed = 3\n\
         [model]\npath = {:?}\nbatch = 4\nmicro_batch_tokens = 8192\n\
         [tasks]\nmax_eval = 1\n\
         [sample]\ncandidates = 4\n[sample.sampling]\nmax_tokens = 8\n\
         [judge]\nprefix = \"Ranking: 2 > 1 > 4 > 3\"\nmax_tokens = 3\n\
         [train]\n{train}\nprompts = 2\nmini_batch = 1\nepochs = 2\njudgments = 2\n\
         warmup_steps = 1\ncheckpoint_every = 2\n\
         [eval]\nrepeats = 1\n",
        model.to_str().unwrap()
    );
    let run = dir.join(name);
    fs::create_dir(&run).unwrap();
    fs::write(dir.join(format!("{name}.toml")), config).unwrap();
    let mut lines = String::new();
    for task in builtin().unwrap() {
        if task.split != Some(Split::Train) || lines.lines().count() == 12 {
            continue;
        }
        let entry = task.entry_point.as_deref().unwrap();
        let wrong = format!("def {entry}(*arguments):\n    return 'wrong'");
        let right = task.solution.clone().unwrap();
        for (sample, program) in [&right, &wrong, &wrong, &right].into_iter().enumerate() {
            let line = json!({"problem": task.id, "sample": sample, "program": program,
                "tokens": 9, "finish": "stop_token", "mean_logprob": -0.5});
            lines += &format!("{line}\n");
        }
    }
    fs::write(run.join("candidates.jsonl"), lines).unwrap();
    run
}

fn command(stage: &str, run: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dust-train"));
    command
        .arg(stage)
        .arg("--run")
        .arg(run)
        .arg("--config")
        .arg(run.with_extension("toml"));
    // Not every machine lets a test have a cgroup; the sandbox's own tests hold it to all layers.
    command.args(["--sandbox", "allow-weak=cgroup"]);
    command
}

fn succeed(stage: &str, run: &Path) -> String {
    let output = command(stage, run).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stage}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The log without what depends on the clock and the machine.
fn log(run: &Path) -> Vec<Value> {
    fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            for key in [
                "seconds",
                "rollout_tokens_per_s",
                "train_tokens_per_s",
                "peak_memory_mib",
            ] {
                assert!(line.as_object_mut().unwrap().remove(key).is_some(), "{key}");
            }
            line
        })
        .collect()
}

#[test]
fn all_stages_run_and_their_files_fit() {
    let dir = tempfile::tempdir().unwrap();
    let run = begin(dir.path(), "run", 2);
    let table = succeed("run", &run);
    for row in [
        "pass@1",
        "NDCG, mixed groups",
        "Best-of-4",
        "random pick",
        "oracle",
    ] {
        assert!(table.contains(row), "{table}");
    }
    let verdicts = fs::read_to_string(run.join("verdicts.jsonl")).unwrap();
    assert_eq!(verdicts.matches("passed").count(), 6, "{verdicts}");
    assert_eq!(verdicts.matches("wrong_answer").count(), 6, "{verdicts}");
    let groups = fs::read_to_string(run.join("groups.jsonl")).unwrap();
    assert_eq!(groups.lines().count(), 3);
    for line in log(&run) {
        assert_eq!(line["mismatch"], 0.0, "rollout and training differ: {line}");
    }
    assert!(run.join("report.html").exists() && run.join("report.svg").exists());
    // The same run again beside itself; another with other groups is refused.
    let compare = |other: &Path| {
        Command::new(env!("CARGO_BIN_EXE_dust-train"))
            .arg("compare")
            .args([&run, &other.to_path_buf()])
            .output()
            .unwrap()
    };
    let output = compare(&run);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("NDCG, mixed groups") && text.contains("± 0.0"),
        "{text}"
    );
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    for entry in fs::read_dir(&run).unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            fs::copy(entry.path(), other.join(entry.file_name())).unwrap();
        }
    }
    let manifest = fs::read_to_string(other.join("manifest.json")).unwrap();
    let changed = manifest.replace("\"groups_sha256\": \"", "\"groups_sha256\": \"0");
    fs::write(other.join("manifest.json"), changed).unwrap();
    let output = compare(&other);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("groups_sha256"));
    fs::write(other.join("manifest.json"), manifest).unwrap();
    let eval = fs::read_to_string(other.join("eval-after.json")).unwrap();
    let changed = eval.replace("judge.max_tokens = 3", "judge.max_tokens = 4");
    fs::write(other.join("eval-after.json"), changed).unwrap();
    let output = compare(&other);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains("measured otherwise (judge.max_tokens = 4)"),
        "{error}"
    );
    // The trained model is a model like any other.
    let trained = Checkpoint::open(run.join("model").to_str().unwrap()).unwrap();
    assert_eq!(trained.config().layers, 2);
    // Everything is there: a second run has nothing to do.
    let before = fs::metadata(run.join("model/model.safetensors")).unwrap();
    succeed("run", &run);
    let after = fs::metadata(run.join("model/model.safetensors")).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
    // What a stage has used is frozen, and nothing else.
    let with = |field: &str| {
        let mut command = command("run", &run);
        command.args(["--set", field]).output().unwrap()
    };
    let output = with("train.learning_rate=0.5");
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        error.contains("train.learning_rate was 0.001 when `train`, `eval --after` ran"),
        "{error}"
    );
    assert!(with("model.batch=3").status.success());
    assert!(with("train.checkpoint_every=1").status.success());
}

#[test]
fn seeds_of_one_arm_share_groups_and_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let one = begin(dir.path(), "one", 1);
    succeed("run", &one);
    let groups = one.join("groups.jsonl");
    let two = |file: &Path, seed: &str| {
        let run = dir.path().join("two");
        fs::copy(one.with_extension("toml"), run.with_extension("toml")).unwrap();
        let mut command = command("run", &run);
        command.arg("--groups").arg(file).args(["--set", seed]);
        command.output().unwrap()
    };
    let refuse = |file: &Path, seed: &str, words: &str| {
        let output = two(file, seed);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(words), "{error}");
        assert!(!dir.path().join("two/groups.jsonl").exists());
    };
    // A problem that is measured must not be trained on, whatever its file says.
    let text = fs::read_to_string(&groups).unwrap();
    let held_out = builtin().unwrap();
    let held_out = held_out.iter().find(|t| t.split == Some(Split::HeldOut));
    let mut group: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    group["problem"] = json!(held_out.unwrap().id);
    let bad = dir.path().join("bad.jsonl");
    fs::write(&bad, format!("{text}{group}\n")).unwrap();
    refuse(&bad, "train.seed=2", "line 4: problem: ");
    fs::write(&bad, "").unwrap();
    refuse(&bad, "train.seed=2", "holds no group");
    refuse(&groups, "group.size=3", "line 1: has 4 programs");

    let output = two(&groups, "train.seed=2");
    assert!(output.status.success(), "{output:?}");
    let two = dir.path().join("two");
    assert!(!two.join("candidates.jsonl").exists());
    let manifest = fs::read_to_string(two.join("manifest.json")).unwrap();
    assert!(manifest.contains("\"sandbox\""), "{manifest}");
    assert_eq!(
        fs::read(two.join("groups.jsonl")).unwrap(),
        fs::read(&groups).unwrap()
    );
    let judgments = |run: &Path| log(run)[0].clone();
    assert_ne!(judgments(&one), judgments(&two), "the seed changes nothing");
    let before = |run: &Path| fs::read(run.join("eval-before.json")).unwrap();
    assert!(
        before(&one) == before(&two),
        "the seed of training changes the measurement"
    );
    let output = Command::new(env!("CARGO_BIN_EXE_dust-train"))
        .arg("compare")
        .args([&one, &two])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_killed_training_goes_on_to_the_same_bits() {
    const STEPS: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let whole = begin(dir.path(), "whole", STEPS);
    let killed = begin(dir.path(), "killed", STEPS);
    for run in [&whole, &killed] {
        succeed("label", run);
        succeed("group", run);
    }
    succeed("train", &whole);

    let mut child = command("train", &killed)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let partial = killed.join("metrics.jsonl.partial");
    let steps = || fs::read_to_string(&partial).map_or(0, |text| text.lines().count());
    while steps() < 5 {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "training does not begin"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(steps() < STEPS, "the kill came too late to show anything");
    assert!(!killed.join("model").exists());
    succeed("train", &killed);

    assert_eq!(log(&whole), log(&killed));
    let weights = |run: &Path| fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&killed), "the weights differ");
}

#[test]
fn a_training_that_was_killed_at_its_very_end_is_completed() {
    let dir = tempfile::tempdir().unwrap();
    let run = grouped(dir.path(), "run", "steps = 10000\nlearning_rate = 1e-3");
    let mut child = command("train", &run)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let partial = run.join("metrics.jsonl.partial");
    let steps = || fs::read_to_string(&partial).map_or(0, |text| text.lines().count());
    let start = Instant::now();
    while steps() < 1 {
        assert!(start.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let done = steps();
    let mut fewer = command("train", &run);
    fewer.args(["--set", &format!("train.steps={}", done - 1)]);
    let output = fewer.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("raise it"));
    // Nothing is left but the last line and the folder: as if it had been the last step.
    fs::rename(&partial, run.join("metrics.jsonl")).unwrap();
    let finish = || {
        let mut command = command("train", &run);
        command.args(["--set", &format!("train.steps={done}")]);
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    };
    finish();
    assert_eq!(log(&run).len(), done);
    assert!(run.join("model").exists() && !run.join("state.safetensors").exists());
    // The same with a kill between the folder and the removal of the checkpoint.
    fs::write(run.join("state.safetensors"), "moments").unwrap();
    finish();
    assert!(!run.join("state.safetensors").exists());
}

#[test]
fn bad_input_is_one_line_and_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let run = begin(dir.path(), "run", 1);
    let refuse = |mut command: Command, words: &str| {
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(words), "{error}");
    };
    refuse(command("train", &run), "run `dust-train group` first");
    refuse(command("report", &run), "run `dust-train eval` first");
    let with = |field: &str| {
        let mut command = command("train", &dir.path().join("run"));
        command.args(["--set", field]);
        command
    };
    refuse(with("train.judgments=1"), "train.judgments");
    refuse(with("train.nonsense=1"), "nonsense");
    fs::write(run.join("candidates.jsonl"), "{\"problem\": 3}\n").unwrap();
    refuse(command("label", &run), "candidates.jsonl: line 1");
    fs::remove_file(run.join("candidates.jsonl")).unwrap();
    refuse(command("label", &run), "run `dust-train sample` first");
    let mut missing = command("sample", &run);
    missing.args(["--config", "/nowhere.toml"]);
    // clap refuses a repeated option before the file is looked for.
    refuse(missing, "--config");
}

#[test]
fn programs_without_a_verdict_are_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let run = begin(dir.path(), "run", 1);
    let partial: String = fs::read_to_string(run.join("candidates.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let (problem, sample) = (&line["problem"], &line["sample"]);
            let trouble = json!({"problem": problem, "sample": sample, "verdict": "infra_error"});
            format!("{trouble}\n")
        })
        .collect();
    fs::write(run.join("verdicts.jsonl.partial"), partial).unwrap();
    succeed("label", &run);
    let verdicts = fs::read_to_string(run.join("verdicts.jsonl")).unwrap();
    assert_eq!(verdicts.matches("passed").count(), 6, "{verdicts}");
    assert_eq!(verdicts.lines().count(), 12, "{verdicts}");
}

#[test]
fn no_mixed_group_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let run = begin(dir.path(), "run", 1);
    let text = fs::read_to_string(run.join("candidates.jsonl")).unwrap();
    let right: Vec<&str> = text.lines().filter(|l| !l.contains("'wrong'")).collect();
    fs::write(run.join("candidates.jsonl"), right.join("\n") + "\n").unwrap();
    succeed("label", &run);
    let output = command("group", &run).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("sample.candidates"));
}

/// A run with its candidates in groups, whose training has other lines.
fn grouped(dir: &Path, name: &str, train: &str) -> PathBuf {
    let run = begin_with(dir, name, train);
    succeed("label", &run);
    succeed("group", &run);
    run
}

#[test]
fn imitation_lowers_the_loss_and_grpo_follows() {
    let dir = tempfile::tempdir().unwrap();
    let train = "steps = 7\nsft_steps = 6\nlearning_rate = 1e-2";
    let run = grouped(dir.path(), "run", train);
    let config = run.with_extension("toml");
    // A prefix that gives part of the ranking away leaves nothing to imitate.
    let output = command("train", &run).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("judge.prefix"));
    fs::remove_dir_all(&run).unwrap();
    fs::remove_file(&config).unwrap();
    begin_with(dir.path(), "run", train);
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("Ranking: 2 > 1 > 4 > 3", "Ranking:")).unwrap();
    for stage in ["label", "group", "train"] {
        succeed(stage, &run);
    }
    let log = log(&run);
    let lessons: Vec<&str> = log.iter().map(|l| l["lesson"].as_str().unwrap()).collect();
    assert_eq!(lessons, [vec!["imitation"; 6], vec!["ranking"]].concat());
    let loss = |step: usize| log[step]["loss"].as_f64().unwrap();
    assert!(loss(5) < 0.7 * loss(0), "{} {}", loss(0), loss(5));
    for line in &log[..6] {
        assert_eq!(
            (&line["pair_accuracy"], &line["zero_variance"]),
            (&Value::Null, &json!(0.0))
        );
        assert!(line.get("kl").is_none(), "imitation has no KL term: {line}");
    }
    assert!(log[6]["kl"].as_f64().unwrap() > 0.0);
    assert_eq!(log[6]["mismatch"], 0.0);
}

#[test]
fn answers_longer_than_a_micro_batch_are_trained_on_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let train = "steps = 1\nkl_coef = 0\nlearning_rate = 1e-3";
    let run = grouped(dir.path(), "whole", train);
    let cut = grouped(dir.path(), "cut", train);
    let config = cut.with_extension("toml");
    let text = fs::read_to_string(&config).unwrap();
    // Enough short judgments that some are valid: only then there is a gradient.
    let text = text.replace("judgments = 2", "judgments = 24");
    let text = text.replace("max_tokens = 3", "max_tokens = 1\nparse = \"lenient\"");
    fs::write(run.with_extension("toml"), &text).unwrap();
    let text = text.replace("micro_batch_tokens = 8192", "micro_batch_tokens = 1");
    fs::write(&config, text).unwrap();
    succeed("train", &run);
    succeed("train", &cut);
    let (whole, cut) = (&log(&run)[0], &log(&cut)[0]);
    assert!(
        whole.get("kl").is_none(),
        "no KL term, no reference: {whole}"
    );
    assert_eq!(cut["mismatch"], 0.0);
    assert!(whole["grad_norm"].as_f64().unwrap() > 1e-3, "{whole}");
    for name in ["reward_mean", "loss", "grad_norm", "entropy"] {
        let (a, b) = (whole[name].as_f64().unwrap(), cut[name].as_f64().unwrap());
        assert!((a - b).abs() < 1e-4 * a.abs().max(1e-2), "{name}: {a} {b}");
    }
}

#[test]
fn arms_that_write_programs_draw_and_run_them() {
    let dir = tempfile::tempdir().unwrap();
    let train =
        |arm: &str| format!("arm = \"{arm}\"\nalternate = 1\nsteps = 2\nlearning_rate = 1e-3");
    for (arm, lessons) in [
        ("generation", ["generation", "generation"]),
        ("iterative", ["generation", "ranking"]),
    ] {
        let run = grouped(dir.path(), arm, &train(arm));
        succeed("train", &run);
        let log = log(&run);
        for (line, lesson) in log.iter().zip(lessons) {
            assert_eq!(line["lesson"], lesson);
            assert_eq!(line["mismatch"], 0.0, "rollout and training differ: {line}");
        }
        // A random model writes no programs.
        assert_eq!(
            (&log[0]["invalid"], &log[0]["reward_mean"]),
            (&json!(1.0), &json!(0.0))
        );
    }
    let train = "arm = \"on_policy_ranking\"\nsft_steps = 1\nsteps = 2\nlearning_rate = 1e-3";
    let run = begin_with(dir.path(), "fresh", train);
    let config = run.with_extension("toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("Ranking: 2 > 1 > 4 > 3", "Ranking:")).unwrap();
    succeed("label", &run);
    succeed("group", &run);
    let output = command("train", &run).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("no mixed group"), "{error}");
    // The step before it is not lost, although no checkpoint was due.
    assert!(run.join("state.safetensors").exists());
}

#[test]
fn refilling_leaves_out_what_teaches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let run = begin_with(
        dir.path(),
        "run",
        "steps = 3\nrefill = true\nlearning_rate = 1e-3",
    );
    // A ranking is valid if the one token that follows is a space or the end: one in many.
    let config = run.with_extension("toml");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("judgments = 2", "judgments = 24");
    fs::write(&config, text.replace("max_tokens = 3", "max_tokens = 1")).unwrap();
    for stage in ["label", "group", "train"] {
        succeed(stage, &run);
    }
    let mut updates = 0;
    let mut left_out = 0;
    for line in log(&run) {
        let number = |name: &str| line[name].as_u64().unwrap();
        assert_eq!(line["mismatch"], 0.0, "{line}");
        // Two groups a step in mini-batches of one, two epochs.
        assert_eq!(number("updates"), 2 * number("groups"), "{line}");
        // What is left out for want of contrast is still logged.
        let alike = line["zero_variance"].as_f64().unwrap() * number("groups_drawn") as f64;
        assert!(alike <= (number("groups_drawn") - number("groups")) as f64 + 1e-9);
        updates += number("updates");
        left_out += number("groups_drawn") - number("groups");
    }
    assert!(updates > 0 && left_out > 0, "{updates} {left_out}");
}
