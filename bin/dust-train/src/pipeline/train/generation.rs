//! Programs as answers, rewarded by the tests: 1 if all pass, else 0 (RLVR).

use super::super::label::{program, run_programs};
use super::super::session::derive_seed;
use super::super::{Config, Session};
use super::rollout::{Lesson, Rolled, Roller, answered, temperature};
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
    let lesson = Lesson::Generation;
    let answers = roller.draw(
        session,
        "write",
        &requests,
        temperature(config, lesson),
        config.sample.sampling.max_tokens,
        session.program_end(config),
    )?;

    let thinking = session.opens_thought()?;
    // What an answer without a program counts as.
    let mut rewards: Vec<Vec<Option<f32>>> =
        answers.iter().map(|a| vec![Some(0.0); a.len()]).collect();
    let (mut programs, mut owners) = (Vec::new(), Vec::new());
    for (i, (task, answers)) in tasks.iter().zip(&answers).enumerate() {
        for (j, answer) in answers.iter().enumerate() {
            let text = session.text(&answer.tokens);
            if let Ok(code) = extract(&text, thinking, config.sample.extract) {
                programs.push(program(task, &code));
                owners.push((i, j));
            }
        }
    }
    let mut no_verdict = 0;
    run_programs(roller.sandbox(config)?, config, &programs, |i, outcome| {
        let (task, answer) = owners[i];
        rewards[task][answer] = match outcome.verdict {
            Verdict::InfraError => None,
            verdict => Some(f32::from(u8::from(verdict == Verdict::Passed))),
        };
        no_verdict += usize::from(outcome.verdict == Verdict::InfraError);
        Ok(())
    })?;
    // A few programs may be to blame themselves; this many are not.
    ensure!(
        no_verdict * 2 <= programs.len().max(16),
        "the sandbox gave no verdict for {no_verdict} of {} programs: see `dust-train doctor`; the \
         same command goes on from the last step",
        programs.len()
    );
    let (requests, answers, rewards) = with_verdict(requests, answers, rewards);
    Ok(Rolled {
        lesson,
        groups: answered(session, config, requests, answers, rewards)?,
        valid: programs.len() - no_verdict,
        no_verdict,
        ..Rolled::default()
    })
}

/// Leaves out the answers that have no reward, and requests that have no answer left.
fn with_verdict<R, A>(
    requests: Vec<R>,
    answers: Vec<Vec<A>>,
    rewards: Vec<Vec<Option<f32>>>,
) -> (Vec<R>, Vec<Vec<A>>, Vec<Vec<f32>>) {
    let (mut all_requests, mut all_answers, mut all_rewards) = (Vec::new(), Vec::new(), Vec::new());
    for ((request, answers), rewards) in requests.into_iter().zip(answers).zip(rewards) {
        let (answers, rewards): (Vec<A>, Vec<f32>) = answers
            .into_iter()
            .zip(rewards)
            .filter_map(|(answer, reward)| Some((answer, reward?)))
            .unzip();
        if !rewards.is_empty() {
            all_requests.push(request);
            all_answers.push(answers);
            all_rewards.push(rewards);
        }
    }
    (all_requests, all_answers, all_rewards)
}

#[cfg(test)]
mod tests {
    use super::with_verdict;

    #[test]
    fn an_answer_without_a_verdict_is_left_out_of_its_group() {
        let answers = vec![vec!['a', 'b', 'c'], vec!['d'], vec!['e', 'f']];
        let rewards = vec![
            vec![Some(1.0), None, Some(0.0)],
            vec![None],
            vec![Some(0.0); 2],
        ];
        let (requests, answers, rewards) = with_verdict(vec![0, 1, 2], answers, rewards);
        assert_eq!(requests, [0, 2]);
        assert_eq!(answers, [['a', 'c'], ['e', 'f']]);
        assert_eq!(rewards, [[1.0, 0.0], [0.0, 0.0]]);
    }
}
