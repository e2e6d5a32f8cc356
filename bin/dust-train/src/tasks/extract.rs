//! The code in what a model wrote.
//!
//! Reasoning is cut away first: what counts starts after the last `</think>`, and a thought that
//! never ended has no answer. Then one of three rules picks a fenced block.
//!
//! A block that is never closed: `first` and `longest` take it to the end of the text, because
//! small models often stop right after the code; if the text was cut off, the code will not run and
//! is labelled so. `last-fence` follows LiveCodeBench to the letter, where it is lost.

use serde::{Deserialize, Serialize};

/// Which fenced block is the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// What lies between the last two lines that contain three backticks, as in LiveCodeBench.
    #[default]
    LastFence,
    /// The first block.
    First,
    /// The longest block; of equal ones the first.
    Longest,
}

/// Why an answer has no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum NoCode {
    /// The reasoning did not end.
    #[error("the reasoning did not end")]
    Unfinished,
    /// There is no fenced block.
    #[error("there is no fenced block")]
    NoBlock,
    /// The block is empty.
    #[error("the block is empty")]
    Empty,
}

/// The part of a completion that follows the reasoning; nothing if the reasoning did not end.
///
/// `thinking` says that the prompt itself opened the thought, as the templates of pure reasoning
/// models do: then there is no `<think>` in the completion, and without `</think>` no answer.
pub fn answer(completion: &str, thinking: bool) -> Option<&str> {
    let (open, close) = (completion.rfind("<think>"), completion.rfind("</think>"));
    match (open, close) {
        (Some(open), Some(close)) if open > close => None,
        (_, Some(close)) => Some(&completion[close + "</think>".len()..]),
        (Some(_), None) => None,
        (None, None) => (!thinking).then_some(completion),
    }
}

/// The code of a completion.
pub fn extract(completion: &str, thinking: bool, rule: Rule) -> Result<String, NoCode> {
    let answer = answer(completion, thinking).ok_or(NoCode::Unfinished)?;
    let code = match rule {
        Rule::LastFence => last_fence(answer),
        Rule::First => {
            let (closed, open) = blocks(answer);
            closed.into_iter().next().or(open)
        }
        Rule::Longest => {
            let (closed, open) = blocks(answer);
            let all = closed.into_iter().chain(open).rev();
            all.max_by_key(|code| code.trim().len())
        }
    }
    .ok_or(NoCode::NoBlock)?;
    if code.trim().is_empty() {
        return Err(NoCode::Empty);
    }
    Ok(code)
}

/// Whether the first block of `text` has ended, so that [`Rule::First`] takes it whatever follows,
/// reasoning excepted. The line of its closing fence has to be whole: it may go on otherwise.
pub fn first_block_is_closed(text: &str) -> bool {
    let end = text.rfind('\n').map_or(0, |newline| newline + 1);
    !blocks(&text[..end]).0.is_empty()
}

fn last_fence(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.split('\n').collect();
    let mut fences = (0..lines.len()).rev().filter(|&i| lines[i].contains("```"));
    let (close, open) = (fences.next()?, fences.next()?);
    Some(lines[open + 1..close].join("\n"))
}

/// The fenced blocks as Markdown reads them: a fence of n backticks is closed by one of at least n
/// and nothing else on its line; the indentation of the opening fence is taken off every line. A last
/// block that is never closed stands apart.
fn blocks(text: &str) -> (Vec<String>, Option<String>) {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, usize, Vec<&str>)> = None;
    for line in text.lines() {
        let body = line.trim_start_matches([' ', '\t']);
        let indent = line.len() - body.len();
        let ticks = body.len() - body.trim_start_matches('`').len();
        let rest = &body[ticks..];
        if let Some((fence, _, code)) = &mut open
            && ticks >= *fence
            && rest.trim().is_empty()
        {
            blocks.push(code.join("\n"));
            open = None;
        } else if let Some((_, margin, code)) = &mut open {
            code.push(&line[indent.min(*margin)..]);
        } else if ticks >= 3 && !rest.contains('`') {
            open = Some((ticks, indent, Vec::new()));
        }
    }
    (blocks, open.map(|(_, _, code)| code.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TWO: &str = "Idea:\n```python\nx = 1\ny = 2\n```\nor\n```\nz = 3\n```\nDone.";

    fn get(text: &str, rule: Rule) -> Result<String, NoCode> {
        extract(text, false, rule)
    }

    #[test]
    fn each_rule_picks_its_block() {
        assert_eq!(get(TWO, Rule::LastFence).unwrap(), "z = 3");
        assert_eq!(get(TWO, Rule::First).unwrap(), "x = 1\ny = 2");
        assert_eq!(get(TWO, Rule::Longest).unwrap(), "x = 1\ny = 2");
        let tie = "```\na\n```\n```\nb\n```";
        assert_eq!(get(tie, Rule::Longest).unwrap(), "a");
    }

    #[test]
    fn an_unclosed_block() {
        let text = "```python\nx = 1\n";
        assert_eq!(get(text, Rule::LastFence), Err(NoCode::NoBlock));
        assert_eq!(get(text, Rule::First).unwrap(), "x = 1");
        // Upstream then takes the text between the two blocks.
        let text = "```\na\n```\nbetween\n```\nb";
        assert_eq!(get(text, Rule::LastFence).unwrap(), "between");
        assert_eq!(get(text, Rule::Longest).unwrap(), "a");
    }

    #[test]
    fn only_what_follows_the_thought_counts() {
        let text = format!("<think>{TWO}</think>\n```\nanswer\n```");
        for rule in [Rule::LastFence, Rule::First, Rule::Longest] {
            assert_eq!(get(&text, rule).unwrap(), "answer");
        }
        assert_eq!(
            get(&format!("<think>{TWO}"), Rule::First),
            Err(NoCode::Unfinished)
        );
        assert_eq!(
            get(&format!("a</think>b<think>{TWO}"), Rule::First),
            Err(NoCode::Unfinished)
        );
        assert_eq!(extract(TWO, true, Rule::First), Err(NoCode::Unfinished));
        assert!(extract(&format!("hm</think>{TWO}"), true, Rule::First).is_ok());
    }

    #[test]
    fn nothing_to_run() {
        for rule in [Rule::LastFence, Rule::First, Rule::Longest] {
            assert_eq!(get("no code", rule), Err(NoCode::NoBlock));
            assert_eq!(get("```python\n \n```", rule), Err(NoCode::Empty));
            assert_eq!(get("", rule), Err(NoCode::NoBlock));
        }
        assert_eq!(get("say ```x``` inline", Rule::First), Err(NoCode::NoBlock));
    }

    #[test]
    fn indented_and_longer_fences() {
        let text = "1. so:\n   ```python\n   if x:\n       y\n   ```";
        assert_eq!(get(text, Rule::First).unwrap(), "if x:\n    y");
        let text = "````\ns = '''\n```\n'''\n````";
        assert_eq!(get(text, Rule::First).unwrap(), "s = '''\n```\n'''");
        let text = "```python\r\nx = 1\r\n```\r\n";
        assert_eq!(get(text, Rule::First).unwrap(), "x = 1");
    }

    #[test]
    fn a_block_ends_with_the_line_of_its_fence() {
        for (text, ends) in [
            ("Here:\n```python\nx = 1\n", false),
            ("```\n", false),
            ("```\nx\n```", false),
            ("```\nx\n```python", false),
            ("```\nx\n``` \nDone", true),
            ("````\nx\n```\n", false),
            ("say ```x``` inline\n", false),
        ] {
            assert_eq!(first_block_is_closed(text), ends, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_follows_a_closed_block_changes_nothing(text in "(```|`|\n| |a){0,40}", more in "(```|`|\n| |a){0,20}") {
            if first_block_is_closed(&text) {
                let all = format!("{text}{more}");
                prop_assert_eq!(get(&text, Rule::First), get(&all, Rule::First));
            }
        }

        #[test]
        fn any_text_is_read(text in "(```|`|\n|<think>|</think>|[ é a]){0,40}") {
            for rule in [Rule::LastFence, Rule::First, Rule::Longest] {
                for thinking in [false, true] {
                    if let Ok(code) = extract(&text, thinking, rule) {
                        prop_assert!(!code.trim().is_empty());
                    }
                }
            }
        }

        #[test]
        fn a_lone_block_comes_back(code in "[a-z][a-z =\n]{0,60}[a-z]") {
            let text = format!("Here:\n```python\n{code}\n```\nthat is all");
            for rule in [Rule::LastFence, Rule::First, Rule::Longest] {
                prop_assert_eq!(get(&text, rule).unwrap(), code.clone());
            }
        }
    }
}
