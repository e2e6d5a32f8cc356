//! Asking the judge and reading its answer: the same in training and in the evaluation.

use super::{Config, Session, bad_input};
use crate::judge::{Invalid, Permutation, examples, prompt, read};
use crate::rollout::Finish;
use crate::tasks::Task;
use anyhow::Result;
use dust_kernels::Backend;

/// One question to the judge.
pub(super) struct Question {
    pub tokens: Vec<u32>,
    order: Permutation,
}

impl Question {
    /// Shows `programs` in the order number `index` of this group.
    pub fn new<B: Backend>(
        session: &Session<B>,
        config: &Config,
        task: &Task,
        programs: &[String],
        group: &str,
        index: usize,
    ) -> Result<Self> {
        let order = Permutation::seeded(programs.len(), config.seed, group, index);
        let count = config.judge.examples;
        let examples = examples(count, programs.len(), config.seed, group, index);
        // What the sandbox runs.
        let programs: Vec<String> = programs.iter().map(|code| task.program(code)).collect();
        let shown: Vec<&str> = programs.iter().map(String::as_str).collect();
        Ok(Self {
            tokens: session.encode(
                &prompt(task, &shown, &order, &examples),
                &config.judge.prefix,
            )?,
            order,
        })
    }

    /// The candidates from best to worst, as a finished answer ranks them, and the position picked
    /// first.
    pub fn read(
        &self,
        config: &Config,
        thinking: bool,
        answer: &str,
        finish: Finish,
    ) -> Result<(Vec<usize>, usize), Invalid> {
        let text = format!("{}{answer}", config.judge.prefix);
        let k = self.order.shown().len();
        let positions = read(&text, k, thinking, config.judge.parse, finish)?;
        Ok((self.order.candidates(&positions), positions[0]))
    }

    /// How the judge would rank the candidates, `best` first: what follows the prefix.
    pub fn answer(&self, config: &Config, best: &[usize]) -> Result<String> {
        let shown = self.order.shown();
        let positions: Vec<String> = best
            .iter()
            .filter_map(|candidate| shown.iter().position(|c| c == candidate))
            .map(|position| (position + 1).to_string())
            .collect();
        let text = format!("Ranking: {}", positions.join(" > "));
        let Some(answer) = text.strip_prefix(&config.judge.prefix) else {
            bad_input!(
                "judge.prefix: rankings to imitate begin with `Ranking:`, not with `{}`; \
                 leave it empty or say \"Ranking:\"",
                config.judge.prefix
            );
        };
        Ok(answer.to_owned())
    }
}
