//! GGUF files: metadata, tensor directory and dequantised tensors.
//!
//! The file is read with positioned reads, not mapped: a file that shrinks while it is read gives
//! an error instead of a signal. Every length is compared with what is left of the file before
//! anything is allocated for it.

mod layout;
pub mod quant;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::Error;
use quant::GgmlType;

pub(crate) use layout::{gguf_name, unpermute_rotary};

/// No language model's vocabulary comes near this; it bounds the memory that a damaged length can
/// claim.
const MAX_ARRAY: u64 = 1 << 24;
/// Metadata and tensor directory of the largest known models take some tens of megabytes.
const MAX_HEADER: u64 = 1 << 28;

const DAMAGED: &str = "the file is damaged or cut short: fetch it again";

/// A metadata value. GGUF's number types are widened; arrays of numbers keep only what a reader
/// needs.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer type.
    Integer(i64),
    /// `f32` or `f64`; an `f32` becomes the `f64` with the same shortest decimal form, so that
    /// 1e-5 stays 1e-5.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    String(String),
    /// An array of strings.
    Strings(Vec<String>),
    /// An array of integers or truth values.
    Integers(Vec<i64>),
    /// An array of floating-point numbers.
    Floats(Vec<f64>),
}

/// Where a tensor lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Element type.
    pub ty: GgmlType,
    offset: u64,
    bytes: usize,
}

/// An open GGUF file whose header has been checked.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens a file, and reads and checks its header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let len = file
            .metadata()
            .map_err(|e| Error::io(path, "inspect", e))?
            .len();
        let mut header = Header {
            path,
            reader: BufReader::with_capacity(1 << 16, &file),
            at: 0,
            len,
        };
        let (metadata, tensors) = header.parse()?;
        Ok(Self {
            path: path.to_owned(),
            file,
            metadata,
            tensors,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and places of the tensors, in the file's own names.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// A metadata value, if the file has it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        pick: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        pick(value)
            .map(Some)
            .ok_or_else(|| Error::invalid(&self.path, key, format!("is not {wanted}"), DAMAGED))
    }

    /// A non-negative integer.
    pub fn unsigned(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a non-negative integer", |v| match v {
            Value::Integer(i) => usize::try_from(*i).ok(),
            _ => None,
        })
    }

    /// A floating-point number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |v| match v {
            Value::Float(f) => Some(*f),
            _ => None,
        })
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a truth value", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, Error> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Strings(s) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// An array of integers.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, Error> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Integers(i) => Some(i.as_slice()),
            _ => None,
        })
    }

    /// Reads a tensor and decodes it to f32, in the file's own layout.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, Error> {
        let info = self.tensors.get(name).ok_or_else(|| {
            Error::invalid(
                &self.path,
                name,
                "the tensor is missing",
                "fetch the file again",
            )
        })?;
        let mut raw = vec![0; info.bytes];
        self.file
            .read_exact_at(&mut raw, info.offset)
            .map_err(|e| {
                Error::invalid(
                    &self.path,
                    name,
                    format!("cannot read the tensor: {e}"),
                    DAMAGED,
                )
            })?;
        let mut data = vec![0.0; info.shape.iter().product()];
        info.ty.dequantize(&raw, &mut data);
        Ok(data)
    }
}

/// The header while it is being read.
struct Header<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    at: u64,
    len: u64,
}

type Directory = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

impl Header<'_> {
    fn error(&self, field: &str, problem: impl AsRef<str>) -> Error {
        Error::invalid(self.path, field, problem, DAMAGED)
    }

    fn parse(&mut self) -> Result<Directory, Error> {
        if &self.array::<4>("magic")? != b"GGUF" {
            return Err(Error::invalid(
                self.path,
                "magic",
                "the file does not begin with GGUF",
                "give a .gguf file or a folder with config.json and safetensors",
            ));
        }
        let version = self.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(Error::invalid(
                self.path,
                "version",
                format!("version {version} is not supported"),
                "use a little-endian file of version 2 or 3",
            ));
        }
        let tensor_count = self.count("tensor_count", 24)?;
        let value_count = self.count("metadata_kv_count", 12)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..value_count {
            let key = self.string("a metadata key")?;
            let ty = self.u32(&key)?;
            let value = self.value(&key, ty)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.error(&key, "the key appears twice"));
            }
        }

        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = self.string("a tensor name")?;
            let info = self.tensor(&name)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(self.error(&name, "the tensor appears twice"));
            }
        }

        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(a)) if (1..=1 << 16).contains(a) => a.unsigned_abs(),
            Some(_) => return Err(self.error("general.alignment", "is not a sensible integer")),
        };
        let data_start = self.at.next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let end = info
                .offset
                .checked_add(data_start)
                .and_then(|start| start.checked_add(info.bytes as u64));
            match end {
                Some(end) if end <= self.len => info.offset += data_start,
                _ => {
                    let problem = format!(
                        "{} bytes at {} reach past the end of the file of {} bytes",
                        info.bytes, info.offset, self.len
                    );
                    return Err(self.error(name, problem));
                }
            }
        }
        Ok((metadata, tensors))
    }

    fn tensor(&mut self, name: &str) -> Result<TensorInfo, Error> {
        let dims = self.u32(name)?;
        if !(1..=4).contains(&dims) {
            return Err(self.error(name, format!("{dims} dimensions instead of 1 to 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = self.u64(name)?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.push(dim),
                _ => return Err(self.error(name, format!("dimension {dim} makes no sense"))),
            }
        }
        let id = self.u32(name)?;
        let ty = GgmlType::from_id(id).ok_or_else(|| {
            Error::invalid(
                self.path,
                name,
                format!("GGML type {id} is not supported"),
                "use F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
            )
        })?;
        let offset = self.u64(name)?;
        if !shape[0].is_multiple_of(ty.block_len()) {
            let problem = format!("rows of {} do not divide into {ty:?} blocks", shape[0]);
            return Err(self.error(name, problem));
        }
        // The product is bounded by the file's length, and so is what is allocated to read it.
        let bytes = shape
            .iter()
            .try_fold(1_usize, |n, &d| n.checked_mul(d))
            .and_then(|n| (n / ty.block_len()).checked_mul(ty.block_bytes()))
            .filter(|&b| b as u64 <= self.len)
            .ok_or_else(|| self.error(name, "is larger than the file"))?;
        shape.reverse();
        Ok(TensorInfo {
            shape,
            ty,
            offset,
            bytes,
        })
    }

    fn value(&mut self, key: &str, ty: u32) -> Result<Value, Error> {
        Ok(match ty {
            0..=5 | 10 | 11 => Value::Integer(self.integer(key, ty)?),
            6 | 12 => Value::Float(self.number(key, ty)?),
            7 => Value::Bool(self.integer(key, ty)? != 0),
            8 => Value::String(self.string(key)?),
            9 => {
                let element = self.u32(key)?;
                let least = match element {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    _ => return Err(self.error(key, format!("array of unknown type {element}"))),
                };
                let count = self.count(key, least)?;
                match element {
                    8 => Value::Strings(
                        (0..count)
                            .map(|_| self.string(key))
                            .collect::<Result<_, _>>()?,
                    ),
                    6 | 12 => Value::Floats(
                        (0..count)
                            .map(|_| self.number(key, element))
                            .collect::<Result<_, _>>()?,
                    ),
                    _ => Value::Integers(
                        (0..count)
                            .map(|_| self.integer(key, element))
                            .collect::<Result<_, _>>()?,
                    ),
                }
            }
            _ => return Err(self.error(key, format!("unknown value type {ty}"))),
        })
    }

    fn integer(&mut self, key: &str, ty: u32) -> Result<i64, Error> {
        Ok(match ty {
            0 | 7 => self.array::<1>(key)?[0].into(),
            1 => i8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            4 => self.u32(key)?.into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            10 => i64::try_from(self.u64(key)?).map_err(|_| self.error(key, "overflows"))?,
            _ => i64::from_le_bytes(self.array(key)?),
        })
    }

    fn number(&mut self, key: &str, ty: u32) -> Result<f64, Error> {
        Ok(if ty == 6 {
            let single = f32::from_le_bytes(self.array(key)?);
            single.to_string().parse().unwrap_or(f64::from(single))
        } else {
            f64::from_le_bytes(self.array(key)?)
        })
    }

    /// A count of items that take at least `least` bytes each.
    fn count(&mut self, field: &str, least: u64) -> Result<u64, Error> {
        let count = self.u64(field)?;
        if count > MAX_ARRAY || count > (self.len - self.at) / least {
            return Err(self.error(field, format!("{count} items do not fit the file")));
        }
        Ok(count)
    }

    fn string(&mut self, field: &str) -> Result<String, Error> {
        let len = self.count(field, 1)?;
        // `count` has bounded the length by MAX_ARRAY, so it fits a usize.
        let mut bytes = vec![0; len as usize];
        self.fill(field, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.error(field, "a string is not UTF-8"))
    }

    fn u32(&mut self, field: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(field, &mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, field: &str, bytes: &mut [u8]) -> Result<(), Error> {
        let end = self.at + bytes.len() as u64;
        if end > self.len.min(MAX_HEADER) || self.reader.read_exact(bytes).is_err() {
            return Err(self.error(field, "the header ends too early"));
        }
        self.at = end;
        Ok(())
    }
}
