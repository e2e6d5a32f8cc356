//! When an answer ends before its longest length.

use super::{Finish, Stops};
use crate::tasks::extract::first_block_is_closed;

/// Stop tokens and stop strings.
pub(super) struct StopStrings<'a> {
    stops: Stops<'a>,
    /// Tokens whose text can hold the longest stop string's end: each has a byte at least, and a
    /// character may be spread over four.
    window: usize,
}

impl<'a> StopStrings<'a> {
    pub fn new(stops: Stops<'a>) -> Self {
        let longest = stops.strings.iter().map(String::len).max().unwrap_or(0);
        Self {
            stops,
            window: longest + 8,
        }
    }

    /// Whether the answer ends with its last token.
    pub fn check(&self, tokens: &[u32]) -> Option<Finish> {
        let last = tokens.last()?;
        if self.stops.tokens.contains(last) {
            return Some(Finish::StopToken);
        }
        if self.stops.strings.is_empty() && !self.stops.block {
            return None;
        }
        let tail = &tokens[tokens.len().saturating_sub(self.window)..];
        let text = self.stops.tokenizer.decode(tail);
        let said = |s: &String| text.contains(s.as_str());
        // The whole text is only read where its end may have closed a block.
        let closed = || {
            text.contains("```")
                && text.contains('\n')
                && first_block_is_closed(&self.stops.tokenizer.decode(tokens))
        };
        (self.stops.strings.iter().any(said) || self.stops.block && closed())
            .then_some(Finish::StopString)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn an_answer_ends_with_its_first_block_where_that_is_asked_for() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/formats/tiny.gguf");
        let tokenizer = Checkpoint::open(file).unwrap().tokenizer().unwrap();
        let text = "So:\n```python\ns = '```'\n```\nThat is all.\n```\nx\n```\n";
        let tokens = tokenizer.encode(text, false).unwrap();
        let end = |block: bool| {
            let stops = StopStrings::new(Stops {
                tokens: &[],
                strings: &[],
                block,
                tokenizer: &tokenizer,
            });
            (1..=tokens.len()).find(|&n| stops.check(&tokens[..n]).is_some())
        };
        assert_eq!(end(false), None);
        let answer = tokenizer.decode(&tokens[..end(true).unwrap()]);
        assert_eq!(answer.trim_end(), "So:\n```python\ns = '```'\n```");
        assert!(answer.ends_with('\n'));
    }
}
