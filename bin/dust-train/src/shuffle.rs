//! Seeded shuffles.

use rand_chacha::rand_core::Rng;

/// Fisher-Yates. Written out because a library may change its draws between versions, and a
/// recorded seed has to give the recorded order.
pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for i in (1..items.len()).rev() {
        let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
        items.swap(i, j as usize);
    }
}
