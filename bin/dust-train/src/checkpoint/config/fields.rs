//! Typed access to the members of a JSON object; a wrong type is an error that names the member.

use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::error::Error;

/// A JSON object, with its file and its place in it for messages.
pub(super) struct Fields<'a> {
    file: &'a Path,
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, prefix: &'a str, json: &'a Value) -> Result<Self, Error> {
        let map = json.as_object().ok_or_else(|| {
            let field = if prefix.is_empty() { "JSON" } else { prefix };
            Error::invalid(file, field, "is not an object", "fetch the file again")
        })?;
        Ok(Self { file, prefix, map })
    }

    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    pub(super) fn error(&self, name: &str, problem: impl AsRef<str>, remedy: &str) -> Error {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        Error::invalid(
            self.file,
            format!("{}{dot}{name}", self.prefix),
            problem,
            remedy,
        )
    }

    /// A member that is present and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        wanted: &str,
        pick: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        self.get(name)
            .map(|value| {
                pick(value).ok_or_else(|| {
                    self.error(
                        name,
                        format!("`{value}` is not {wanted}"),
                        "correct the file",
                    )
                })
            })
            .transpose()
    }

    pub(super) fn unsigned(&self, name: &str) -> Result<Option<usize>, Error> {
        self.typed(name, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f64>, Error> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>, Error> {
        self.typed(name, "a truth value", Value::as_bool)
    }

    pub(super) fn optional_string(&self, name: &str) -> Result<Option<&'a str>, Error> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A token id, or several.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>, Error> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let tokens = self.typed(name, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(one).collect(),
            single => one(single).map(|t| vec![t]),
        })?;
        Ok(tokens.unwrap_or_default())
    }

    pub(super) fn required(&self, name: &str) -> Result<usize, Error> {
        self.unsigned(name)?.ok_or_else(|| self.absent(name))
    }

    pub(super) fn required_float(&self, name: &str) -> Result<f64, Error> {
        self.float(name)?.ok_or_else(|| self.absent(name))
    }

    pub(super) fn string(&self, name: &str) -> Result<&'a str, Error> {
        self.optional_string(name)?.ok_or_else(|| self.absent(name))
    }

    fn absent(&self, name: &str) -> Error {
        self.error(name, "is missing", "fetch or convert the model again")
    }
}
