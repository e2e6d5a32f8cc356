//! Ctrl-C: the first asks the command to stop where nothing is lost, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The user has asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted; what is done is kept, and the same command goes on from there")]
pub struct Interrupted;

/// Listens for Ctrl-C.
///
/// # Errors
/// What the system reports.
pub fn install() -> Result<(), ctrlc::Error> {
    let installed = ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    });
    match installed {
        // Where the library is used from another program, the handler is that program's.
        Err(ctrlc::Error::MultipleHandlers) => Ok(()),
        other => other,
    }
}

/// Whether the user has asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// An error once the user has asked to stop: for the points where stopping is clean.
///
/// # Errors
/// [`Interrupted`].
pub fn check() -> Result<(), Interrupted> {
    if requested() {
        Err(Interrupted)
    } else {
        Ok(())
    }
}
