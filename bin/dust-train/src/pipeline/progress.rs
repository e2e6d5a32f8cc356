//! Progress of long work, on standard error: a bar on a terminal, a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(30);

/// How far a piece of work is.
pub(super) struct Progress {
    bar: ProgressBar,
    /// When the last line was written; `None` on a terminal.
    last: Option<Mutex<Instant>>,
}

impl Progress {
    /// Nothing of `total` is done.
    pub fn new(what: &str, total: u64) -> Self {
        let bar = ProgressBar::new(total);
        if let Ok(style) = ProgressStyle::with_template(
            "{prefix:>12} [{bar:30}] {pos}/{len}  {elapsed} (left {eta})  {msg}",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_owned());
        let terminal = io::stderr().is_terminal();
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        let last = (!terminal).then(|| Mutex::new(Instant::now()));
        Self { bar, last }
    }

    /// `done` of the total is done, from an earlier call of the program.
    pub fn start_at(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// `more` is done; `say` tells about it.
    pub fn advance(&self, more: u64, say: impl FnOnce() -> String) {
        self.bar.inc(more);
        let Some(last) = &self.last else {
            self.bar.set_message(say());
            return;
        };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= PAUSE {
            *last = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            eprintln!("{}: {done}/{total}  {}", self.bar.prefix(), say());
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
