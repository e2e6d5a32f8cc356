//! Does printed text answer a test? LiveCodeBench's rule.
//!
//! Both texts are stripped and cut at `\n`, every line is stripped; there must be equally many
//! lines, and each pair must be equal as text or, token by token, as decimal numbers.

/// Whether `printed` is as good as `expected`.
pub fn same_output(printed: &str, expected: &str) -> bool {
    let mut printed = strip(printed).split('\n');
    let mut expected = strip(expected).split('\n');
    loop {
        match (printed.next(), expected.next()) {
            (None, None) => return true,
            (Some(p), Some(e)) if same_line(strip(p), strip(e)) => {}
            _ => return false,
        }
    }
}

fn same_line(printed: &str, expected: &str) -> bool {
    if printed == expected {
        return true;
    }
    let mut printed = printed.split(is_space).filter(|t| !t.is_empty());
    let mut expected = expected.split(is_space).filter(|t| !t.is_empty());
    loop {
        match (printed.next(), expected.next()) {
            (None, None) => return true,
            (Some(p), Some(e)) => match (Decimal::parse(p), Decimal::parse(e)) {
                (Some(p), Some(e)) if p == e => {}
                _ => return false,
            },
            _ => return false,
        }
    }
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// What `str.strip` removes: Unicode's white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// A number as Python's `Decimal` reads it; not-a-numbers are left out, as they equal nothing.
#[derive(Debug, PartialEq, Eq)]
struct Decimal {
    negative: bool,
    /// No leading and no trailing zeros; empty for zero. `None` for infinity.
    digits: Option<String>,
    exponent: i64,
}

/// Python refuses exponents beyond this.
const MAX_EXPONENT: i64 = 999_999_999_999_999_999;

impl Decimal {
    fn parse(token: &str) -> Option<Self> {
        let text: String = token
            .chars()
            .filter(|&c| c != '_')
            .map(ascii_digit)
            .collect();
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, &text[..]),
        };
        if rest.eq_ignore_ascii_case("inf") || rest.eq_ignore_ascii_case("infinity") {
            return Some(Self {
                negative,
                digits: None,
                exponent: 0,
            });
        }
        let (mantissa, exponent) = match rest.find(['e', 'E']) {
            Some(at) => (&rest[..at], exponent(&rest[at + 1..])?),
            None => (rest, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let mut digits = format!("{whole}{fraction}");
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let mut exponent = exponent.checked_sub(fraction.len() as i64)?;
        let kept = digits.trim_end_matches('0').len();
        exponent = exponent.checked_add((digits.len() - kept) as i64)?;
        digits.truncate(kept);
        let digits = digits.trim_start_matches('0').to_owned();
        if digits.is_empty() {
            return Some(Self {
                negative: false,
                digits: Some(digits),
                exponent: 0,
            });
        }
        (exponent.abs() <= MAX_EXPONENT).then_some(Self {
            negative,
            digits: Some(digits),
            exponent,
        })
    }
}

fn exponent(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.strip_prefix('+').unwrap_or(text).parse().ok()
}

/// Full-width digits count as digits.
fn ascii_digit(c: char) -> char {
    match c {
        '\u{ff10}'..='\u{ff19}' => char::from(b'0' + (c as u32 - 0xff10) as u8),
        _ => c,
    }
}

#[cfg(test)]
mod tests {
    use super::same_output as same;

    #[test]
    fn white_space_around_lines_is_forgiven() {
        assert!(same("\n a \r\nb\n\n", "a\nb") && same("", "\n"));
        assert!(!same("a\n\nb", "a\nb") && !same("a  b", "a b") && !same("A", "a"));
        assert!(!same("a\rb", "a\nb"));
    }

    #[test]
    fn numbers_compare_as_decimals() {
        for (a, b) in [
            ("1.0", "1"),
            ("1e3", "1000"),
            ("1_000", "1000"),
            ("-0", "0"),
            ("inf", "Infinity"),
            ("\u{ff11}", "1"),
            ("1  2.50", "1 2.5"),
            (".5", "0.5"),
            ("5.", "5"),
            ("+3", "3"),
            ("00012", "12"),
            ("0e999", "0"),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for (a, b) in [
            ("3 x", "3.0 x"),
            ("1", "2"),
            ("nan", "NaN"),
            ("0.30000000000000004", "0.3"),
            ("1e9999999999999999999", "2e9999999999999999999"),
            ("--1", "-1"),
            ("1 2", "1"),
            (".", "0"),
            ("1e", "1"),
            ("-inf", "inf"),
        ] {
            assert!(!same(a, b), "{a} {b}");
        }
        assert!(same("nan", "nan"));
    }
}
