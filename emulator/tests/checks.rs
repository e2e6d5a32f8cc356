//! Seeded bugs: each must be reported, by kind and place; and its correct twin must not.

mod common;

use common::*;
use cuda_emulator::{Arg, Config, CopyAsync, Device, Finding, Kind, Schedule};

/// Wraps a body into a module with one kernel `k(u64 p, u32 n)`.
fn ptx(body: &str) -> String {
    format!(
        ".version 7.0\n.target sm_80\n.address_size 64\n\
         .visible .entry k(.param .u64 k_p, .param .u32 k_n)\n{{\n\
         .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<16>; .reg .b16 %h<8>;\n\
         .shared .align 16 .b8 buf[4096];\n\
         ld.param.u64 %rd1, [k_p]; ld.param.u32 %r1, [k_n]; mov.u32 %r2, %tid.x;\n\
         mul.wide.u32 %rd2, %r2, 4; add.u64 %rd3, %rd1, %rd2; shl.b32 %r4, %r2, 2; mov.u32 %r3, buf;\n\
         add.u32 %r5, %r3, %r4;\n{body}\nret;\n}}\n"
    )
}

fn run_with(config: Config, body: &str, threads: u32, bytes: u64, n: u32) -> Vec<Finding> {
    let mut d = Device::new(config);
    let module = d.load(&ptx(body)).unwrap();
    let p = d.alloc(bytes).unwrap();
    let args = [Arg::U64(p), Arg::U32(n)];
    d.launch(&module, "k", [1, 1, 1], [threads, 1, 1], 0, &args)
        .unwrap()
        .findings
}

fn run(body: &str, threads: u32) -> Vec<Finding> {
    run_with(
        Config {
            step_limit: 10_000_000,
            ..Config::default()
        },
        body,
        threads,
        4096,
        threads,
    )
}

#[track_caller]
fn only(findings: &[Finding], kind: Kind) -> &Finding {
    let found: Vec<_> = findings
        .iter()
        .map(|f| (f.kind, f.message.as_str()))
        .collect();
    assert!(
        !found.is_empty() && found.iter().all(|f| f.0 == kind),
        "{kind:?} wanted: {found:?}"
    );
    &findings[0]
}

#[track_caller]
fn clean(findings: &[Finding]) {
    assert!(findings.is_empty(), "{}", findings[0]);
}

#[test]
fn off_by_one_is_out_of_bounds_with_its_thread() {
    let body = "st.global.u32 [%rd3+4], %r2;";
    let f = run_with(Config::default(), body, 64, 256, 0);
    let f = only(&f, Kind::OutOfBounds);
    assert_eq!(f.thread, [63, 0, 0]);
    assert!(
        f.message
            .contains("offset 256 of an allocation of 256 bytes"),
        "{}",
        f.message
    );
    assert!(f.ptx_line > 5);
    clean(&run_with(
        Config::default(),
        "st.global.u32 [%rd3], %r2;",
        64,
        256,
        0,
    ));
    let before = "ld.global.u32 %r6, [%rd1+-4];";
    only(
        &run_with(Config::default(), before, 1, 256, 0),
        Kind::OutOfBounds,
    );
}

#[test]
fn addresses_of_shared_local_and_null() {
    only(
        &run(
            "mov.u32 %r6, 4093; add.u32 %r6, %r6, 3; st.shared.u32 [%r6], %r2;",
            1,
        ),
        Kind::OutOfBounds,
    );
    only(
        &run("mov.u64 %rd4, 0; ld.u32 %r6, [%rd4];", 1),
        Kind::OutOfBounds,
    );
    let local = "{ .local .align 4 .b8 a[16]; st.local.u32 [a+16], %r2; }";
    only(&run(local, 1), Kind::OutOfBounds);
    clean(&run(
        "{ .local .align 4 .b8 a[16]; st.local.u32 [a+12], %r2; ld.local.u32 %r6, [a+12]; }",
        1,
    ));
    only(&run("st.global.u32 [%rd1+2], %r2;", 1), Kind::Misaligned);
    only(
        &run("ld.global.v4.f32 {%f1,%f2,%f3,%f4}, [%rd1+8];", 1),
        Kind::Misaligned,
    );
}

#[test]
fn freed_memory_is_told_from_none() {
    let mut d = device();
    let module = d.load(&ptx("ld.global.u32 %r6, [%rd1];")).unwrap();
    let p = d.alloc(64).unwrap();
    assert!(d.free(p) && !d.free(p));
    let args = [Arg::U64(p), Arg::U32(0)];
    let report = d
        .launch(&module, "k", [1, 1, 1], [1, 1, 1], 0, &args)
        .unwrap();
    only(&report.findings, Kind::UseAfterFree);
}

#[test]
fn uninitialised_values_fault_where_they_are_used() {
    // An accumulator that nobody zeroed.
    only(
        &run(
            "add.f32 %f1, %f2, 0f3F800000; st.global.f32 [%rd3], %f1;",
            32,
        ),
        Kind::Uninitialised,
    );
    // Read from fresh device memory, moved around, used in a branch.
    let branch =
        "ld.global.u32 %r6, [%rd3]; xor.b32 %r7, %r6, 5; setp.eq.u32 %p1, %r7, 0; @%p1 bra L; L:";
    only(&run(branch, 32), Kind::Uninitialised);
    // From shared memory, as an address.
    let address = "ld.shared.u32 %r6, [%r5]; ld.shared.u32 %r7, [%r6];";
    only(&run(address, 32), Kind::Uninitialised);
    // Dead arithmetic on undefined values is what compilers do: no error.
    clean(&run(
        "ld.global.u32 %r6, [%rd3]; add.u32 %r7, %r6, 1; mov.u32 %r8, %r9;",
        32,
    ));
    // The value not chosen does not matter.
    clean(&run(
        "setp.ge.u32 %p1, %r2, 0; selp.b32 %r6, %r2, %r9, %p1; st.global.u32 [%rd3], %r6;",
        32,
    ));
    // Written by one lane only.
    let part = "setp.lt.u32 %p1, %r2, 31; @%p1 mov.u32 %r6, 1; st.global.u32 [%rd3], %r6;";
    assert_eq!(only(&run(part, 32), Kind::Uninitialised).thread, [31, 0, 0]);
    // Through a shuffle from that lane.
    let shuffled = "setp.lt.u32 %p1, %r2, 31; @%p1 mov.u32 %r6, 1;
        shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1; st.global.u32 [%rd3], %r7;";
    assert_eq!(
        only(&run(shuffled, 32), Kind::Uninitialised).thread,
        [30, 0, 0]
    );
    // Off: the same runs through.
    let off = Config {
        checks: cuda_emulator::Checks::NONE,
        ..Config::default()
    };
    clean(&run_with(off, part, 32, 4096, 0));
}

#[test]
fn an_uninitialised_mma_accumulator_is_reported() {
    let with = |zero: &str| {
        format!(
            "{zero} mov.b32 %r6, 0; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32
             {{%f1,%f2,%f3,%f4}}, {{%r6,%r6}}, {{%r6}}, {{%f5,%f6,%f7,%f8}};
             st.global.f32 [%rd3], %f4;"
        )
    };
    let zero = "mov.f32 %f5, 0f00000000; mov.f32 %f6, %f5; mov.f32 %f7, %f5;";
    only(&run(&with(zero), 32), Kind::Uninitialised);
    clean(&run(&with(&format!("{zero} mov.f32 %f8, %f5;")), 32));
}

const REVERSED: &str =
    "sub.u32 %r6, %r1, %r2; sub.u32 %r6, %r6, 1; shl.b32 %r6, %r6, 2; add.u32 %r6, %r6, %r3;";

/// A race, or its consequence that data is not there yet.
fn unordered(f: &Finding) -> bool {
    matches!(f.kind, Kind::SharedRace | Kind::Uninitialised)
}

#[test]
fn a_removed_barrier_is_a_race_under_every_schedule() {
    let body = |barrier: &str| {
        format!(
            "st.shared.u32 [%r5], %r2; {REVERSED} {barrier} ld.shared.u32 %r7, [%r6]; st.global.u32 [%rd3], %r7;"
        )
    };
    for schedule in [
        Schedule::Serial,
        Schedule::Reverse,
        Schedule::LowestPc,
        Schedule::Random(3),
    ] {
        for threads in [32, 128] {
            let config = Config {
                schedule,
                ..Config::default()
            };
            let found = run_with(config.clone(), &body(""), threads, 4096, threads);
            // Some orders also read what is not there yet.
            assert!(
                found.iter().any(unordered),
                "{schedule:?} {threads}: {found:?}"
            );
            clean(&run_with(
                config,
                &body("bar.sync 0;"),
                threads,
                4096,
                threads,
            ));
        }
    }
    // Within a warp, bar.warp.sync is enough; for several warps it is not.
    clean(&run(&body("bar.warp.sync -1;"), 32));
    assert!(run(&body("bar.warp.sync -1;"), 64).iter().any(unordered));
}

#[test]
fn a_lane_may_write_what_it_alone_has_read_since_the_barrier() {
    let body = |offset: &str| {
        format!(
            "st.shared.u32 [%r5], %r2; ld.shared.u32 %r7, [%r5]; bar.sync 0;
             {offset} ld.shared.u32 %r8, [%r6]; st.shared.u32 [%r5], %r8;"
        )
    };
    let own = "mov.u32 %r6, %r5;";
    for threads in [32, 128] {
        clean(&run(&body(own), threads));
        let found = run(&body(REVERSED), threads);
        assert!(found.iter().any(unordered), "{threads}: {found:?}");
    }
}

#[test]
fn overwriting_before_others_have_read_is_a_race() {
    let body = |second: &str| {
        format!(
            "st.shared.u32 [%r5], %r2; {REVERSED} bar.sync 0; ld.shared.u32 %r7, [%r6]; {second}
             st.shared.u32 [%r5], %r7; st.global.u32 [%rd3], %r7;"
        )
    };
    only(&run(&body(""), 64), Kind::SharedRace);
    clean(&run(&body("bar.sync 0;"), 64));
    // All lanes write one value to one place, and all read it: each other's writes collide.
    let same = "st.shared.u32 [buf], %r2;";
    only(&run(same, 32), Kind::SharedRace);
    // Atomics do not race with each other.
    let atomics = "setp.eq.u32 %p1, %r2, 0; @%p1 st.shared.u32 [buf], 0; bar.sync 0;
        atom.shared.add.u32 %r6, [buf], 1; bar.sync 0; ld.shared.u32 %r7, [buf]; st.global.u32 [%rd3], %r7;";
    clean(&run(atomics, 96));
}

#[test]
fn named_barriers_order_producers_and_consumers() {
    // Warp 0 fills, arrives; warp 1 waits on the same barrier and reads.
    let body = |arrive: &str, wait: &str| {
        format!(
            "setp.ge.u32 %p1, %r2, 32; @%p1 bra C; st.shared.u32 [%r5], %r2; {arrive} bra E;
             C: {wait} ld.shared.u32 %r7, [%r5+-128]; st.global.u32 [%rd3], %r7; E:"
        )
    };
    clean(&run(&body("bar.arrive 1, 64;", "bar.sync 1, 64;"), 64));
    let f = run(&body("", ""), 64);
    assert!(f.iter().any(|f| f.kind == Kind::SharedRace), "{f:?}");
    // Nobody arrives.
    only(&run(&body("", "bar.sync 1, 64;"), 64), Kind::Deadlock);
}

#[test]
fn divergent_barriers_and_absent_lanes_are_explained() {
    let half = "setp.lt.u32 %p1, %r2, 16; @%p1 bar.sync 0;";
    only(&run(half, 32), Kind::BarrierDivergence);
    let two = "setp.lt.u32 %p1, %r2, 16; @%p1 bra A; bar.sync 0; bra E; A: bar.sync 0; E:";
    let f = run(two, 32);
    assert!(
        only(&f, Kind::BarrierDivergence)
            .message
            .contains("lanes 0-15"),
        "{}",
        f[0]
    );
    // By whole warps, a barrier in a branch is legal.
    clean(&run(
        "setp.lt.u32 %p1, %r2, 32; @%p1 bra A; bar.sync 0; bra E; A: bar.sync 0; E:",
        64,
    ));
    // Warps that have exited are not waited for.
    clean(&run("setp.ge.u32 %p1, %r2, 32; @%p1 exit; bar.sync 0;", 64));
    let gone = "setp.ge.u32 %p1, %r2, 30; @%p1 exit; shfl.sync.down.b32 %r6, %r2, 1, 31, -1;";
    let f = run(gone, 32);
    assert!(
        only(&f, Kind::AbsentLane).message.contains("30-31"),
        "{}",
        f[0]
    );
    only(
        &run("shfl.sync.idx.b32 %r6, %r2, 9, 31, 0xff;", 8),
        Kind::AbsentLane,
    );
    only(
        &run("vote.sync.ballot.b32 %r6, 1, 0xf;", 32),
        Kind::AbsentLane,
    );
    // Halves that exchange with themselves only, from one instruction and from two.
    let halves = "setp.lt.u32 %p1, %r2, 16; selp.b32 %r6, 0xffff, 0xffff0000, %p1;
        shfl.sync.bfly.b32 %r7, %r2, 3, 31, %r6; st.global.u32 [%rd3], %r7;";
    clean(&run(halves, 32));
    let branches = "setp.lt.u32 %p1, %r2, 16; @%p1 bra A; shfl.sync.bfly.b32 %r7, %r2, 3, 31, 0xffff0000; bra E;
        A: shfl.sync.bfly.b32 %r7, %r2, 3, 31, 0xffff; E: st.global.u32 [%rd3], %r7;";
    clean(&run(branches, 32));
}

#[test]
fn hangs_end_and_spinning_lanes_let_others_run() {
    let f = run("L: bra L;", 32);
    only(&f, Kind::StepLimit);
    only(&run("trap;", 32), Kind::Trap);
    // Lane 0 spins until lane 31 has stored a flag.
    let spin = "setp.eq.u32 %p1, %r2, 0; @%p1 st.volatile.global.u32 [%rd1], 0; bar.sync 0;
        setp.eq.u32 %p2, %r2, 31; @%p1 bra L; @%p2 st.volatile.global.u32 [%rd1], 1; bra E;
        L: ld.volatile.global.u32 %r6, [%rd1]; setp.eq.u32 %p3, %r6, 0; @%p3 bra L; E:";
    for schedule in [Schedule::Serial, Schedule::Random(1)] {
        let config = Config {
            schedule,
            step_limit: 10_000_000,
            ..Config::default()
        };
        clean(&run_with(config, spin, 32, 4096, 0));
    }
}

#[test]
fn blocks_that_write_what_others_read_race() {
    let body = "mov.u32 %r6, %ctaid.x; mul.wide.u32 %rd4, %r6, 4; add.u64 %rd5, %rd1, %rd4;
        setp.ne.u32 %p1, %r2, 0; @%p1 exit; st.global.u32 [%rd5], %r6; ld.global.u32 %r7, [%rd1];";
    let mut d = device();
    let module = d.load(&ptx(body)).unwrap();
    let p = upload(&mut d, &[0u32; 8]);
    let args = [Arg::U64(p), Arg::U32(0)];
    let f = d
        .launch(&module, "k", [8, 1, 1], [32, 1, 1], 0, &args)
        .unwrap()
        .findings;
    only(&f, Kind::GlobalRace);
    // A second launch may read what the first wrote.
    let f = d
        .launch(&module, "k", [1, 1, 1], [32, 1, 1], 0, &args)
        .unwrap()
        .findings;
    clean(&f);
}

#[test]
fn a_missing_wait_for_copies_is_reported_with_its_source_line() {
    for copy_async in [CopyAsync::Late, CopyAsync::Early] {
        let mut d = Device::new(Config {
            copy_async,
            ..Config::default()
        });
        let module = d.load(GEMM_NO_WAIT).unwrap();
        let (a, b) = (
            upload(&mut d, &[0u32; 64 * 32]),
            upload(&mut d, &[0u32; 64 * 32]),
        );
        let c = d.alloc(64 * 64 * 4).unwrap();
        let args = [
            Arg::I32(64),
            Arg::I32(64),
            Arg::I32(64),
            Arg::U64(a),
            Arg::U64(b),
            Arg::U64(c),
        ];
        let report = d
            .launch(&module, "gemm", [1, 1, 1], [128, 1, 1], 0, &args)
            .unwrap();
        let race = report
            .findings
            .iter()
            .find(|f| f.kind == Kind::SharedRace)
            .unwrap();
        assert!(race.message.contains("asynchronous copy"), "{race}");
        let (file, line) = race.source.clone().unwrap();
        let text = include_str!("kernels/gemm.cu")
            .lines()
            .nth(line as usize - 1)
            .unwrap();
        assert!(
            file == "gemm.cu" && text.contains("shared_address(&"),
            "{race}: {text}"
        );
    }
}

#[test]
fn a_wrong_fragment_layout_gives_another_product() {
    // Transposed loads: rows and columns of each 8 x 8 piece change places.
    let wrong = GEMM.replace(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r",
    );
    assert_ne!(wrong, GEMM);
    let product = |text: &str| {
        let mut d = device();
        let module = d.load(text).unwrap();
        let x: Vec<u32> = (0..64 * 16u32)
            .map(|i| 0x3f80_3f80 + i % 7 * 0x0010_0001)
            .collect();
        let (a, b) = (upload(&mut d, &x), upload(&mut d, &x));
        let c = d.alloc(64 * 64 * 4).unwrap();
        let args = [
            Arg::I32(64),
            Arg::I32(64),
            Arg::I32(32),
            Arg::U64(a),
            Arg::U64(b),
            Arg::U64(c),
        ];
        clean(
            &d.launch(&module, "gemm", [1, 1, 1], [128, 1, 1], 0, &args)
                .unwrap()
                .findings,
        );
        download::<f32>(&d, c, 64 * 64)
    };
    assert_ne!(product(&wrong), product(GEMM));
}
