//! The record of which blocks touched device memory.

use cuda_emulator::{Config, Device};
use std::cell::Cell;

#[test]
fn an_access_that_comes_between_is_not_lost() {
    let mut device = Device::new(Config::default());
    let at = device.alloc(4).unwrap();
    let (allocation, offset) = device.memory().resolve(at, 4).unwrap();
    let shadow = allocation.shadow();
    shadow.start(1);
    assert_eq!(shadow.access(offset, 4, 7, true, |_| false), None);
    // While block 1, which is ordered after block 7, is being recorded, block 0 writes.
    let first = Cell::new(true);
    let found = shadow.access(offset, 4, 1, true, |other| {
        if first.replace(false) {
            shadow.access(offset, 4, 0, true, |_| true);
        }
        other == 7
    });
    assert_eq!(found, Some((0, true)));
}
