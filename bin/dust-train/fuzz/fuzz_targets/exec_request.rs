//! Whatever stands on stdin of `dust-train exec` is a request or is refused.
#![no_main]

use dust_train::sandbox::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    fuzz::request(text);
});
