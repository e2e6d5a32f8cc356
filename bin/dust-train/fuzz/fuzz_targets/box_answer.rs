//! Whatever a box sends is judged, against whatever a test expects.
#![no_main]

use dust_train::sandbox::{Verdict, fuzz};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &str)| {
    let (frame, expected) = input;
    // A box can be wrong in many ways, but the host's fault it can never be.
    assert_ne!(fuzz::answer(frame, expected), Some(Verdict::InfraError));
});
