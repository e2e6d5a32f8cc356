//! Plain data as a box returns it, compared as Python compares.
//!
//! A box answers in tagged JSON: `[…]` is a list, `{"t": […]}` a tuple, `{"i": "0x…"}` an integer
//! beyond 2^53, `{"f": bits}` a float, and so on (`plain` in `zygote.py`). The answer is hostile
//! until proven otherwise: whatever does not parse is simply not equal.

use std::cmp::Ordering;

use serde_json::Value;
use serde_json::value::RawValue;

/// How deep an expected value may be nested: as deep as an answer, which JSON's reader bounds.
const DEPTH: usize = 127;

/// A value of a type that can be compared without running anybody's code.
#[derive(Debug, Clone)]
pub enum Data {
    /// `None`
    None,
    /// An integer or a boolean, which Python compares as one.
    Int(Integer),
    /// A float.
    Float(f64),
    /// A string as code points, lone surrogates included.
    Str(Vec<u32>),
    /// A list.
    List(Vec<Data>),
    /// A tuple.
    Tuple(Vec<Data>),
    /// A dictionary.
    Dict(Vec<(Data, Data)>),
    /// A set, byte string or complex number: nothing that JSON can expect.
    Other,
}

/// An integer of any size: sign and magnitude, big-endian in base 2^32 without leading zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integer {
    negative: bool,
    limbs: Vec<u32>,
}

impl Integer {
    /// From limbs, the least first.
    fn new(negative: bool, mut limbs: Vec<u32>) -> Self {
        while limbs.last() == Some(&0) {
            limbs.pop();
        }
        limbs.reverse();
        Self {
            negative: negative && !limbs.is_empty(),
            limbs,
        }
    }

    /// Linear in the length, as a box may send many and long ones.
    fn from_hex(negative: bool, digits: &str) -> Option<Self> {
        let limb = |chunk: &[u8]| {
            let text = std::str::from_utf8(chunk).ok()?;
            let plain = text.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(text, 16).ok())?
        };
        let limbs: Option<Vec<u32>> = digits.as_bytes().rchunks(8).map(limb).collect();
        (!digits.is_empty()).then_some(Self::new(negative, limbs?))
    }

    fn from_decimal(negative: bool, digits: &str) -> Option<Self> {
        // Longer ones are no test's, and take quadratic time.
        if digits.is_empty() || digits.len() > 100_000 {
            return None;
        }
        let mut limbs: Vec<u32> = Vec::new();
        for chunk in digits.as_bytes().chunks(9) {
            let text = std::str::from_utf8(chunk).ok()?;
            if !text.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            let mut carry = text.parse::<u64>().ok()?;
            let factor = 10u64.pow(chunk.len() as u32);
            for limb in &mut limbs {
                let value = u64::from(*limb) * factor + carry;
                *limb = value as u32;
                carry = value >> 32;
            }
            if carry > 0 {
                limbs.push(carry as u32);
            }
        }
        Some(Self::new(negative, limbs))
    }

    /// `text` in base 10, or with the prefix `0x` in base 16.
    fn parse(text: &str) -> Option<Self> {
        let (negative, digits) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        match digits.strip_prefix("0x") {
            Some(hex) => Self::from_hex(negative, hex),
            None => Self::from_decimal(negative, digits),
        }
    }

    /// The exact value of an integral float.
    fn from_f64(value: f64) -> Option<Self> {
        if !value.is_finite() || value.fract() != 0.0 {
            return None;
        }
        let bits = value.abs().to_bits();
        let exponent = (bits >> 52) as i64 - 1075;
        let mantissa = (bits & ((1 << 52) - 1)) | (1 << 52);
        let hex = if exponent <= 0 {
            format!("{:x}", value.abs() as u64)
        } else {
            format!(
                "{:x}{}",
                u128::from(mantissa) << (exponent % 4),
                "0".repeat(exponent as usize / 4)
            )
        };
        Self::from_hex(value < 0.0, &hex)
    }
}

impl Data {
    /// The answer of a box; `None` if it is not well-formed.
    pub fn from_answer(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Null => Data::None,
            Value::Bool(b) => Data::Int(Integer::parse(if *b { "1" } else { "0" })?),
            Value::Number(n) => Data::Int(Integer::parse(&n.to_string())?),
            Value::String(s) => Data::Str(s.chars().map(u32::from).collect()),
            Value::Array(items) => Data::List(sequence(items)?),
            Value::Object(tagged) => {
                let (tag, body) = tagged.iter().next().filter(|_| tagged.len() == 1)?;
                match tag.as_str() {
                    "i" => Data::Int(Integer::parse(body.as_str()?)?),
                    "f" => Data::Float(f64::from_bits(body.as_u64()?)),
                    "u" => Data::Str(
                        body.as_array()?
                            .iter()
                            .map(|c| u32::try_from(c.as_u64()?).ok())
                            .collect::<Option<_>>()?,
                    ),
                    "t" => Data::Tuple(sequence(body.as_array()?)?),
                    "d" => Data::Dict(
                        body.as_array()?
                            .iter()
                            .map(|pair| match pair.as_array().map(Vec::as_slice) {
                                Some([k, v]) => {
                                    Some((Self::from_answer(k)?, Self::from_answer(v)?))
                                }
                                _ => None,
                            })
                            .collect::<Option<_>>()?,
                    ),
                    "s" | "z" | "b" | "c" => Data::Other,
                    _ => return None,
                }
            }
        })
    }

    /// An expected value as `json.loads` reads it, integers of any size included.
    pub fn from_json(text: &str) -> serde_json::Result<Self> {
        Self::from_json_within(text, DEPTH)
    }

    fn from_json_within(text: &str, room: usize) -> serde_json::Result<Self> {
        let text = text.trim();
        if room == 0 {
            let problem = format!("nested more than {DEPTH} deep");
            return Err(serde::de::Error::custom(problem));
        }
        let inner = |item: &RawValue| Self::from_json_within(item.get(), room - 1);
        Ok(match text.as_bytes().first() {
            Some(b'[') => Data::List(
                serde_json::from_str::<Vec<&RawValue>>(text)?
                    .into_iter()
                    .map(inner)
                    .collect::<Result<_, _>>()?,
            ),
            Some(b'{') => Data::Dict(
                serde_json::from_str::<std::collections::BTreeMap<String, &RawValue>>(text)?
                    .into_iter()
                    .map(|(k, v)| Ok((Data::Str(k.chars().map(u32::from).collect()), inner(v)?)))
                    .collect::<serde_json::Result<_>>()?,
            ),
            Some(b'N') if text == "NaN" => Data::Float(f64::NAN),
            Some(b'I') if text == "Infinity" => Data::Float(f64::INFINITY),
            Some(b'-') if text == "-Infinity" => Data::Float(f64::NEG_INFINITY),
            Some(b'-' | b'0'..=b'9') => {
                let number: &RawValue = serde_json::from_str(text)?;
                match Integer::parse(number.get()) {
                    Some(integer) => Data::Int(integer),
                    // Beyond its range a float is infinite, to Python too.
                    None => Data::Float(number.get().parse().unwrap_or(f64::NAN)),
                }
            }
            _ => match serde_json::from_str::<Value>(text)? {
                Value::Bool(b) => Data::Int(Integer {
                    negative: false,
                    limbs: vec![1; b.into()],
                }),
                Value::String(s) => Data::Str(s.chars().map(u32::from).collect()),
                _ => Data::None,
            },
        })
    }

    /// A string as text; `None` for other values, and where a lone surrogate makes it none.
    pub(super) fn text(&self) -> Option<String> {
        match self {
            Data::Str(points) => points.iter().map(|&c| char::from_u32(c)).collect(),
            _ => None,
        }
    }

    /// Python's `self == expected`. `tuples` says how deep a tuple may stand for a list.
    pub fn equals(&self, expected: &Data, tuples: Tuples) -> bool {
        let inner = if tuples == Tuples::Anywhere {
            Tuples::Anywhere
        } else {
            Tuples::Never
        };
        match (self, expected) {
            (Data::None, Data::None) => true,
            (Data::Int(a), Data::Int(b)) => a == b,
            (Data::Float(a), Data::Float(b)) => a.partial_cmp(b) == Some(Ordering::Equal),
            (Data::Int(a), Data::Float(b)) | (Data::Float(b), Data::Int(a)) => {
                Integer::from_f64(*b).is_some_and(|b| b == *a)
            }
            (Data::Str(a), Data::Str(b)) => a == b,
            (Data::Tuple(_), Data::List(_)) if tuples == Tuples::Never => false,
            (Data::List(a) | Data::Tuple(a), Data::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b, inner))
            }
            (Data::Dict(a), Data::Dict(b)) => {
                a.len() == b.len()
                    && b.iter().all(|(key, value)| {
                        a.iter()
                            .any(|(k, v)| k.equals(key, inner) && v.equals(value, inner))
                    })
            }
            _ => false,
        }
    }
}

fn sequence(items: &[Value]) -> Option<Vec<Data>> {
    items.iter().map(Data::from_answer).collect()
}

/// Where a returned tuple equals an expected list (JSON has no tuples).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tuples {
    /// At any depth.
    Anywhere,
    /// At the top only, as LiveCodeBench's evaluator has it.
    Top,
    /// Nowhere.
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn same(answer: &str, expected: &str) -> bool {
        let answer = Data::from_answer(&serde_json::from_str(answer).unwrap()).unwrap();
        answer.equals(&Data::from_json(expected).unwrap(), Tuples::Anywhere)
    }

    fn float(value: f64) -> String {
        format!("{{\"f\":{}}}", value.to_bits())
    }

    #[test]
    fn numbers_compare_as_in_python() {
        assert!(same("1", "1.0") && same("true", "1") && same("1", "true") && same("0", "false"));
        assert!(same(&float(2.0), "2") && same(&float(0.5), "0.5") && same(&float(-0.0), "0"));
        assert!(!same(&float(0.1 + 0.2), "0.3") && !same("1", "\"1\"") && !same("null", "0"));
        assert!(!same(&float(f64::NAN), "NaN") && same(&float(f64::INFINITY), "Infinity"));
        let factorial = "15511210043330985984000000";
        assert!(same("{\"i\":\"0xcd4a0619fb0907bc00000\"}", factorial));
        assert!(!same("{\"i\":\"0xcd4a0619fb0907bc00001\"}", factorial));
        assert!(same(&float(1e25), "10000000000000000905969664"));
        assert!(!same(&float(1e25), "10000000000000000000000000"));
        assert!(same("{\"i\":\"-0x20000000000000\"}", "-9007199254740992"));
    }

    #[test]
    fn containers_compare_by_content() {
        assert!(same("{\"t\":[1,{\"t\":[2]}]}", "[1,[2]]"));
        assert!(same(
            "{\"d\":[[\"b\",2],[\"a\",[1]]]}",
            "{\"a\":[1],\"b\":2}"
        ));
        assert!(!same("{\"d\":[[1,2]]}", "{\"1\":2}") && !same("{\"s\":[1]}", "[1]"));
        assert!(!same("[1,2]", "[1]") && !same("{\"u\":[55296]}", "\"x\""));
        let nested = Data::Tuple(vec![Data::Tuple(vec![])]);
        assert!(!nested.equals(&Data::from_json("[[]]").unwrap(), Tuples::Top));
        assert!(Data::Tuple(vec![]).equals(&Data::from_json("[]").unwrap(), Tuples::Top));
    }

    #[test]
    fn depth_and_length_are_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(Data::from_json(&nested(DEPTH)).is_ok());
        let error = Data::from_json(&nested(100_000)).unwrap_err().to_string();
        assert!(error.contains("nested more than"), "{error}");
        let answer = Value::from(format!("0x{}", "f".repeat(1 << 20)));
        let start = std::time::Instant::now();
        for _ in 0..20 {
            assert!(Data::from_answer(&serde_json::json!({"i": answer})).is_some());
        }
        // A quadratic reader takes minutes.
        assert!(start.elapsed().as_secs() < 20);
    }

    proptest! {
        #[test]
        fn integers_survive_in_both_bases(n in any::<i128>()) {
            let hex = format!("{}0x{:x}", if n < 0 { "-" } else { "" }, n.unsigned_abs());
            let answer = serde_json::json!({"i": hex}).to_string();
            prop_assert!(same(&answer, &n.to_string()));
            prop_assert!(!same(&answer, &n.wrapping_add(1).to_string()));
        }

        #[test]
        fn an_answer_equals_what_it_says_and_nothing_near(value in value()) {
            let expected = value.to_string();
            prop_assert!(same(&answer(&value).to_string(), &expected));
            let other = serde_json::json!([value]).to_string();
            prop_assert!(!same(&answer(&value).to_string(), &other));
        }
    }

    /// JSON without its floats' rounding: what a test may expect.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            any::<f64>()
                .prop_filter("finite", |x| x.is_finite())
                .prop_map(Value::from),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".{0,3}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The answer that a box sends for it.
    fn answer(value: &Value) -> Value {
        match value {
            Value::Number(n) if n.is_f64() => {
                serde_json::json!({"f": n.as_f64().map(f64::to_bits)})
            }
            Value::Array(items) => items.iter().map(answer).collect(),
            Value::Object(map) => {
                let pairs = map.iter().map(|(k, v)| serde_json::json!([k, answer(v)]));
                serde_json::json!({"d": pairs.collect::<Vec<_>>()})
            }
            plain => plain.clone(),
        }
    }

    #[test]
    fn malformed_answers_are_refused() {
        for text in [
            "{}",
            "{\"i\":1}",
            "{\"i\":\"0xg\"}",
            "{\"f\":-1}",
            "{\"d\":[[1]]}",
            "{\"q\":1}",
            "1.5",
        ] {
            assert!(
                Data::from_answer(&serde_json::from_str(text).unwrap()).is_none(),
                "{text}"
            );
        }
    }
}
