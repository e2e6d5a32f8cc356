//! Whatever the text, the parser and the decoder give a module or an error with a line.

mod common;

use common::*;
use cuda_emulator::{Config, Device, Error};
use proptest::prelude::*;

fn load(text: &str) -> Result<(), Error> {
    let mut d = Device::new(Config {
        memory: 1 << 24,
        ..Config::default()
    });
    d.load(text).map(|_| ())
}

fn line_of(text: &str) -> (u32, String) {
    match load(text).unwrap_err() {
        Error::Ptx(e) => (e.line, e.message),
        other => panic!("{other}"),
    }
}

const HEAD: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.entry k() {\n.reg .pred %p<4>; .reg .b32 %r<4>; .reg .b64 %d<4>; .reg .f32 %f<4>; .reg .b16 %h<4>;\n";

#[test]
fn what_is_not_implemented_is_an_error_at_its_line() {
    for (instruction, part) in [
        ("frobnicate.u32 %r1, %r2;", "not implemented"),
        ("add.u32.wrong %r1, %r2, %r3;", ".wrong"),
        ("add.f32.rn.sat.odd %f1, %f2, %f3;", ".odd"),
        ("add.u32 %r1, %r2;", "operands"),
        ("add.u32 %d1, %r2, %r3;", "%d1"),
        ("add.u32 %r1, %r2, %r9;", "%r9"),
        ("add.u16 %h1, %h2, 70000;", "70000"),
        ("shfl.bfly.b32 %r1, %r2, 1, 31;", ".sync"),
        ("ld.global.v8.f32 %f1, [%d1];", "v8"),
        ("bra NOWHERE;", "NOWHERE"),
        (
            "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r1}, {%r2}, {%r3}, {%r1};",
            "shape",
        ),
        ("wgmma.fence.sync.aligned;", "not implemented"),
        ("call nowhere;", "not implemented"),
        ("ex2.rn.f32 %f1, %f2;", "rounding"),
        ("fma.rn.sat.f64 %d1, %d2, %d3, %d1;", ".sat"),
        ("cvt.rn.s32.f32 %r1, %f1;", "conversion"),
    ] {
        let (line, message) = line_of(&format!("{HEAD}{instruction}\nret;\n}}\n"));
        assert_eq!(line, 6, "{instruction}: {message}");
        assert!(message.contains(part), "{instruction}: {message}");
    }
    assert!(load(&format!("{HEAD}ret;\n}}\n")).is_ok());
}

#[test]
fn broken_texts_are_refused() {
    for text in [
        "",
        "hello",
        ".version 8.0",
        ".version 8.0 .target sm_80 .entry k( {",
        ".version 8.0 .target sm_80 .address_size 32",
        ".version 8.0 .target sm_80 .global .b8 x[99999999999];",
        ".version 8.0 .target sm_80 .global .b8 x[1] = {1, 2};",
        ".version 8.0 .target sm_80 .global .align 3 .b8 x[4];",
        ".version 8.0 .target sm_80 .entry k() { @%p bra X; }",
        ".version 8.0 .target sm_80 /* never closed",
        ".version 8.0 .target sm_80 .file 1 \"open",
        "\u{0}\u{7f}\u{fffd}",
    ] {
        // A module without kernels is fine; everything else here is not.
        let result = load(text);
        assert_eq!(result.is_ok(), text == ".version 8.0", "{text}: {result:?}");
    }
    let deep = format!(".version 8.0 .global .b32 x = {}", "{".repeat(100_000));
    assert!(load(&deep).is_err());
    let deep = format!("{HEAD}mov.u32 %r1, {};}}", "{".repeat(100_000));
    assert!(load(&deep).is_err());
}

#[test]
fn every_committed_module_loads() {
    for text in [BASIC, GEMM, GEMM_NO_WAIT, include_str!("kernels/speed.ptx")] {
        load(text).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_text_never_panics(text in "[ -~\\n]{0,200}") {
        let _ = load(&text);
        let _ = load(&format!("{HEAD}{text}"));
    }

    #[test]
    fn random_words_never_panic(words in prop::collection::vec(prop::sample::select(vec![
        "add", "mov", "ld", "st", "cvt", "mma", "bra", "call", "shfl", ".u32", ".f32", ".b64", ".sync", ".global", ".shared",
        ".param", ".reg", ".pred", "%r1", "%d1", "%p1", "%f1", "k", "{", "}", "(", ")", "[", "]", ";", ",", ":", "@", "!", "|",
        "+", "-", "1", "0f3f800000", "0x7", ".v4", ".rn", ".x4", ".loc", "<", ">", "=", ".align", "_", "\n",
    ]), 0..60)) {
        let _ = load(&format!("{HEAD}{}", words.join(" ")));
    }

    #[test]
    fn damaged_modules_never_panic(at in 0usize..30_000, len in 0usize..40, with in "[ -~]{0,6}", gemm in any::<bool>()) {
        let text = if gemm { GEMM } else { BASIC };
        // Near the start of a kernel's body, where one change matters; the tail is cut for speed.
        let text: String = text.chars().take(30_000).collect();
        let at = at.min(text.len());
        let end = (at + len).min(text.len());
        let _ = load(&format!("{}{with}{}", &text[..at], &text[end..]));
    }
}
