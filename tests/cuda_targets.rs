//! The build's table of targets, against ptxas.
#![cfg(feature = "cuda")]

#[path = "../build/targets.rs"]
mod targets;

use dust_kernels::cuda::MODULES;
use std::path::Path;
use std::process::Command;
use targets::TARGETS;

/// Whether ptxas takes PTX of this version for this target.
fn assembles(version: &str, arch: &str) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ptxas = root.join(".toolchain/nvidia/cu13/bin/ptxas");
    assert!(ptxas.is_file(), "{}: run make toolchain", ptxas.display());
    let module = MODULES.iter().find(|module| module.op == "activation");
    let lines = module
        .unwrap()
        .ptx()
        .lines()
        .map(|line| match line.split_once(' ') {
            Some((".version", _)) => format!(".version {version}\n"),
            Some((".target", _)) => format!(".target sm_{arch}\n"),
            _ => format!("{line}\n"),
        });
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{version}.{arch}.ptx"));
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    let mut command = Command::new(ptxas);
    command.arg(format!("-arch=sm_{arch}")).arg(&path);
    command.arg("-o").arg(path.with_extension("cubin"));
    command.output().unwrap().status.success()
}

#[test]
fn each_target_gets_the_first_version_that_has_it() {
    let versions = [
        "6.5", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8",
    ];
    let later = [
        "8.0", "8.1", "8.2", "8.3", "8.4", "8.5", "8.6", "8.7", "8.8", "9.0",
    ];
    let versions = [versions, later].concat();
    for (arch, version) in TARGETS {
        let at = versions.iter().position(|v| v == version).unwrap();
        assert!(assembles(version, arch), "{arch} as {version}");
        assert!(
            !assembles(versions[at - 1], arch),
            "{arch} before {version}"
        );
    }
}
