//! Programming problems: what the model is asked, and how an answer is tested.
//!
//! Every source of problems is read into the same [`Task`]. [`load`] takes a specification:
//!
//! | specification | source |
//! |---|---|
//! | `builtin` | the problems that the project ships |
//! | `humaneval[:FILE]` | `HumanEval.jsonl`, plain or gzipped |
//! | `humaneval+:FILE`, `mbpp+:FILE` | `HumanEvalPlus.jsonl` and `MbppPlus.jsonl` of EvalPlus |
//! | `mbpp:FILE` | `mbpp.jsonl` or `sanitized-mbpp.json` |
//! | `rstar:FILE_OR_FOLDER` | `seed_testcase` of rStar-Coder, Parquet |
//! | `livecodebench:FILE_OR_FOLDER[@WINDOW]` | `test*.jsonl` shards; WINDOW is `v5`, `v6`, `START..END` or `release_vN` |
//! | any other text | a JSON Lines file with one [`Task`] a line |
//!
//! Files are untrusted: an error names the file, the line, the field and the remedy.

mod builtin;
mod evalplus;
pub mod extract;
mod humaneval;
mod jsonl;
mod livecodebench;
mod mbpp;
pub mod prompt;
mod rstar;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use builtin::builtin;
pub use evalplus::evalplus;
pub use humaneval::humaneval;
pub use jsonl::{parse_jsonl, read_jsonl};
pub use livecodebench::{Window, livecodebench};
pub use mbpp::mbpp;
pub use rstar::rstar;

/// Where `make` puts HumanEval, and where the specification `humaneval` looks for it.
pub const HUMANEVAL_FILE: &str = "data/HumanEval.jsonl.gz";

/// One programming problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Unique name, for example `builtin/is_prime`.
    pub id: String,
    /// What the model is asked to write.
    pub statement: String,
    /// Code that the answer has to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starter_code: Option<String>,
    /// How an answer is run.
    pub mode: Mode,
    /// The function that is called, in function and assert mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry_point: Option<String>,
    /// Inputs with the expected outputs, in function and stdin mode.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tests: Vec<Test>,
    /// Python code that defines `check(candidate)`, in assert mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_code: Option<String>,
    /// Stratum for the evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difficulty: Option<Difficulty>,
    /// The half that the problem belongs to; see [`Task::split`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// When the problem was published: `YYYY-MM-DD`, or `YYYY-MM-DDThh:mm:ss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// A program that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solution: Option<String>,
}

/// One input and the output that is expected for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Test {
    /// Function mode: the list of arguments. Stdin mode: the text on the standard input.
    pub input: Value,
    /// Function mode: the value returned. Stdin mode: the text on the standard output.
    pub output: Value,
}

/// How an answer is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The entry point is called with each test's arguments, and what it returns is compared.
    Function,
    /// The program is run on each test's input, and what it prints is compared.
    Stdin,
    /// `test_code` defines `check(candidate)`, which raises if the entry point is wrong.
    Assert,
}

/// Stratum of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    /// A line or two.
    Easy,
    /// A loop and a condition.
    Medium,
    /// An algorithm.
    Hard,
}

impl fmt::Display for Difficulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Easy => "easy",
            Self::Medium => "medium",
            Self::Hard => "hard",
        })
    }
}

/// Whether a problem may be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation only.
    HeldOut,
}

/// Why problems could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The file could not be opened or read.
    #[error("{}: {source}; check that it is a readable file", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of the file is not a problem.
    #[error("{}:{line}: field `{field}`: {problem}; {remedy}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The field.
        field: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// The specification, or the file as a whole, gives no problems.
    #[error("tasks `{spec}`: {problem}; {remedy}")]
    Spec {
        /// The specification or the file.
        spec: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

/// A rule broken by a field: the reader adds the file and the line.
pub(crate) struct Broken {
    pub field: String,
    pub problem: String,
    pub remedy: String,
}

impl Broken {
    pub(crate) fn new(
        field: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn at(self, path: &Path, line: usize) -> TaskError {
        TaskError::Line {
            path: path.to_path_buf(),
            line,
            field: self.field,
            problem: self.problem,
            remedy: self.remedy,
        }
    }
}

impl Task {
    /// The half that the problem belongs to: its own `split` if it has one, else decided by a hash
    /// of (`seed`, `id`), so that a problem stays in its half whatever else is in the file.
    pub fn split(&self, seed: u64, held_out_share: f64) -> Split {
        if let Some(split) = self.split {
            return split;
        }
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(self.id.as_bytes());
        let digest = hash.finalize();
        let top = digest[..8].iter().fold(0u64, |n, &b| n << 8 | u64::from(b));
        // 53 bits, so that the division is exact and the result stays below 1.
        let unit = (top >> 11) as f64 / (1u64 << 53) as f64;
        if unit < held_out_share {
            Split::HeldOut
        } else {
            Split::Train
        }
    }

    /// The program to run for the `code` that a model answered.
    ///
    /// What the starter code says before the entry point (imports, helper functions) comes first,
    /// because models often leave it out. Code whose first line is indented is the body that the
    /// starter code asks for, and continues it.
    pub fn program(&self, code: &str) -> String {
        let (Some(starter), Some(entry)) = (&self.starter_code, &self.entry_point) else {
            return code.to_owned();
        };
        let Some(at) = definition(starter, entry) else {
            return code.to_owned();
        };
        let first = code.lines().find(|line| !line.trim().is_empty());
        if first.is_some_and(|line| line.starts_with([' ', '\t'])) {
            format!("{}\n{code}", starter.trim_end())
        } else {
            format!("{}{code}", &starter[..at])
        }
    }

    /// Checks what the types cannot say.
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.id.trim().is_empty() {
            return Err(Broken::new("id", "is empty", "give every problem a name"));
        }
        if self.statement.trim().is_empty() {
            return Err(Broken::new("statement", "is empty", "say what to write"));
        }
        if let Some(date) = &self.date
            && !is_date(date)
        {
            return Err(Broken::new(
                "date",
                format!("`{date}` is not a date"),
                "write it as 2025-02-01 or 2025-02-01T12:00:00",
            ));
        }
        if self.mode != Mode::Stdin {
            match self.entry_point.as_deref() {
                None => {
                    return Err(Broken::new(
                        "entry_point",
                        "is missing",
                        "name the function that is called",
                    ));
                }
                Some(name) if !is_identifier(name) => {
                    return Err(Broken::new(
                        "entry_point",
                        format!("`{name}` is not a Python identifier"),
                        "name the function that is called, without parentheses",
                    ));
                }
                Some(_) => {}
            }
        }
        if self.mode == Mode::Assert {
            if self
                .test_code
                .as_deref()
                .is_none_or(|code| code.trim().is_empty())
            {
                return Err(Broken::new(
                    "test_code",
                    "is missing",
                    "give Python code that defines check(candidate)",
                ));
            }
            return Ok(());
        }
        if self.tests.is_empty() {
            // A grader that takes zero tests for a pass would label everything right.
            return Err(Broken::new("tests", "is empty", "give at least one test"));
        }
        for (i, test) in self.tests.iter().enumerate() {
            if self.mode == Mode::Function && !test.input.is_array() {
                return Err(Broken::new(
                    format!("tests[{i}].input"),
                    "is not a list",
                    "give the list of the arguments, [3] for f(3)",
                ));
            }
            if self.mode == Mode::Stdin {
                for (name, value) in [("input", &test.input), ("output", &test.output)] {
                    if !value.is_string() {
                        return Err(Broken::new(
                            format!("tests[{i}].{name}"),
                            "is not a string",
                            "give the whole text, or set mode to \"function\"",
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The problems that a specification gave.
#[derive(Debug)]
pub struct TaskSet {
    /// The specification.
    pub spec: String,
    /// The problems, in the order of the source.
    pub tasks: Vec<Task>,
    /// How many records the source holds.
    pub records: usize,
    /// The dates or the release that were asked for.
    pub window: Option<Window>,
    /// Records of a public benchmark that could not be used. The project's own format is strict:
    /// there the first bad line is an error.
    pub refused: Vec<TaskError>,
}

impl TaskSet {
    fn empty(path: &Path) -> Self {
        Self {
            spec: path.display().to_string(),
            tasks: Vec::new(),
            records: 0,
            window: None,
            refused: Vec::new(),
        }
    }

    /// Adds what a record gave.
    fn add(&mut self, path: &Path, line: usize, task: Result<Task, Broken>) {
        self.records += 1;
        match task {
            Ok(task) => self.tasks.push(task),
            Err(broken) => self.refused.push(broken.at(path, line)),
        }
    }
}

impl fmt::Display for TaskSet {
    /// One line: the number of problems, their strata, and the dates.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} problems", self.spec, self.tasks.len())?;
        let mut strata = BTreeMap::new();
        for difficulty in self.tasks.iter().filter_map(|task| task.difficulty) {
            *strata.entry(difficulty).or_insert(0) += 1;
        }
        if !strata.is_empty() {
            let strata: Vec<_> = strata.iter().map(|(d, n)| format!("{n} {d}")).collect();
            write!(f, " ({})", strata.join(", "))?;
        }
        write!(f, " of {} records", self.records)?;
        if let Some(window) = &self.window {
            write!(f, ", {window}")?;
        }
        if !self.refused.is_empty() {
            write!(f, ", {} refused", self.refused.len())?;
        }
        Ok(())
    }
}

/// Reads the problems that `spec` names (see the [module](self)).
pub fn load(spec: &str) -> Result<TaskSet, TaskError> {
    let set = match spec.split_once(':') {
        _ if spec == "builtin" => whole(builtin()?),
        _ if spec == "humaneval" => humaneval(Path::new(HUMANEVAL_FILE)).map_err(|e| match e {
            TaskError::Io { path, source } => TaskError::Spec {
                spec: spec.to_owned(),
                problem: format!("{}: {source}", path.display()),
                remedy: "run `make humaneval`, or give humaneval:FILE".to_owned(),
            },
            other => other,
        })?,
        Some(("humaneval", path)) => humaneval(Path::new(path))?,
        Some(("humaneval+" | "mbpp+", path)) => evalplus(Path::new(path))?,
        Some(("mbpp", path)) => mbpp(Path::new(path))?,
        Some(("rstar", path)) => rstar(Path::new(path))?,
        Some(("livecodebench", rest)) => {
            let (path, window) = match rest.rsplit_once('@') {
                Some((path, window)) => (path, Some(window.parse()?)),
                None => (rest, None),
            };
            livecodebench(Path::new(path), window)?
        }
        _ => whole(read_jsonl(Path::new(spec))?),
    };
    if set.tasks.is_empty() {
        let reason = set
            .refused
            .first()
            .map(|e| format!("; the first refused: {e}"));
        return Err(TaskError::Spec {
            spec: spec.to_owned(),
            problem: format!(
                "no problem among {} records{}",
                set.records,
                reason.unwrap_or_default()
            ),
            remedy: "check the file and the dates".to_owned(),
        });
    }
    Ok(TaskSet {
        spec: spec.to_owned(),
        ..set
    })
}

fn whole(tasks: Vec<Task>) -> TaskSet {
    TaskSet {
        spec: String::new(),
        records: tasks.len(),
        tasks,
        window: None,
        refused: Vec::new(),
    }
}

/// Where `code` defines the function `name` at the top level.
fn definition(code: &str, name: &str) -> Option<usize> {
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        let rest = line.strip_prefix("async ").unwrap_or(line);
        if let Some(rest) = rest.strip_prefix("def ")
            && let Some(rest) = rest.trim_start().strip_prefix(name)
            && rest.trim_start().starts_with('(')
        {
            return Some(at);
        }
        at += line.len();
    }
    None
}

fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
        && chars.all(|c| c.is_alphanumeric() || c == '_')
}

/// `YYYY-MM-DD` or `YYYY-MM-DDThh:mm:ss`, so that the order of the texts is the order in time.
fn is_date(text: &str) -> bool {
    let shape = |text: &str, pattern: &str| {
        text.len() == pattern.len()
            && text.bytes().zip(pattern.bytes()).all(|(c, p)| match p {
                b'0' => c.is_ascii_digit(),
                _ => c == p,
            })
    };
    if !shape(text, "0000-00-00") && !shape(text, "0000-00-00T00:00:00") {
        return false;
    }
    let part = |from: usize| text[from..from + 2].parse::<u32>().unwrap_or(u32::MAX);
    (1..=12).contains(&part(5))
        && (1..=31).contains(&part(8))
        && (text.len() == 10 || (part(11) < 24 && part(14) < 60 && part(17) < 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(json: &str) -> Task {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_problem_stays_in_its_half() {
        let named = |i: usize| {
            task(&format!(
                r#"{{"id":"p{i}","statement":"s","mode":"stdin","tests":[]}}"#
            ))
        };
        let held_out = |seed| -> Vec<usize> {
            (0..2000)
                .filter(|&i| named(i).split(seed, 0.25) == Split::HeldOut)
                .collect()
        };
        // Binomial(2000, 1/4) has standard deviation 19.4.
        assert!((held_out(0).len() as f64 - 500.0).abs() < 100.0);
        assert_eq!(held_out(0), held_out(0));
        assert_ne!(held_out(0), held_out(1));
        assert!((0..50).all(|i| named(i).split(3, 0.0) == Split::Train));
        assert!((0..50).all(|i| named(i).split(3, 1.0) == Split::HeldOut));
        let mut fixed = named(0);
        fixed.split = Some(Split::Train);
        assert_eq!(fixed.split(0, 1.0), Split::Train);
    }

    #[test]
    fn the_program_carries_the_preamble_and_continues_a_body() {
        let mut task = task(r#"{"id":"p","statement":"s","mode":"assert","entry_point":"f"}"#);
        assert_eq!(task.program("x"), "x");
        task.starter_code = Some(
            "import math\n\ndef g(x):\n    return x\n\ndef f(x):\n    \"\"\"Doc.\"\"\"\n".into(),
        );
        assert_eq!(
            task.program("def f(x):\n    return g(x)\n"),
            "import math\n\ndef g(x):\n    return x\n\ndef f(x):\n    return g(x)\n"
        );
        assert!(
            task.program("\n    return 1\n")
                .ends_with("\"\"\"Doc.\"\"\"\n\n    return 1\n")
        );
        task.starter_code = Some("class Solution:\n    def f(self, x):\n".into());
        assert_eq!(
            task.program("class Solution:\n    pass"),
            "class Solution:\n    pass"
        );
        task.starter_code = Some("def ff(x):\n".into());
        assert_eq!(task.program("    return 1"), "    return 1");
    }

    #[test]
    fn dates() {
        for good in ["2025-02-01", "2023-08-21T00:00:00", "2023-12-31T23:59:59"] {
            assert!(is_date(good), "{good}");
        }
        for bad in [
            "",
            "2025-2-1",
            "2025-13-01",
            "2025-00-01",
            "2025-01-32",
            "2025-01-01T24:00:00",
            "2025-01-01Z",
            "２025-01-01",
        ] {
            assert!(!is_date(bad), "{bad}");
        }
    }

    #[test]
    fn specifications_that_name_nothing() {
        let error = |spec: &str| load(spec).unwrap_err().to_string();
        assert!(error("/no/such.jsonl").contains("/no/such.jsonl"));
        assert!(error("humaneval:/no/such.gz").contains("/no/such.gz"));
        assert!(error("livecodebench:/no/such").contains("/no/such"));
        assert!(error("livecodebench:x@2025").contains("START..END"));
    }
}
