//! Programs as answers, rewarded by the tests: 1 if all pass, else 0 (RLVR).

use super::super::label::{program, run_programs};
use super::super::session::derive_seed;
use super::super::{Config, Session};
use super::rollout::{Lesson, Rolled, Roller, answered};
use crate::rollout::Request;
use crate::sandbox::Verdict;
use crate::tasks::extract::extract;
use crate::tasks::{Task, prompt::generation};
use anyhow::{Result, ensure};
use dust_kernels::Backend;

/// Draws `train.judgments` programs for each task and runs them.
pub(super) fn write<B: Backend>(
    session: &Session<B>,
    config: &Config,
    roller: &mut Roller<B>,
    step: usize,
    tasks: &[&Task],
) -> Result<Rolled> {
    let samples = config.train.judgments;
    let requests = tasks
        .iter()
        .enumerate()
        .map(|(i, task)| {
            let parts = ["write", &step.to_string(), &i.to_string(), &task.id];
            Ok(Request {
                prompt: session.encode(&generation(task), "")?,
                samples,
                seed: derive_seed(config.seed, &parts),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let max_tokens = config.sample.sampling.max_tokens;
    let answers = roller.draw(session, config, "write", &requests, max_tokens, &[])?;

    let thinking = session.opens_thought()?;
    let mut rewards = vec![0.0f32; tasks.len() * samples as usize];
    let (mut programs, mut owners) = (Vec::new(), Vec::new());
    for (i, (task, answers)) in tasks.iter().zip(&answers).enumerate() {
        for answer in answers {
            let text = session.text(&answer.tokens);
            if let Ok(code) = extract(&text, thinking, config.sample.extract) {
                programs.push(program(task, &code));
                owners.push(i * samples as usize + answer.sample as usize);
            }
        }
    }
    let sandbox = roller.sandbox(config)?;
    let mut broken = 0;
    run_programs(sandbox, config, &programs, |i, outcome| {
        match outcome.verdict {
            Verdict::Passed => rewards[owners[i]] = 1.0,
            Verdict::InfraError => broken += 1,
            _ => {}
        }
        Ok(())
    })?;
    ensure!(
        broken == 0,
        "the sandbox could not run {broken} programs, which is no label: run `train` again, it \
         goes on from the last step"
    );
    Ok(Rolled {
        lesson: Lesson::Generation,
        drawn: rewards.len(),
        groups: answered(session, config, requests, answers, &rewards)?,
        valid: programs.len(),
        pair_accuracy: Vec::new(),
        picked_first: Vec::new(),
        seconds: roller.start.elapsed().as_secs_f64(),
    })
}
