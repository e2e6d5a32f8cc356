//! The problems of a run, in two halves that share nothing.

use super::session::derive_seed;
use super::{Config, bad_input};
use crate::tasks::{self, Split, Task};
use anyhow::Result;
use std::collections::{HashMap, HashSet};

/// The problems of a run, by half.
pub struct Problems {
    /// For candidates and training.
    pub train: Vec<Task>,
    /// For the evaluation only.
    pub held_out: Vec<Task>,
    /// Training problems that were left out, because they ask what a held-out problem asks.
    pub left_out: Vec<String>,
}

impl Problems {
    /// Reads and splits the problems of `config`.
    ///
    /// # Errors
    /// What reading reports; a name that two problems share; no problem for training.
    pub fn load(config: &Config) -> Result<Self> {
        let settings = &config.tasks;
        let set = tasks::load(&settings.source)?.tasks;
        let (train, mut held_out): (Vec<Task>, Vec<Task>) = match &settings.eval_source {
            Some(source) => (set, tasks::load(source)?.tasks),
            None => set
                .into_iter()
                .partition(|t| t.split(config.seed, settings.held_out) == Split::Train),
        };
        let mut names = HashSet::new();
        // Files name problems by their names, so a second one would be run on the first one's tests.
        if let Some(twice) = train
            .iter()
            .chain(&held_out)
            .find(|t| !names.insert(t.id.as_str()))
        {
            bad_input!(
                "tasks.{}: `{}` is the name of two problems; give every problem its own{}",
                match settings.eval_source {
                    Some(_) => "eval_source",
                    None => "source",
                },
                twice.id,
                match &settings.eval_source {
                    Some(source) if *source == settings.source =>
                        ", or leave tasks.eval_source out: tasks.held_out splits one source",
                    _ => "",
                }
            );
        }
        let measured: HashSet<_> = held_out.iter().map(question).collect();
        let (twins, mut train): (Vec<Task>, Vec<Task>) = train
            .into_iter()
            .partition(|t| measured.contains(&question(t)));
        if train.is_empty() {
            bad_input!(
                "{}: no problem is left for training ({} ask what held-out ones ask); lower \
                 tasks.held_out",
                settings.source,
                twins.len()
            );
        }
        limit(&mut train, settings.max_train, config.seed);
        limit(&mut held_out, settings.max_eval, config.seed);
        Ok(Self {
            train,
            held_out,
            left_out: twins.into_iter().map(|t| t.id).collect(),
        })
    }

    /// All of them by name.
    pub fn by_id(&self) -> HashMap<&str, &Task> {
        by_id(self.train.iter().chain(&self.held_out))
    }

    /// Those for training by name.
    pub fn train_by_id(&self) -> HashMap<&str, &Task> {
        by_id(self.train.iter())
    }
}

fn by_id<'a>(tasks: impl Iterator<Item = &'a Task>) -> HashMap<&'a str, &'a Task> {
    tasks.map(|t| (t.id.as_str(), t)).collect()
}

/// Keeps `most` problems (0: all) chosen by a hash of their names: the first ones of a source are
/// often its easiest.
fn limit(list: &mut Vec<Task>, most: usize, seed: u64) {
    if most == 0 || list.len() <= most {
        return;
    }
    let key = |task: &Task| derive_seed(seed, &["limit", &task.id]);
    let mut keys: Vec<u64> = list.iter().map(key).collect();
    keys.sort_unstable();
    let last = keys[most - 1];
    list.retain(|task| key(task) <= last);
}

/// What a problem asks, without what its layout adds.
fn question(task: &Task) -> String {
    let starter = task.starter_code.as_deref().unwrap_or_default();
    task.statement
        .split_whitespace()
        .chain(starter.split_whitespace())
        .map(str::to_lowercase)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn write(file: &Path, problems: &[(&str, &str)]) -> String {
        let lines: String = problems
            .iter()
            .map(|(id, statement)| {
                format!(
                    "{{\"id\":\"{id}\",\"statement\":\"{statement}\",\"mode\":\"stdin\",\
                     \"tests\":[{{\"input\":\"\",\"output\":\"1\"}}]}}\n"
                )
            })
            .collect();
        fs::write(file, lines).unwrap();
        file.to_str().unwrap().to_owned()
    }

    fn ids(tasks: &[Task]) -> Vec<&str> {
        tasks.iter().map(|t| t.id.as_str()).collect()
    }

    #[test]
    fn the_halves_share_neither_names_nor_questions() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.tasks.source = write(
            &dir.path().join("train"),
            &[("1", "Add."), ("2", "Print  ONE.")],
        );
        let other = write(&dir.path().join("eval"), &[("1", "Multiply.")]);
        config.tasks.eval_source = Some(other);
        let refused = |config: &Config| format!("{}", Problems::load(config).err().unwrap());
        assert!(refused(&config).contains("tasks.eval_source: `1` is the name of two problems"));
        config.tasks.eval_source = Some(config.tasks.source.clone());
        assert!(refused(&config).contains("leave tasks.eval_source out"));

        let other = write(&dir.path().join("eval"), &[("3", "print one.")]);
        config.tasks.eval_source = Some(other);
        let problems = Problems::load(&config).unwrap();
        assert_eq!(ids(&problems.train), ["1"]);
        assert_eq!(ids(&problems.held_out), ["3"]);
        assert_eq!(problems.left_out, ["2"]);
    }

    #[test]
    fn a_limit_does_not_take_the_first_ones() {
        let config = Config::default();
        let all = Problems::load(&config).unwrap().held_out;
        let mut some = all.clone();
        limit(&mut some, 8, 1);
        assert_eq!(some.len(), 8);
        assert_ne!(ids(&some), ids(&all[..8]));
        let order = |task: &Task| all.iter().position(|t| t.id == task.id);
        assert!(some.is_sorted_by_key(order));
        let mut other = all.clone();
        limit(&mut other, 8, 2);
        assert_ne!(ids(&some), ids(&other));
    }
}
