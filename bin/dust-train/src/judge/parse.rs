//! Reading the ranking out of the judge's text.
//!
//! The ranking is the last line that starts with `Ranking:` (Markdown emphasis and letter case do
//! not matter), or the next line if nothing follows the colon: numbers from 1 to K separated by `>`
//! or `,`, each perhaps as `[2]`, `#2` or `Candidate 2`. The whole line has to be that.

use serde::{Deserialize, Serialize};

use crate::rollout::Finish;
use crate::tasks::extract::answer;

/// How forgiving the reading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parse {
    /// After the end of the reasoning, exactly a permutation of 1..K.
    #[default]
    Strict,
    /// Anywhere, also in reasoning that was cut off, and of a repeated number the first occurrence
    /// is kept: what the release of the paper accepts. For comparisons only.
    Lenient,
}

/// Why a text holds no ranking.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    thiserror::Error,
)]
#[serde(rename_all = "kebab-case")]
pub enum Invalid {
    /// The reasoning did not end.
    #[error("the reasoning did not end")]
    Unfinished,
    /// It reached the longest length, where a number may be cut off.
    #[error("the answer was cut off at its longest length")]
    Cut,
    /// No line states a ranking.
    #[error("no ranking is stated")]
    Missing,
    /// The line holds something else than numbers and separators.
    #[error("the ranking is malformed")]
    Malformed,
    /// A number is not that of a candidate.
    #[error("a number is out of range")]
    OutOfRange,
    /// A candidate is named twice.
    #[error("a candidate is repeated")]
    Repeated,
    /// A candidate is not named.
    #[error("a candidate is left out")]
    Incomplete,
}

/// As [`parse`], of an answer that ended so: one that was cut off is invalid, unless read leniently.
pub fn read(
    text: &str,
    k: usize,
    thinking: bool,
    how: Parse,
    finish: Finish,
) -> Result<Vec<usize>, Invalid> {
    if finish == Finish::Length && how == Parse::Strict {
        return Err(Invalid::Cut);
    }
    parse(text, k, thinking, how)
}

/// The shown positions, from 0, from best to worst. `thinking` is as in [`answer`].
pub fn parse(text: &str, k: usize, thinking: bool, how: Parse) -> Result<Vec<usize>, Invalid> {
    let text = match how {
        Parse::Strict => answer(text, thinking).ok_or(Invalid::Unfinished)?,
        Parse::Lenient => text,
    };
    let line = stated(text).ok_or(Invalid::Missing)?;
    let mut ranking = Vec::with_capacity(k);
    for item in line.split(['>', ',']) {
        let label = number(item).ok_or(Invalid::Malformed)?;
        if !(1..=k).contains(&label) {
            return Err(Invalid::OutOfRange);
        }
        if !ranking.contains(&(label - 1)) {
            ranking.push(label - 1);
        } else if how == Parse::Strict {
            return Err(Invalid::Repeated);
        }
    }
    if ranking.len() < k {
        return Err(Invalid::Incomplete);
    }
    Ok(ranking)
}

/// The last ranking that the text states, without its marker and decoration.
fn stated(text: &str) -> Option<String> {
    // What stands before a reasoning tag on the same line is another statement.
    let plain = |line: &str| {
        let line = line.rsplit("think>").next().unwrap_or(line);
        line.replace(['*', '`', '_'], "").trim().to_owned()
    };
    let mut lines = text.lines().rev();
    let mut below = String::new();
    lines
        .find_map(|line| {
            let line = plain(line);
            let body = line.trim_start_matches(['#', ' ']);
            let body = match body.get(..7) {
                Some(head) if head.eq_ignore_ascii_case("ranking") => &body[7..],
                _ => {
                    if !line.is_empty() {
                        below = line;
                    }
                    return None;
                }
            };
            let stated = body.trim_start().strip_prefix(':')?.trim();
            let stated = if stated.is_empty() { &below } else { stated };
            Some(stated.strip_suffix('.').unwrap_or(stated).to_owned())
        })
        .filter(|stated| !stated.is_empty())
}

fn number(item: &str) -> Option<usize> {
    let mut item = item.trim_matches([' ', '\t', '[', ']']);
    if let Some(head) = item.get(..9)
        && head.eq_ignore_ascii_case("candidate")
    {
        item = item[9..].trim_start();
    }
    let digits = item.strip_prefix('#').unwrap_or(item);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // A number too long for the type is certainly out of range.
    Some(digits.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strict(text: &str) -> Result<Vec<usize>, Invalid> {
        parse(text, 4, false, Parse::Strict)
    }

    #[test]
    fn forms_that_are_accepted() {
        for text in [
            "Ranking: 2 > 1 > 4 > 3",
            "The second is right.\n\n**Ranking:** 2 > 1 > 4 > 3\n",
            "ranking: 2,1,4,3.",
            "## Ranking:\n\n`[2] > [1] > [4] > [3]`",
            "Ranking: Candidate 2 > candidate 1 > #4 > 3",
            "Ranking: 1 > 2 > 3 > 4\nNo, wait.\nRanking: 2>1>4>3\nThat is final.",
            "<think>Ranking: 1 > 2 > 3 > 4</think>Ranking: 2 > 1 > 4 > 3",
        ] {
            assert_eq!(strict(text), Ok(vec![1, 0, 3, 2]), "{text}");
        }
    }

    #[test]
    fn everything_else_is_invalid_for_a_reason() {
        let cases = [
            ("", Invalid::Missing),
            ("2 > 1 > 4 > 3", Invalid::Missing),
            ("Ranking:", Invalid::Missing),
            ("My Ranking: 2 > 1 > 4 > 3", Invalid::Missing),
            ("Ranking: 2 > 1 > 4", Invalid::Incomplete),
            ("Ranking: 2 > 1 > 4 > 5", Invalid::OutOfRange),
            ("Ranking: 0 > 1 > 2 > 3", Invalid::OutOfRange),
            (
                "Ranking: 2 > 1 > 4 > 99999999999999999999999",
                Invalid::OutOfRange,
            ),
            ("Ranking: 2 > 1 > 4 > 2", Invalid::Repeated),
            ("Ranking: 2 > 1 > 4 > 3 > 3", Invalid::Repeated),
            ("Ranking: 2 > 1 = 4 > 3", Invalid::Malformed),
            ("Ranking: 2 > 1 > 4 > -3", Invalid::Malformed),
            ("Ranking: 2 > 1 > 4 > 3 because", Invalid::Malformed),
            ("Ranking: 2 > 1 > 4 >", Invalid::Malformed),
            ("Ranking: 2 1 4 3", Invalid::Malformed),
            ("Ranking: ２ > 1 > 4 > 3", Invalid::Malformed),
            ("<think>Ranking: 2 > 1 > 4 > 3", Invalid::Unfinished),
            ("<think>Ranking: 2 > 1 > 4 > 3</think>", Invalid::Missing),
            ("Ranking: 2 > 1 > 4 > 3\nRanking: none", Invalid::Malformed),
        ];
        for (text, reason) in cases {
            assert_eq!(strict(text), Err(reason), "{text}");
        }
        let text = "Ranking: 2 > 1 > 4 > 3";
        assert_eq!(
            parse(text, 4, true, Parse::Strict),
            Err(Invalid::Unfinished)
        );
    }

    #[test]
    fn lenient_keeps_the_first_occurrence_and_reads_cut_reasoning() {
        let lenient = |text: &str| parse(text, 4, true, Parse::Lenient);
        assert_eq!(
            lenient("Ranking: 2 > 2 > 1 > 4 > 1 > 3"),
            Ok(vec![1, 0, 3, 2])
        );
        assert_eq!(
            lenient("<think>Ranking: 2 > 1 > 4 > 3\nbut"),
            Ok(vec![1, 0, 3, 2])
        );
        assert_eq!(lenient("Ranking: 2 > 2 > 1 > 4"), Err(Invalid::Incomplete));
        assert_eq!(lenient("Ranking: 2 > 5 > 1 > 4"), Err(Invalid::OutOfRange));
    }

    proptest! {
        #[test]
        fn a_valid_result_is_a_permutation(text in "(Ranking:|[ >,\n.*1-5]|</?think>|x){0,30}", k in 1usize..6) {
            for how in [Parse::Strict, Parse::Lenient] {
                if let Ok(mut ranking) = parse(&text, k, false, how) {
                    ranking.sort_unstable();
                    prop_assert_eq!(ranking, (0..k).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn any_text_is_read(text in "\\PC{0,60}", lines in "(\\PC|\n){0,60}") {
            let _ = strict(&format!("Ranking:{text}"));
            let _ = strict(&lines);
        }

        #[test]
        fn every_permutation_is_read_back(order in Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(), before in "[a-z .\n]{0,40}") {
            let labels: Vec<_> = order.iter().map(|i| (i + 1).to_string()).collect();
            let text = format!("{before}\nRanking: {}", labels.join(" > "));
            prop_assert_eq!(parse(&text, 6, false, Parse::Strict), Ok(order));
        }

        #[test]
        fn strict_never_accepts_more_than_lenient(text in "(Ranking: |[1-4] ?[>,] ?|\n|</think>){0,14}") {
            if let Ok(ranking) = strict(&text) {
                prop_assert_eq!(parse(&text, 4, false, Parse::Lenient), Ok(ranking));
            }
        }
    }
}
