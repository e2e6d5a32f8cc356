//! Text to tokens.

use super::PtxError;

/// One token of PTX text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Token<'a> {
    /// A name: opcode, label, register or symbol (`add`, `$L__BB0_1`, `%r1`).
    Word(&'a str),
    /// A dotted word without its dot: directive, modifier or vector component.
    Dot(&'a str),
    /// An integer literal, two's complement.
    Int(u64),
    /// A decimal literal with a fraction or exponent.
    Decimal(f64),
    /// `0f` literal: the bits of an f32.
    F32(u32),
    /// `0d` literal: the bits of an f64.
    F64(u64),
    /// A quoted string without its quotes.
    Str(&'a str),
    /// Any other character.
    Punct(u8),
}

/// A token and the line it stands on, from 1.
#[derive(Clone, Copy, Debug)]
pub struct Spanned<'a> {
    /// The token.
    pub token: Token<'a>,
    /// Its line.
    pub line: u32,
}

fn word_start(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%')
}

fn word_char(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$')
}

fn take_while(bytes: &[u8], from: usize, test: impl Fn(u8) -> bool) -> usize {
    bytes[from..]
        .iter()
        .position(|&c| !test(c))
        .map_or(bytes.len(), |n| from + n)
}

/// Splits PTX text into tokens.
pub fn tokens(text: &str) -> Result<Vec<Spanned<'_>>, PtxError> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4);
    let mut line = 1u32;
    let mut at = 0;
    while at < bytes.len() {
        let c = bytes[at];
        let start = at;
        let token = match c {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at = take_while(bytes, at, |c| c != b'\n');
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let Some(end) = text[at + 2..].find("*/") else {
                    return Err(PtxError::new(line, "comment is not closed"));
                };
                line += text[at..at + 2 + end].matches('\n').count() as u32;
                at += end + 4;
                continue;
            }
            b'"' => {
                let end = take_while(bytes, at + 1, |c| c != b'"');
                if end == bytes.len() {
                    return Err(PtxError::new(line, "string is not closed"));
                }
                at = end + 1;
                let body = &text[start + 1..end];
                out.push(Spanned {
                    token: Token::Str(body),
                    line,
                });
                line += body.matches('\n').count() as u32;
                continue;
            }
            b'.' if bytes.get(at + 1).is_some_and(|&c| word_char(c)) => {
                at = take_while(bytes, at + 1, word_char);
                // `L2::128B`: the double colon belongs to the modifier.
                while bytes.get(at) == Some(&b':')
                    && bytes.get(at + 1) == Some(&b':')
                    && bytes.get(at + 2).is_some_and(|&c| word_char(c))
                {
                    at = take_while(bytes, at + 2, word_char);
                }
                Token::Dot(&text[start + 1..at])
            }
            c if word_start(c) => {
                at = take_while(bytes, at + 1, word_char);
                Token::Word(&text[start..at])
            }
            c if c.is_ascii_digit() => {
                let (token, end) =
                    number(text, at).ok_or_else(|| PtxError::new(line, "malformed number"))?;
                at = end;
                token
            }
            c if c.is_ascii_graphic() => {
                at += 1;
                Token::Punct(c)
            }
            _ => {
                let shown = text[at..].chars().next().unwrap_or('?');
                return Err(PtxError::new(
                    line,
                    format!("unexpected character {shown:?}"),
                ));
            }
        };
        out.push(Spanned { token, line });
    }
    Ok(out)
}

fn number(text: &str, at: usize) -> Option<(Token<'_>, usize)> {
    let bytes = text.as_bytes();
    let prefix = if bytes[at] == b'0' {
        bytes.get(at + 1).copied()
    } else {
        None
    };
    let digits = |from: usize| take_while(bytes, from, |c| c.is_ascii_alphanumeric());
    match prefix {
        Some(b'f' | b'F') => {
            let end = digits(at + 2);
            let bits = u32::from_str_radix(&text[at + 2..end], 16).ok()?;
            (end - at == 10).then_some((Token::F32(bits), end))
        }
        Some(b'd' | b'D') => {
            let end = digits(at + 2);
            let bits = u64::from_str_radix(&text[at + 2..end], 16).ok()?;
            (end - at == 18).then_some((Token::F64(bits), end))
        }
        Some(b'x' | b'X') | Some(b'b' | b'B') => {
            let radix = if prefix == Some(b'x') || prefix == Some(b'X') {
                16
            } else {
                2
            };
            let end = digits(at + 2);
            let body = text[at + 2..end].trim_end_matches('U');
            Some((Token::Int(u64::from_str_radix(body, radix).ok()?), end))
        }
        _ => {
            let mut end = take_while(bytes, at, |c| c.is_ascii_digit());
            let fraction =
                bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit);
            if fraction {
                end = take_while(bytes, end + 1, |c| c.is_ascii_digit());
            }
            let mut exponent = false;
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = matches!(bytes.get(end + 1), Some(b'+' | b'-')) as usize;
                let stop = take_while(bytes, end + 1 + sign, |c| c.is_ascii_digit());
                if stop > end + 1 + sign {
                    end = stop;
                    exponent = true;
                }
            }
            if fraction || exponent {
                return Some((Token::Decimal(text[at..end].parse().ok()?), end));
            }
            let body = &text[at..end];
            let value = if body.len() > 1 && body.starts_with('0') {
                u64::from_str_radix(body, 8).ok()?
            } else {
                body.parse().ok()?
            };
            if bytes.get(end) == Some(&b'U') {
                end += 1;
            }
            Some((Token::Int(value), end))
        }
    }
}
