//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers
//! as a pure function of a key and a counter. There is no state to hand on, so any thread or device
//! can make any draw.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four random words.
pub(super) fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [a, b] = [0, 1].map(|i| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]));
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [0, 1].map(|i| key[i].wrapping_add(KEY_STEPS[i]));
    }
    counter
}

/// A number in `[0, 1)` with 53 random bits: the first two words of the key `seed` and the counter
/// `(sequence, position, 0, 0)`.
pub(super) fn uniform(seed: u64, sequence: u32, position: u32) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let [low, high, ..] = philox(key, [sequence, position, 0, 0]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (key, counter, want) in [
            (
                [0; 2],
                [0; 4],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 2],
                [u32::MAX; 4],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0xa409_3822, 0x299f_31d0],
                pi,
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(key, counter), want);
        }
    }

    #[test]
    fn uniform_numbers_use_every_argument_and_stay_below_one() {
        let base = uniform(1, 2, 3);
        for other in [
            uniform(2, 2, 3),
            uniform(1 << 40, 2, 3),
            uniform(1, 3, 3),
            uniform(1, 2, 4),
        ] {
            assert_ne!(base, other);
        }
        let n = 100_000;
        let draws: Vec<f64> = (0..n).map(|i| uniform(7, i % 100, i / 100)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        // Five standard deviations.
        assert!(
            (mean - 0.5).abs() < 5.0 / (12.0 * f64::from(n)).sqrt(),
            "{mean}"
        );
    }
}
