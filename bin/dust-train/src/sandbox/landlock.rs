//! The Landlock ruleset: read and execute the system, nothing else.
//!
//! It is built here and handed to the warm interpreter as a descriptor. The interpreter adds one
//! rule, for the scratch folder, and each box restricts itself with it before it reads a program.
//! Every right that the running kernel knows is handled, so what no rule grants is denied: writing,
//! TCP, device ioctls, abstract unix sockets and signals out of the box.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, Scope,
};

/// The newest ABI that the rules below were written for. The crate leaves out what an older
/// kernel lacks, and `Effective` reports the kernel's own number.
const ABI_KNOWN: ABI = ABI::V10;

/// The first ABI that confines signals and abstract unix sockets.
pub(super) const ABI_WITH_SCOPES: i64 = 6;

/// The ruleset's descriptor; `None` where the kernel has no Landlock.
pub(super) fn ruleset(readable: &[String]) -> Result<Option<OwnedFd>> {
    let mut ruleset: RulesetCreated = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_KNOWN))?
        .handle_access(AccessNet::from_all(ABI_KNOWN))?
        .scope(Scope::from_all(ABI_KNOWN))?
        .create()?;
    for path in readable {
        let fd = PathFd::new(path).with_context(|| format!("landlock: cannot open {path}"))?;
        let access = if path.starts_with("/dev/") {
            AccessFs::ReadFile | AccessFs::WriteFile
        } else if std::path::Path::new(path).is_dir() {
            AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute
        } else {
            AccessFs::ReadFile.into()
        };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
    }
    Ok(ruleset.into())
}

/// What the scratch folder allows: everything but executing and making devices, pipes and sockets.
pub(super) fn scratch_access(abi: i64) -> u64 {
    let mut access = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSym;
    if abi >= 2 {
        access |= AccessFs::Refer;
    }
    if abi >= 3 {
        access |= AccessFs::Truncate;
    }
    access.bits()
}
