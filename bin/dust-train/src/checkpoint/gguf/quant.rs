//! Dequantisation of GGML's block formats to f32.
//!
//! A block format stores a fixed number of weights with shared scales. Each decoder computes in
//! f32 and in the order of the format's reference implementation (scale times scale first, then
//! times the quantised integer, then minus the offset), without fused multiply-add, so that its
//! results are the reference's bit for bit.

use half::f16;

/// The element types of GGUF tensors that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 weights of 4 bits, one scale.
    Q4_0,
    /// 32 weights of 4 bits, scale and minimum.
    Q4_1,
    /// 32 weights of 5 bits, one scale.
    Q5_0,
    /// 32 weights of 5 bits, scale and minimum.
    Q5_1,
    /// 32 weights of 8 bits, one scale.
    Q8_0,
    /// 256 weights of 4 bits in 8 groups with 6-bit scales and minima.
    Q4K,
    /// 256 weights of 5 bits in 8 groups with 6-bit scales and minima.
    Q5K,
    /// 256 weights of 6 bits in 16 groups with 8-bit scales.
    Q6K,
}

impl GgmlType {
    /// The type with this number in a GGUF tensor entry.
    pub fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Weights in a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Decodes whole blocks; what does not fill a block on either side is left alone.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let decode = match self {
            Self::F32 => {
                |b: &[u8], o: &mut [f32]| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])
            }
            Self::F16 => |b: &[u8], o: &mut [f32]| o[0] = half(b, 0),
            Self::Bf16 => |b: &[u8], o: &mut [f32]| o[0] = f32::from_le_bytes([0, 0, b[0], b[1]]),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q4K => q4_k,
            Self::Q5K => q5_k,
            Self::Q6K => q6_k,
        };
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.block_len())) {
            decode(block, out);
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are the first half of the block's weights, high nibbles the second.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    let (first, second) = out.split_at_mut(16);
    for ((q, a), b) in block[2..].iter().zip(first).zip(second) {
        *a = d * (f32::from(q & 15) - 8.0);
        *b = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let (first, second) = out.split_at_mut(16);
    for ((q, a), b) in block[4..].iter().zip(first).zip(second) {
        *a = d * f32::from(q & 15) + m;
        *b = d * f32::from(q >> 4) + m;
    }
}

/// The fifth bits of all 32 weights stand in one little-endian word before the nibbles.
fn five_bits(high: &[u8], nibbles: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let bit = |j: usize| ((high >> j) as u8 & 1) << 4;
    let (first, second) = out.split_at_mut(16);
    for (j, ((q, a), b)) in nibbles.iter().zip(first).zip(second).enumerate() {
        *a = value(f32::from((q & 15) | bit(j)));
        *b = value(f32::from((q >> 4) | bit(j + 16)));
    }
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    five_bits(&block[2..6], &block[6..], out, |q| d * (q - 16.0));
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    five_bits(&block[4..8], &block[8..], out, |q| d * q + m);
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (q, x) in block[2..].iter().zip(out) {
        *x = d * f32::from(q.cast_signed());
    }
}

/// Scale and minimum of group `j` of 8, six bits each, packed in 12 bytes: groups 0 to 3 lie in
/// the low six bits of bytes 0 to 7; groups 4 to 7 have their low four bits in bytes 8 to 11 and
/// their high two bits on top of bytes 0 to 7.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, nibbles) = (&block[4..16], &block[16..]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        for (q, x) in nibbles[32 * (j / 2)..].iter().zip(out) {
            *x = scale * f32::from((q >> shift) & 15) - min;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, high, nibbles) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (j % 2);
        for ((q, h), x) in nibbles[32 * (j / 2)..].iter().zip(high).zip(out) {
            *x = scale * f32::from((q >> shift) & 15 | (h >> j & 1) << 4) - min;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    // Two halves of 128 weights; in each, four rows of 32 share the bytes of `high`, two bits a row.
    for (i, x) in out.iter_mut().enumerate() {
        let (part, row, column) = (i / 128, i / 32 % 4, i % 32);
        let nibble = low[64 * part + 32 * (row % 2) + column] >> (4 * (row / 2)) & 15;
        let top = high[32 * part + column] >> (2 * row) & 3;
        let scale = d * f32::from(scales[i / 16].cast_signed());
        *x = scale * (f32::from(nibble | top << 4) - 32.0);
    }
}
