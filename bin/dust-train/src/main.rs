//! The program `dust-train`: see [`dust_train::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    dust_train::cli::run(std::env::args_os())
}
