//! What is in force.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A layer of the sandbox that some machine may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// What may be read and written, TCP, device ioctls, signals and abstract sockets.
    Landlock,
    /// Which system calls may be made.
    Seccomp,
    /// User, pid, mount, network, ipc, uts and cgroup namespaces; with them a root of its own
    /// and a scratch folder of limited size.
    Namespaces,
    /// Memory and number of processes of a program as a whole.
    Cgroup,
    /// Not root.
    Uid,
}

impl Layer {
    /// All of them.
    pub const ALL: [Layer; 5] = [
        Layer::Landlock,
        Layer::Seccomp,
        Layer::Namespaces,
        Layer::Cgroup,
        Layer::Uid,
    ];

    fn name(self) -> &'static str {
        match self {
            Layer::Landlock => "landlock",
            Layer::Seccomp => "seccomp",
            Layer::Namespaces => "namespaces",
            Layer::Cgroup => "cgroup",
            Layer::Uid => "uid",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Layer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Layer::ALL
            .into_iter()
            .find(|layer| layer.name() == text)
            .ok_or_else(|| format!("no sandbox layer {text}: use one of {}", names(&Layer::ALL)))
    }
}

pub(super) fn names(layers: &[Layer]) -> String {
    layers
        .iter()
        .map(|l| l.name())
        .collect::<Vec<_>>()
        .join(", ")
}

/// What is in force, for people and for the manifest of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effective {
    /// Each layer in force, and how.
    pub layers: BTreeMap<Layer, String>,
    /// Each layer that is not, and why.
    pub missing: BTreeMap<Layer, String>,
    /// What the self-test attempted from inside.
    pub self_test: Vec<String>,
    /// What of it succeeded, which it can only where a layer is missing.
    pub gaps: Vec<String>,
    /// Path and version of the interpreter.
    pub python: String,
    /// Programs that run at a time.
    pub workers: usize,
}

impl Effective {
    /// Whether `layer` is in force.
    pub fn has(&self, layer: Layer) -> bool {
        self.layers.contains_key(&layer)
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (layer, how) in &self.layers {
            writeln!(f, "{layer:<12}{how}")?;
        }
        for (layer, why) in &self.missing {
            writeln!(f, "{layer:<12}MISSING: {why}")?;
        }
        let gaps = if self.gaps.is_empty() {
            "none".into()
        } else {
            self.gaps.join(", ")
        };
        writeln!(
            f,
            "{:<12}{} attempts, succeeded: {gaps}",
            "self-test",
            self.self_test.len()
        )?;
        write!(
            f,
            "{:<12}{}, {} at a time",
            "python", self.python, self.workers
        )
    }
}
