//! Number formats and roundings that the host does not have.

/// Rounding of a floating-point result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// Toward zero.
    Zero,
    /// Toward minus infinity.
    Down,
    /// Toward plus infinity.
    Up,
}

/// A binary format of at most 32 bits: significand bits without the hidden one, exponent bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Stored significand bits.
    pub mantissa: u32,
    /// Exponent bits.
    pub exponent: u32,
    /// Whether the top exponent encodes infinities (e4m3 has only a NaN there).
    pub infinite: bool,
}

/// IEEE half precision.
pub const F16: Format = Format {
    mantissa: 10,
    exponent: 5,
    infinite: true,
};
/// The upper half of an f32.
pub const BF16: Format = Format {
    mantissa: 7,
    exponent: 8,
    infinite: true,
};
/// f32 with 10 significand bits, kept in the upper 19 bits of a word.
pub const TF32: Format = Format {
    mantissa: 10,
    exponent: 8,
    infinite: true,
};
/// 8 bits without infinities.
pub const E4M3: Format = Format {
    mantissa: 3,
    exponent: 4,
    infinite: false,
};
/// 8 bits with infinities.
pub const E5M2: Format = Format {
    mantissa: 2,
    exponent: 5,
    infinite: true,
};

impl Format {
    fn sign_bit(self) -> u32 {
        1 << (self.mantissa + self.exponent)
    }

    /// The bits of the NaN that conversions give.
    pub fn nan(self) -> u32 {
        self.sign_bit() - 1
    }

    fn largest(self) -> u32 {
        if self.infinite {
            (((1 << self.exponent) - 1) << self.mantissa) - 1
        } else {
            self.sign_bit() - 2
        }
    }

    /// Value of the low bits, exact.
    pub fn decode(self, bits: u32) -> f64 {
        let m = self.mantissa;
        let top = (1u32 << self.exponent) - 1;
        let exponent = (bits >> m) & top;
        let fraction = bits & ((1 << m) - 1);
        let bias = (top >> 1) as i32;
        let special = if self.infinite {
            exponent == top
        } else {
            bits & (self.sign_bit() - 1) == self.sign_bit() - 1
        };
        let magnitude = if special {
            if fraction == 0 && self.infinite {
                f64::INFINITY
            } else {
                f64::NAN
            }
        } else if exponent == 0 {
            fraction as f64 * power_of_two(1 - bias - m as i32)
        } else {
            ((1 << m) + fraction) as f64 * power_of_two(exponent as i32 - bias - m as i32)
        };
        if bits & self.sign_bit() != 0 {
            -magnitude
        } else {
            magnitude
        }
    }

    /// Rounds once from f64. With `saturate`, overflow and infinities give the largest value.
    pub fn encode(self, x: f64, round: Round, saturate: bool) -> u32 {
        if x.is_nan() {
            return self.nan();
        }
        let negative = x.is_sign_negative();
        let sign = if negative { self.sign_bit() } else { 0 };
        let magnitude = x.abs();
        if magnitude == 0.0 {
            return sign;
        }
        let top = (1i32 << self.exponent) - 1;
        let bias = top >> 1;
        let overflow = if saturate {
            self.largest()
        } else if self.infinite {
            self.largest() + 1
        } else {
            self.nan()
        };
        if magnitude.is_infinite() {
            return sign | overflow;
        }
        let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(1 - bias);
        let ulp = exponent - self.mantissa as i32;
        // Two steps: 2^-ulp itself may overflow nothing here, |ulp| stays below 160.
        let scaled = magnitude * power_of_two(-ulp);
        let whole = scaled.floor();
        let rest = scaled - whole;
        let up = match round {
            Round::Nearest => rest > 0.5 || (rest == 0.5 && whole as u64 & 1 == 1),
            Round::Zero => false,
            Round::Down => negative && rest > 0.0,
            Round::Up => !negative && rest > 0.0,
        };
        let steps = ((exponent - (1 - bias)) as u64) << self.mantissa;
        let bits = steps + whole as u64 + up as u64;
        if bits > self.largest() as u64 {
            let away = match round {
                Round::Nearest => true,
                Round::Zero => false,
                Round::Down => negative,
                Round::Up => !negative,
            };
            return sign | if away { overflow } else { self.largest() };
        }
        sign | bits as u32
    }
}

/// 2^n for -1022 <= n <= 1023.
pub fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1023) as u64) << 52)
}

/// f32 to bf16, to nearest even; NaN becomes 0x7fff.
#[inline(always)]
pub fn bf16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if nan { 0x7fff } else { (rounded >> 16) as u16 }
}

/// bf16 to f32, exact.
#[inline(always)]
pub fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// f16 to f32, exact.
#[inline(always)]
pub fn f16_to_f32(x: u16) -> f32 {
    let magnitude = ((x & 0x7fff) as u32) << 13;
    // Read as an f32 the exponent is off by 112; a multiplication also normalises subnormals.
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    let special = if magnitude >= 0x7c00 << 13 {
        0x7f80_0000 | magnitude
    } else {
        scaled.to_bits()
    };
    f32::from_bits(special | ((x as u32 & 0x8000) << 16))
}

/// f32 to f16, to nearest even; NaN becomes 0x7fff.
#[inline(always)]
pub fn f16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return 0x7fff;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Adding 2^-1 aligns the last bit of the sum with f16's subnormal ulp 2^-24.
        let sum = f32::from_bits(magnitude) + 0.5;
        return sign | (sum.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    sign | ((rounded - 0x3800_0000) >> 13) as u16
}

/// f64 to f32 in a given rounding.
pub fn f32_from_f64(x: f64, round: Round) -> f32 {
    let y = x as f32;
    let back = y as f64;
    match round {
        Round::Zero if back.abs() > x.abs() => {
            if x > 0.0 {
                y.next_down()
            } else {
                y.next_up()
            }
        }
        Round::Down if back > x => y.next_down(),
        Round::Up if back < x => y.next_up(),
        _ => y,
    }
}

/// Exact sum's f64 neighbour whose last bit is odd unless the sum is exact. Rounding that once
/// more to a format 2 or more bits shorter equals rounding the exact sum.
#[inline(always)]
pub fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    let bb = s - a;
    let error = (a - (s - bb)) + (b - bb);
    odd(s, error)
}

/// As [`add_odd`], for `a * b + c` where the product fits an f64 exactly.
#[inline(always)]
pub fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    add_odd(a * b, c)
}

#[inline(always)]
fn odd(s: f64, error: f64) -> f64 {
    // A NaN error means that the sum is NaN or infinite: nothing to adjust.
    if error == 0.0 || error.is_nan() || s.to_bits() & 1 == 1 || !s.is_finite() {
        return s;
    }
    if (error > 0.0) == (s > 0.0) {
        f64::from_bits(s.to_bits() | 1)
    } else {
        f64::from_bits(s.to_bits() - 1)
    }
}

/// f64 to f32 so that rounding the result to f16 or bf16 rounds only once.
#[inline(always)]
pub fn f32_odd(x: f64) -> f32 {
    let y = x as f32;
    let back = y as f64;
    if back == x || x.is_nan() || x.is_infinite() {
        return y;
    }
    let bits = y.to_bits();
    f32::from_bits(if back.abs() > x.abs() {
        (bits - 1) | 1
    } else {
        bits | 1
    })
}

/// Steps from an f64 rounded to nearest to the given rounding, knowing the sign of what was lost.
/// `finite` tells that the operands were, so that an infinity is an overflow.
pub fn direct(nearest: f64, error: f64, finite: bool, round: Round) -> f64 {
    if nearest.is_infinite() && finite {
        let away = match round {
            Round::Nearest => true,
            Round::Zero => false,
            Round::Down => nearest < 0.0,
            Round::Up => nearest > 0.0,
        };
        return if away {
            nearest
        } else {
            f64::MAX.copysign(nearest)
        };
    }
    if error == 0.0 || !nearest.is_finite() || error.is_nan() {
        return nearest;
    }
    match round {
        Round::Nearest => nearest,
        Round::Up if error > 0.0 => nearest.next_up(),
        Round::Down if error < 0.0 => nearest.next_down(),
        Round::Zero if nearest > 0.0 && error < 0.0 => nearest.next_down(),
        Round::Zero if nearest < 0.0 && error > 0.0 => nearest.next_up(),
        _ => nearest,
    }
}
