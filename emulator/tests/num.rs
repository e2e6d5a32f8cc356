//! Number formats against the `half` crate and their documents.

use cuda_emulator::machine::num::*;

#[test]
fn short_conversions_agree_with_the_half_crate() {
    for bits in 0..=u16::MAX {
        let f = half::f16::from_bits(bits).to_f32();
        let b = half::bf16::from_bits(bits).to_f32();
        for (ours, theirs) in [
            (f16_to_f32(bits), f),
            (F16.decode(bits as u32) as f32, f),
            (bf16_to_f32(bits), b),
            (BF16.decode(bits as u32) as f32, b),
        ] {
            assert!(
                ours == theirs || (ours.is_nan() && theirs.is_nan()),
                "{bits:04x}"
            );
        }
    }
}

#[test]
fn rounding_to_short_formats_agrees_with_the_half_crate() {
    let mut state = 1u32;
    for i in 0..2_000_000u32 {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        // Random bits, and values around the range of f16.
        let x = if i & 1 == 0 {
            f32::from_bits(state)
        } else {
            f32::from_bits((state & 0x8fff_ffff) | 0x3000_0000)
        };
        if x.is_nan() {
            continue;
        }
        let (f, b) = (
            half::f16::from_f32(x).to_bits(),
            half::bf16::from_f32(x).to_bits(),
        );
        assert_eq!(f16_from_f32(x), f, "{x:e}");
        assert_eq!(
            F16.encode(x as f64, Round::Nearest, false),
            f as u32,
            "{x:e}"
        );
        assert_eq!(bf16_from_f32(x), b, "{x:e}");
        assert_eq!(
            BF16.encode(x as f64, Round::Nearest, false),
            b as u32,
            "{x:e}"
        );
    }
    assert_eq!(bf16_from_f32(f32::NAN), 0x7fff);
    assert_eq!(f16_from_f32(f32::NAN), 0x7fff);
}

#[test]
fn eight_bit_formats_have_their_documented_extremes() {
    assert_eq!(E4M3.decode(0x7e), 448.0);
    assert!(E4M3.decode(0x7f).is_nan());
    assert_eq!(E4M3.encode(1e9, Round::Nearest, true), 0x7e);
    assert_eq!(E5M2.decode(0x7b), 57344.0);
    assert_eq!(E5M2.encode(-1e9, Round::Nearest, true), 0xfb);
    for bits in 0..=255u32 {
        for format in [E4M3, E5M2] {
            let x = format.decode(bits);
            if x.is_finite() {
                assert_eq!(format.encode(x, Round::Zero, true), bits);
            }
        }
    }
}

#[test]
fn directed_roundings_bracket_the_exact_value() {
    let x = 1.0 + 2f64.powi(-40);
    assert_eq!(f32_from_f64(x, Round::Up), 1.0f32.next_up());
    assert_eq!(f32_from_f64(x, Round::Down), 1.0);
    assert_eq!(f32_from_f64(-x, Round::Zero), -1.0);
    assert_eq!(f32_from_f64(1e300, Round::Zero), f32::MAX);
    // 1 + 2^-25 - 2^-80 must not be mistaken for the tie 1 + 2^-24 after two roundings.
    let sum = add_odd(1.0 + 2f64.powi(-24), -2f64.powi(-80));
    assert_eq!(sum as f32, 1.0);
}
