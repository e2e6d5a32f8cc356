//! When an answer ends before its longest length.

use super::{Finish, Stops};

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
        if self.stops.strings.is_empty() {
            return None;
        }
        let tail = &tokens[tokens.len().saturating_sub(self.window)..];
        let text = self.stops.tokenizer.decode(tail);
        self.stops
            .strings
            .iter()
            .any(|s| text.contains(s.as_str()))
            .then_some(Finish::StopString)
    }
}
