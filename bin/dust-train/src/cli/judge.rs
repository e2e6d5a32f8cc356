//! `judge`: programs for a problem, ranked by the model.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use dust_kernels::Backend;

use super::files::{input_name, read_text};
use super::model::{ModelArgs, SamplingArgs, Thinking};
use super::{InputError, generate};
use crate::judge::{Permutation, examples, prompt, read};
use crate::pipeline::{Config, JudgeSettings};
use crate::rollout::{Finish, Request};
use crate::tasks::{Mode, Task, parse_jsonl};

/// Let the model rank programs for a problem, best first.
///
/// Shows the judge's answer as it comes, then the ranking of the files. The programs are shown to the
/// judge in an order drawn from the seed, because a model that sees a fixed order may learn places
/// instead of programs. An answer without a valid ranking is reported as such.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  dust-train judge --model model.gguf --problem problem.txt a.py b.py c.py d.py"
)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The problem: its text, or one JSON line as in a task file; - is the standard input.
    #[arg(long, value_name = "FILE")]
    problem: PathBuf,

    /// The programs, at least two.
    #[arg(required = true, num_args = 2.., value_name = "PROGRAM")]
    programs: Vec<PathBuf>,

    /// Ask as a run asks its judge, with [judge] of this configuration, for example
    /// runs/demo/config.toml [default: the answer is left to the model].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Whether the model thinks first, where it can [default: as its template has it].
    #[arg(long, value_enum)]
    thinking: Option<Thinking>,

    #[command(flatten)]
    sampling: SamplingArgs,
}

pub(super) fn run<B: Backend>(args: &Args, device: &B) -> Result<()> {
    if args.programs.len() < 2 {
        let remedy = "name two files or more";
        return Err(InputError::new("PROGRAM", "files", "there is only one", remedy).into());
    }
    let task = read_problem(&args.problem)?;
    let programs: Vec<String> = args
        .programs
        .iter()
        .map(|p| read_text(p))
        .collect::<Result<_>>()?;
    for (path, program) in args.programs.iter().zip(&programs) {
        if program.trim().is_empty() {
            let remedy = "give a file with a program";
            return Err(InputError::new(path.display(), "program", "is empty", remedy).into());
        }
    }
    let judge = match &args.config {
        Some(file) => Config::read(file)?.judge,
        None => JudgeSettings::default(),
    };
    let loaded = args.model.load(device)?;
    let (k, seed) = (programs.len(), args.sampling.seed);
    let order = Permutation::seeded(k, seed, &task.id, 0);
    let examples = examples(judge.examples, k, seed, &task.id, 0);
    let programs: Vec<String> = programs.iter().map(|code| task.program(code)).collect();
    let shown: Vec<&str> = programs.iter().map(String::as_str).collect();
    let mut prompt = loaded.chat(&prompt(&task, &shown, &order, &examples), args.thinking)?;
    if !judge.prefix.is_empty() {
        prompt.extend(loaded.tokenizer.encode(&judge.prefix, false)?);
    }
    loaded.check_prompt("the problem with its programs", &prompt)?;
    // Some templates open the thought themselves.
    let thinking = loaded
        .tokenizer
        .decode(&prompt)
        .trim_end()
        .ends_with("<think>");
    let request = Request {
        prompt,
        samples: 1,
        seed,
    };
    let mut out = io::stdout();
    writeln!(out, "The judge sees:")?;
    for (position, &candidate) in order.shown().iter().enumerate() {
        writeln!(
            out,
            "  candidate {}  {}",
            position + 1,
            args.programs[candidate].display()
        )?;
    }
    writeln!(out, "\nIt answers:")?;
    write!(out, "{}", judge.prefix)?;
    let settings = args.sampling.settings();
    let (answer, finish) = generate::answer(device, &loaded, request, &settings, &judge.stop)?;
    let answer = format!("{}{answer}", judge.prefix);
    match read(
        &answer,
        k,
        thinking,
        judge.parse,
        finish.unwrap_or(Finish::Length),
    ) {
        Ok(ranking) => {
            writeln!(out, "\nRanking, best first:")?;
            for (rank, candidate) in order.candidates(&ranking).into_iter().enumerate() {
                writeln!(
                    out,
                    "  {}. {}",
                    rank + 1,
                    args.programs[candidate].display()
                )?;
            }
        }
        Err(reason) => writeln!(
            out,
            "\nNo ranking: the answer is invalid, because {reason}."
        )?,
    }
    Ok(())
}

fn read_problem(path: &Path) -> Result<Task> {
    let name = input_name(path);
    let text = read_text(path)?;
    if text.trim_start().starts_with('{') {
        let mut tasks = parse_jsonl(Path::new(&name), text.as_bytes())?;
        return match (tasks.pop(), tasks.len()) {
            (Some(task), 0) => Ok(task),
            (_, more) => {
                let problem = format!("{} problems instead of one", more + 1);
                Err(InputError::new(name, "lines", problem, "give one of its lines").into())
            }
        };
    }
    if text.trim().is_empty() {
        return Err(
            InputError::new(name, "text", "is empty", "say what the programs are for").into(),
        );
    }
    Ok(Task {
        id: "problem".to_owned(),
        statement: text,
        starter_code: None,
        mode: Mode::Stdin,
        entry_point: None,
        tests: Vec::new(),
        test_code: None,
        difficulty: None,
        split: None,
        date: None,
        solution: None,
    })
}
