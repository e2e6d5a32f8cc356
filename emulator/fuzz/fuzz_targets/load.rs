//! Whatever the text, loading it as a module gives a module or an error: no panic, no hang, no
//! more memory than a device of a few MiB has.

#![no_main]

use cuda_emulator::{Config, Device};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut device = Device::new(Config {
        memory: 4 << 20,
        ..Config::default()
    });
    let _ = device.load(text);
});
