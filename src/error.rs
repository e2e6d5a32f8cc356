//! What can go wrong in a kernel call.

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation refused its arguments or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer is smaller than the shape asks for.
    #[error("{op}: `{name}` holds {len} elements, the shape needs {needed}")]
    TooShort {
        /// The operation that refused.
        op: &'static str,
        /// The argument's name.
        name: &'static str,
        /// Elements that the buffer holds.
        len: usize,
        /// Elements that the shape needs.
        needed: usize,
    },
    /// A shape or a setting breaks a rule of the operation.
    #[error("{op}: {rule}")]
    Invalid {
        /// The operation that refused.
        op: &'static str,
        /// The rule that was broken, with the offending figures.
        rule: String,
    },
    /// An index (a token, a row, a page) points outside of what it indexes.
    #[error("{op}: `{name}`[{at}] is {value}, it must be below {limit}")]
    OutOfRange {
        /// The operation that refused.
        op: &'static str,
        /// The argument's name.
        name: &'static str,
        /// Where the bad index stands.
        at: usize,
        /// The bad index.
        value: usize,
        /// The first value that is not allowed.
        limit: usize,
    },
    /// The device has no memory left.
    #[error("out of memory: {bytes} bytes asked for")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The device's driver reported an error.
    #[error("{op}: {message}")]
    Device {
        /// What was being done.
        op: &'static str,
        /// The driver's words.
        message: String,
        /// The driver's number for it (CUDA's `CUresult`), if it gave one.
        code: Option<u32>,
    },
}

impl Error {
    /// [`Error::Invalid`] from an operation and the rule it holds.
    pub fn invalid(op: &'static str, rule: impl Into<String>) -> Self {
        Error::Invalid {
            op,
            rule: rule.into(),
        }
    }
}

/// Refuses a buffer that is shorter than `needed`.
pub(crate) fn check_len(
    op: &'static str,
    name: &'static str,
    len: usize,
    needed: usize,
) -> Result<()> {
    if len < needed {
        return Err(Error::TooShort {
            op,
            name,
            len,
            needed,
        });
    }
    Ok(())
}

/// Refuses a matrix buffer that holds fewer than `rows * columns` elements.
pub(crate) fn check_matrix(
    op: &'static str,
    name: &'static str,
    len: usize,
    rows: usize,
    columns: usize,
) -> Result<()> {
    let needed = rows.checked_mul(columns).ok_or_else(|| {
        Error::invalid(
            op,
            format!("`{name}` of {rows} x {columns} elements is larger than memory"),
        )
    })?;
    check_len(op, name, len, needed)
}

/// Refuses the first index of `values` that is not below `limit`.
pub(crate) fn check_indices(
    op: &'static str,
    name: &'static str,
    values: &[u32],
    limit: usize,
) -> Result<()> {
    match values.iter().position(|&v| v as usize >= limit) {
        None => Ok(()),
        Some(at) => Err(Error::OutOfRange {
            op,
            name,
            at,
            value: values[at] as usize,
            limit,
        }),
    }
}
