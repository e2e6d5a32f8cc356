//! Printed text is compared without trouble, and every text with itself as equal.
#![no_main]

use dust_train::sandbox::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (one, other) = input;
    assert!(fuzz::printed(one, one));
    assert_eq!(fuzz::printed(one, other), fuzz::printed(other, one));
});
