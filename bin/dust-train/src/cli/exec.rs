//! Running one program in the sandbox, for people and for other tools.

use std::io;

use anyhow::Result;

use crate::sandbox::{self, Layer, Sandbox, SandboxConfig};

/// Runs a program in the sandbox: one JSON object on stdin, one on stdout.
///
/// In: {"source": "...", "mode": "stdin" | "function" | "assert", "entry_point": "...", "tests":
/// [{"input": ..., "output": ...}], "test_code": "...", "limits": {"cpu_s": 10, ...}, "grading":
/// "process" | "lcb-strict", "stop_at_first_failure": true}. Out: the verdict, the first test that
/// failed, each test's figures, and what the sandbox had in force.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Read many objects, one a line, and answer each with a line as it is done.
    #[arg(long)]
    serve: bool,

    /// `allow-weak=LAYER`: go without this layer of the sandbox.
    #[arg(long, value_name = "allow-weak=LAYER", value_parser = super::stages::weak_layer)]
    sandbox: Vec<Layer>,
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<()> {
    let sandbox = Sandbox::new(SandboxConfig {
        allow_weak: args.sandbox.clone(),
        ..SandboxConfig::default()
    })?;
    let (input, output) = (io::stdin(), io::stdout());
    if args.serve {
        sandbox::serve(&sandbox, io::BufReader::new(input), output)
    } else {
        sandbox::exec(&sandbox, io::BufReader::new(input), output)
    }
}
