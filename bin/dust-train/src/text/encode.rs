//! A conversation to tokens, such that only the template makes control tokens.
//!
//! Contents are written by others: a candidate program that holds `<|im_end|>` must not end the
//! turn that shows it. Such names are taken out of the contents before the template sees them, each
//! replaced by a character of Unicode's private use area that occurs nowhere else, and put back as
//! plain text when the rendered prompt is encoded. So the template may cut, trim or repeat contents
//! as it likes, and a conversation without such names has exactly its ordinary tokens.

use std::collections::BTreeMap;

use super::{ChatOptions, ChatTemplate, Message, Role, Tokenizer};
use crate::checkpoint::Error;

/// The prompt for a conversation, as tokens.
///
/// The names of special tokens in a content are plain text. So are the names of other added tokens
/// that are spelled like tags (`<think>`, `<tool_call>`), except in what the model said itself.
///
/// # Errors
/// A conversation that the template refuses, a text that cannot be tokenized.
pub fn encode_chat(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &ChatOptions,
) -> Result<Vec<u32>, Error> {
    let rendered = template.render(messages, options)?;
    let mut masks = Masks::new(&rendered, messages);
    let masked: Vec<Message> = messages
        .iter()
        .map(|message| {
            let control = tokenizer.control_tokens(message.role != Role::Assistant);
            Message::new(message.role, masks.hide(&message.content, control))
        })
        .collect();
    if masks.names.is_empty() {
        return tokenizer.encode(&rendered, true);
    }
    let rendered = template.render(&masked, options)?;
    let mut tokens = Vec::new();
    let mut rest = rendered.as_str();
    while let Some(at) = rest.find(|c| masks.names.contains_key(&c)) {
        let mut after = rest[at..].chars();
        let name = after.next().and_then(|mask| masks.names.get(&mask));
        tokens.extend(tokenizer.encode(&rest[..at], true)?);
        // In two parts, so that the name of no added token is whole.
        let mut letters = name.map(String::as_str).unwrap_or_default().chars();
        let first = letters.next().map(String::from).unwrap_or_default();
        tokens.extend(tokenizer.encode(&first, false)?);
        tokens.extend(tokenizer.encode(letters.as_str(), false)?);
        rest = after.as_str();
    }
    tokens.extend(tokenizer.encode(rest, true)?);
    Ok(tokens)
}

/// Characters that stand for names.
struct Masks {
    /// Characters of the private use area that are nowhere in the conversation.
    free: Vec<char>,
    names: BTreeMap<char, String>,
}

impl Masks {
    fn new(rendered: &str, messages: &[Message]) -> Self {
        let contents = messages.iter().map(|m| m.content.as_str());
        let used: Vec<char> = contents
            .chain([rendered])
            .flat_map(str::chars)
            .filter(|c| PRIVATE_USE.contains(c))
            .collect();
        Self {
            free: PRIVATE_USE.rev().filter(|c| !used.contains(c)).collect(),
            names: BTreeMap::new(),
        }
    }

    /// `content` with every name in it replaced, the longest first where two begin together.
    fn hide<'a>(&mut self, content: &str, names: impl Iterator<Item = &'a str>) -> String {
        let mut names: Vec<&str> = names.filter(|name| content.contains(name)).collect();
        names.sort_unstable_by_key(|name| std::cmp::Reverse(name.len()));
        let mut hidden = String::with_capacity(content.len());
        let mut rest = content;
        while let Some(letter) = rest.chars().next() {
            match names.iter().find(|name| rest.starts_with(**name)) {
                Some(name) => {
                    hidden.extend(self.mask(name));
                    rest = &rest[name.len()..];
                }
                None => {
                    hidden.push(letter);
                    rest = &rest[letter.len_utf8()..];
                }
            }
        }
        hidden
    }

    /// The character for a name. There are more of them than any vocabulary has special tokens; a
    /// conversation that uses them up loses the names that are left.
    fn mask(&mut self, name: &str) -> Option<char> {
        let known = self.names.iter().find(|(_, known)| *known == name);
        if let Some((&mask, _)) = known {
            return Some(mask);
        }
        let mask = self.free.pop()?;
        self.names.insert(mask, name.to_owned());
        Some(mask)
    }
}

/// Unicode's private use area of the basic plane, 6,400 characters.
const PRIVATE_USE: std::ops::RangeInclusive<char> = '\u{e000}'..='\u{f8ff}';
