//! Files of NumPy arrays: the header is kept, the data goes to the device and back.

/// An array file in two parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Npy {
    header: Vec<u8>,
    /// The elements as they lie in memory.
    pub data: Vec<u8>,
}

impl Npy {
    /// Takes a file apart; says what is wrong with it otherwise.
    pub fn parse(bytes: &[u8]) -> Result<Npy, String> {
        if bytes.len() < 10 || &bytes[..6] != b"\x93NUMPY" {
            return Err("not a .npy file: save it with numpy.save".to_string());
        }
        let (start, length) = match bytes[6] {
            1 => (10, u16::from_le_bytes([bytes[8], bytes[9]]) as usize),
            2 | 3 if bytes.len() >= 12 => {
                let length = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
                (12, length as usize)
            }
            version => return Err(format!("version {version} of .npy is not known")),
        };
        let end = start + length;
        let header = bytes.get(start..end).ok_or("the header is cut off")?;
        let text = std::str::from_utf8(header).map_err(|_| "the header is not text")?;
        if text.contains("'O'") || text.contains('>') {
            return Err("objects and big-endian arrays cannot go to a device".to_string());
        }
        Ok(Npy {
            header: bytes[..end].to_vec(),
            data: bytes[end..].to_vec(),
        })
    }

    /// The file again.
    pub fn bytes(&self) -> Vec<u8> {
        [self.header.as_slice(), self.data.as_slice()].concat()
    }
}
