//! A packed batch: prompts and their answers as rows, each prompt once.

use dust_kernels::attention::Segment;

/// Where an answer's targets lie in a batch's target list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// First target.
    pub start: usize,
    /// Number of targets: the answer's tokens.
    pub len: usize,
}

/// Rows to run and tokens to score.
///
/// A group is one prompt and its answers: the prompt's rows stand once, and each answer is a
/// segment that has the prompt as its prefix. An answer's last token is only a target, never an
/// input, so it has no row.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Input token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Sequences among the rows.
    pub segments: Vec<Segment>,
    /// The row that predicts each target.
    pub target_rows: Vec<u32>,
    /// The tokens to score.
    pub targets: Vec<u32>,
    /// The targets of each answer, in the order they were added.
    pub answers: Vec<Target>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one prompt (at least one token) and its answers, all of whose tokens are scored.
    pub fn push_group<A: AsRef<[u32]>>(&mut self, prompt: &[u32], answers: &[A]) {
        let prompt_start = self.push_rows(prompt, 0);
        self.segments.push(Segment {
            start: prompt_start,
            len: prompt.len() as u32,
            ..Segment::default()
        });
        for answer in answers {
            let answer = answer.as_ref();
            self.answers.push(Target {
                start: self.targets.len(),
                len: answer.len(),
            });
            let Some((_, inputs)) = answer.split_last() else {
                continue;
            };
            let start = self.push_rows(inputs, prompt.len());
            if !inputs.is_empty() {
                self.segments.push(Segment {
                    start,
                    len: inputs.len() as u32,
                    prefix_start: prompt_start,
                    prefix_len: prompt.len() as u32,
                });
            }
            self.target_rows
                .push(prompt_start + prompt.len() as u32 - 1);
            self.target_rows.extend(start..start + inputs.len() as u32);
            self.targets.extend_from_slice(answer);
        }
    }

    /// Adds one sequence that is scored from its second token on.
    pub fn push_text(&mut self, tokens: &[u32]) {
        if let Some((first, rest)) = tokens.split_first() {
            self.push_group(&[*first], &[rest]);
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    fn push_rows(&mut self, tokens: &[u32], position: usize) -> u32 {
        let start = self.tokens.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((position..position + tokens.len()).map(|p| p as u32));
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_shares_its_prompt() {
        let mut batch = Batch::new();
        batch.push_group(&[1, 2, 3], &[vec![4, 5], vec![6], vec![]]);
        assert_eq!(batch.tokens, [1, 2, 3, 4]);
        assert_eq!(batch.positions, [0, 1, 2, 3]);
        assert_eq!(batch.target_rows, [2, 3, 2]);
        assert_eq!(batch.targets, [4, 5, 6]);
        assert_eq!(batch.segments.len(), 2);
        assert_eq!(batch.segments[1].prefix_len, 3);
        assert_eq!(batch.answers[2], Target { start: 3, len: 0 });
    }

    #[test]
    fn a_text_is_scored_from_its_second_token() {
        let mut batch = Batch::new();
        batch.push_text(&[7, 8, 9]);
        batch.push_text(&[5]);
        batch.push_text(&[]);
        assert_eq!(batch.tokens, [7, 8, 5]);
        assert_eq!(batch.targets, [8, 9]);
        assert_eq!(batch.target_rows, [0, 1]);
    }
}
