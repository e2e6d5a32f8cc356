//! The `emulate` program from outside.

use std::path::PathBuf;
use std::process::{Command, Output};

fn npy(values: &[f32]) -> Vec<u8> {
    let mut header = format!(
        "{{'descr': '<f4', 'fortran_order': False, 'shape': ({},), }}",
        values.len()
    );
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    out
}

fn emulate(name: &str, n: i32, more: &[&str]) -> (Output, PathBuf) {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("x.npy"), npy(&[1.0, 2.0, 3.0])).unwrap();
    std::fs::write(dir.join("y.npy"), npy(&[10.0, 20.0, 30.0])).unwrap();
    let args =
        format!(r#"[{{"i32": {n}}}, {{"f32": 2}}, {{"buffer": "x.npy"}}, {{"buffer": "y.npy"}}]"#);
    std::fs::write(dir.join("args.json"), args).unwrap();
    let ptx = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels/basic.ptx");
    let output = Command::new(env!("CARGO_BIN_EXE_emulate"))
        .args([
            ptx, "--entry", "saxpy", "--grid", "1", "--block", "32", "--args",
        ])
        .arg(dir.join("args.json"))
        .arg("--out")
        .arg(dir.join("out"))
        .args(more)
        .output()
        .unwrap();
    (output, dir)
}

#[test]
fn buffers_go_in_and_come_back() {
    let (output, dir) = emulate("good", 3, &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        std::fs::read(dir.join("out/3.npy")).unwrap(),
        npy(&[12.0, 24.0, 36.0])
    );
    assert_eq!(
        std::fs::read(dir.join("out/2.npy")).unwrap(),
        npy(&[1.0, 2.0, 3.0])
    );
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("global_load_bytes") && table.contains(" 24\n"),
        "{table}"
    );
}

#[test]
fn what_is_found_gives_status_one_and_json() {
    let (output, _) = emulate(
        "bad",
        4,
        &["--json", "--schedule", "random:3", "--mma", "ampere"],
    );
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["findings"][0]["kind"], "out_of_bounds");
    assert_eq!(json["findings"][0]["thread"][0], 3);
    let (output, _) = emulate("csv", 3, &["--csv", "--checks", "none"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().map(|l| l.split(',').count()).collect();
    assert!(lines.len() == 2 && lines[0] == lines[1], "{text}");
}

#[test]
fn mistakes_are_named_in_one_line() {
    for (more, part) in [
        (vec!["--shared", "999999"], "shared memory"),
        (vec!["--schedule", "sideways"], "sideways"),
        (vec!["--checks", "spelling"], "spelling"),
    ] {
        let (output, _) = emulate("mistake", 3, &more);
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn estimates_take_registers_from_ptxas_or_from_the_caller() {
    use std::os::unix::fs::PermissionsExt;
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("ptxas");
    std::fs::create_dir_all(&dir).unwrap();
    // What ptxas 13.0 says of a file with two kernels.
    let said = "\
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers, used 1 barriers, 16 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'saxpy' for 'sm_80'
ptxas info    : Function properties for saxpy
    8 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers, 376 bytes cmem[0]";
    let ptxas = dir.join("ptxas");
    // It answers for the target that the PTX names, and no other.
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *'-arch sm_80'*) ;; *) exit 3;; esac\ncat >&2 <<'END'\n{said}\nEND\n"
    );
    std::fs::write(&ptxas, script).unwrap();
    std::fs::set_permissions(&ptxas, std::fs::Permissions::from_mode(0o755)).unwrap();

    let (output, _) = emulate("asked", 3, &["--json", "--ptxas", ptxas.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["kernel"], "saxpy");
    let registers = serde_json::json!({"registers": 168, "spill_stores": 24, "spill_loads": 40});
    assert_eq!(json["registers"], registers);
    assert_eq!(json["estimates"][1]["gpu"], "H100");
    // 168 registers of 32 threads are 5376, of which 65536 hold 12: blocks of one warp.
    let occupancy = &json["estimates"][0]["occupancy"];
    assert_eq!(occupancy["blocks"], 12);
    assert_eq!(occupancy["limit"], "registers");

    let (output, _) = emulate("told", 3, &["--registers", "168"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("A100 (estimate): 12 blocks and 19 %"),
        "{text}"
    );
    assert!(text.contains("H100 (estimate): "), "{text}");

    let (output, _) = emulate("nobody", 3, &["--ptxas", "/nonexistent/ptxas"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("/nonexistent/ptxas")
    );
}
