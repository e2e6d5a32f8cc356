//! Every arm on a model that can do what it asks for. A tiny model is first taught, by plain
//! likelihood, to answer with one of two programs, one right and one wrong, and with one of two
//! rankings; then the stages run on it from outside: it writes, the sandbox labels, it ranks, it learns.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use dust_kernels::adamw::AdamWConfig;
use dust_kernels::{Cpu, Device};
use dust_train::checkpoint::{Checkpoint, Dtype, save};
use dust_train::judge::{Permutation, prompt};
use dust_train::model::{Batch, Model, Purpose, Storage, Workspace};
use dust_train::pipeline::train::Optimizer;
use dust_train::tasks::{Task, parse_jsonl, prompt::generation};
use dust_train::text::{ChatOptions, Message, encode_chat};
use serde_json::{Value, json};
use tempfile::TempDir;

const RIGHT: &str = "print(1)";
const WRONG: &str = "print(2)";

/// Problems that all have the answer 1; the last is held out.
fn tasks() -> Vec<Task> {
    let line = |name: &str, split: &str| {
        json!({"id": name, "statement": format!("Print the number of {name}s."), "mode": "stdin",
            "tests": [{"input": "", "output": "1"}], "split": split})
        .to_string()
    };
    let names = ["sun", "moon", "earth", "sky"];
    let lines: Vec<String> = names
        .iter()
        .map(|n| line(n, if *n == "sky" { "held-out" } else { "train" }))
        .collect();
    parse_jsonl(Path::new("tasks"), lines.join("\n").as_bytes()).unwrap()
}

/// A folder with the taught model and the problems; made once.
fn taught() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            teach(dir.path());
            dir
        })
        .path()
}

fn teach(dir: &Path) {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/tiny.gguf");
    let tiny = Checkpoint::open(gguf.to_str().unwrap()).unwrap();
    let mut config = tiny.config().clone();
    config.max_positions = 1024;
    let files = tiny.text_files().unwrap();
    let start = dir.join("start");
    save(&start, &config, Dtype::F32, &files, |name| {
        Ok(Cow::Owned(tiny.tensor(name)?.data))
    })
    .unwrap();
    let checkpoint = Checkpoint::open(start.to_str().unwrap()).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let template = checkpoint.chat_template(&tokenizer).unwrap();
    let options = ChatOptions {
        now: UNIX_EPOCH + Duration::from_secs(1_750_000_000),
        ..ChatOptions::default()
    };
    let encode =
        |messages: &[Message]| encode_chat(&template, &tokenizer, messages, &options).unwrap();
    let text = |text: &str| tokenizer.encode(text, false).unwrap();
    let mut batch = Batch::new();
    for task in tasks() {
        let answers = [RIGHT, WRONG].map(|program| {
            let mut tokens = text(&format!("```python\n{program}\n```"));
            tokens.extend(tokenizer.eos_ids().first());
            tokens
        });
        batch.push_group(
            &encode(&generation(&task)),
            &answers.each_ref().map(|a| &a[..]),
        );
        for index in 0..2 {
            let order = Permutation::seeded(2, 0, "any", index);
            let asked = prompt(&task, &[RIGHT, WRONG], &order, &[]);
            let mut question = encode(&asked);
            question.extend(text("Ranking:"));
            let answers = [" 1 > 2\n", " 2 > 1\n"].map(text);
            batch.push_group(&question, &answers.each_ref().map(|a| &a[..]));
        }
    }
    let cpu = Cpu::new();
    let mut model = Model::load(&cpu, &checkpoint, Storage::F32, true).unwrap();
    let purpose = Purpose::Train { recompute: false };
    let mut ws = Workspace::new(&cpu, &model.config, batch.rows(), purpose).unwrap();
    let mut optimizer = Optimizer::new(&cpu, &model).unwrap();
    let n = batch.targets.len();
    let config = AdamWConfig {
        learning_rate: 5e-3,
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    let mut likelihood = f32::NEG_INFINITY;
    for _ in 0..300 {
        model.forward(&cpu, &mut ws, &batch).unwrap();
        model.logprobs(&cpu, &mut ws, &batch, 1.0).unwrap();
        let mut logprobs = vec![0.0; n];
        cpu.read(&ws.head.logprob, 0, &mut logprobs).unwrap();
        likelihood = logprobs.iter().sum::<f32>() / n as f32;
        cpu.write(&mut ws.head.dlogprob, 0, &vec![-1.0 / n as f32; n])
            .unwrap();
        model
            .backward(&cpu, &mut ws, &batch, &mut optimizer.grads)
            .unwrap();
        optimizer.step(&cpu, &mut model, config, 1.0).unwrap();
    }
    // One free choice an answer of about ten tokens.
    assert!(likelihood > -0.15, "{likelihood}");
    model
        .save(&cpu, &dir.join("model"), Dtype::F32, &files)
        .unwrap();
    let lines: Vec<String> = tasks()
        .iter()
        .map(|t| serde_json::to_string(t).unwrap())
        .collect();
    fs::write(dir.join("tasks.jsonl"), lines.join("\n")).unwrap();
}

fn stage(run: &Path, stage: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_dust-train"))
        .args(stage.split(' '))
        .arg("--run")
        .arg(run)
        .arg("--config")
        .arg(run.with_extension("toml"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stage}: {text}");
}

/// Runs all up to the training of an arm; what every step logged.
fn train(dir: &TempDir, arm: &str, more: &str) -> (PathBuf, Vec<Value>) {
    let run = dir.path().join(arm);
    let config = format!(
        "[model]\npath = {:?}\nbatch = 16\nmicro_batch_tokens = 4096\n\
         [tasks]\nsource = {:?}\n\
         [sample]\ncandidates = 8\n[sample.sampling]\nmax_tokens = 40\n\
         [sandbox.limits]\nwall_s = 30.0\n\
         [group]\nsize = 2\n\
         [judge]\nprefix = \"Ranking:\"\nstop = [\"\\n\"]\nmax_tokens = 12\n\
         [train]\narm = \"{arm}\"\nprompts = 3\nmini_batch = 3\nepochs = 2\njudgments = 8\n\
         learning_rate = 2e-3\nwarmup_steps = 1\n{more}\n",
        taught().join("model"),
        taught().join("tasks.jsonl"),
    );
    fs::write(run.with_extension("toml"), config).unwrap();
    for name in ["sample", "label", "group", "train"] {
        stage(&run, name);
    }
    let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let log: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for line in &log {
        assert_eq!(line["mismatch"], 0.0, "{line}");
    }
    (run, log)
}

fn mean(log: &[Value], field: &str) -> f64 {
    let values = log.iter().map(|line| line[field].as_f64().unwrap());
    values.sum::<f64>() / log.len() as f64
}

#[test]
fn generation_learns_to_write_what_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, log) = train(&dir, "generation", "steps = 12");
    let (first, last) = (
        mean(&log[..2], "reward_mean"),
        mean(&log[10..], "reward_mean"),
    );
    assert!((0.1..0.9).contains(&first) && last > 0.9, "{first} {last}");
}

#[test]
fn a_judge_is_measured_on_the_same_programs() {
    let dir = tempfile::tempdir().unwrap();
    let (run, log) = train(
        &dir,
        "ranking",
        "steps = 2\n[eval]\nrepeats = 10\npermutations = 2\n[eval.sampling]\ntemperature = 1.0",
    );
    assert!(mean(&log, "invalid") < 0.5 && mean(&log, "updates") > 0.0);
    for name in ["eval", "eval --after", "report"] {
        stage(&run, name);
    }
    let file = |name: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(run.join(name)).unwrap()).unwrap()
    };
    let (before, after) = (file("eval-before.json"), file("eval-after.json"));
    let judgments = |file: &Value, same: bool| -> Vec<Value> {
        let all = file["judgments"].as_array().unwrap().iter();
        all.filter(|j| j["same"] == same).cloned().collect()
    };
    let mixed = |j: &&Value| {
        let right = |c: &&Value| c["right"] == true;
        let candidates = j["candidates"].as_array().unwrap();
        (1..candidates.len()).contains(&candidates.iter().filter(right).count())
    };
    let shown = |j: &Value| {
        (
            j["repeat"].clone(),
            j["permutation"].clone(),
            j["candidates"].clone(),
        )
    };
    // The groups that the model before wrote, each in both orders; no others.
    let theirs: Vec<_> = judgments(&before, false)
        .iter()
        .filter(mixed)
        .map(shown)
        .collect();
    let again: Vec<_> = judgments(&after, true).iter().map(shown).collect();
    assert!(theirs.len() >= 2 && theirs == again, "{theirs:?} {again:?}");
    assert!(judgments(&before, true).is_empty());
    // Whoever is all right or all wrong is not asked about, and still counts for pass@1.
    assert_eq!(
        judgments(&after, false)
            .iter()
            .filter(|j| j["permutation"] == 0)
            .count(),
        10
    );
    for judgment in judgments(&after, false).iter().filter(|j| !mixed(j)) {
        assert_eq!(judgment["text"], "");
    }
    assert_eq!(after["problems"][0]["samples"], 20);
}

#[test]
fn on_policy_ranking_writes_labels_and_ranks_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (_, log) = train(&dir, "on_policy_ranking", "steps = 3");
    for line in &log {
        assert_eq!(line["lesson"], "ranking");
        assert!(line["invalid"].as_f64().unwrap() < 0.5, "{line}");
        assert!(line["updates"].as_u64().unwrap() > 0, "{line}");
    }
}

#[test]
fn the_iterative_arm_writes_and_ranks_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let (_, log) = train(&dir, "iterative", "steps = 4\nalternate = 1");
    for (line, lesson) in log.iter().zip(["generation", "ranking"].iter().cycle()) {
        assert_eq!(line["lesson"], **lesson);
        assert!(line["invalid"].as_f64().unwrap() < 0.5, "{line}");
        assert!(line["updates"].as_u64().unwrap() > 0, "{line}");
    }
    assert!(log[0]["reward_mean"].as_f64().unwrap() > 0.0, "{log:?}");
}
