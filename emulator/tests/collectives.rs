//! Exchanges between lanes, barriers with reductions, matrix instructions: by hand-written PTX.

mod common;

use common::*;
use cuda_emulator::{Arg, Config, Device, MmaRounding};
use half::{bf16, f16};

/// Runs a body of one warp that leaves its result in %r0; `%r1` is the lane, `%r2` its input.
fn warp(body: &str, input: [u32; 32]) -> [u32; 32] {
    let text = format!(
        ".version 8.6\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 i, .param .u64 o)\n{{\n\
         .reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %d<8>;\n\
         ld.param.u64 %d1, [i]; ld.param.u64 %d2, [o]; mov.u32 %r1, %laneid;\n\
         mul.wide.u32 %d3, %r1, 4; add.u64 %d4, %d1, %d3; add.u64 %d5, %d2, %d3;\n\
         ld.global.u32 %r2, [%d4];\n{body}\nst.global.u32 [%d5], %r0;\nret;\n}}\n"
    );
    let mut d = device();
    let module = d.load(&text).unwrap();
    let (i, o) = (upload(&mut d, &input), d.alloc(128).unwrap());
    let args = [Arg::U64(i), Arg::U64(o)];
    let report = d
        .launch(&module, "k", [1, 1, 1], [32, 1, 1], 0, &args)
        .unwrap();
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    download::<u32>(&d, o, 32).try_into().unwrap()
}

fn each(f: impl Fn(u32) -> u32) -> [u32; 32] {
    std::array::from_fn(|l| f(l as u32))
}

#[test]
fn shuffles_respect_segments() {
    let x = each(|l| 100 + l);
    let shuffle = |mode: &str, b: u32, c: u32| {
        warp(
            &format!(
                "shfl.sync.{mode}.b32 %r0|%p1, %r2, {b}, {c}, -1; @!%p1 add.u32 %r0, %r0, 1000;"
            ),
            x,
        )
    };
    assert_eq!(shuffle("bfly", 5, 31), each(|l| 100 + (l ^ 5)));
    assert_eq!(shuffle("idx", 9, 31), each(|_| 109));
    assert_eq!(
        shuffle("down", 3, 31),
        each(|l| if l < 29 { 103 + l } else { 1100 + l })
    );
    assert_eq!(
        shuffle("up", 3, 0),
        each(|l| if l >= 3 { 97 + l } else { 1100 + l })
    );
    // Width 8: the segment mask is 0x18, in bits 8 to 12.
    let c = 0x1800 | 7;
    assert_eq!(shuffle("idx", 2, c), each(|l| 100 + (l & !7) + 2));
    assert_eq!(
        shuffle("down", 3, c),
        each(|l| if l % 8 < 5 { 103 + l } else { 1100 + l })
    );
    assert_eq!(
        shuffle("up", 3, 0x1800),
        each(|l| if l % 8 >= 3 { 97 + l } else { 1100 + l })
    );
}

#[test]
fn votes_matches_reductions_and_elections() {
    let x = each(|l| l % 5);
    let odd = "setp.eq.u32 %p1, %r2, 1;";
    let ballot = (0..32).filter(|l| l % 5 == 1).fold(0u32, |m, l| m | 1 << l);
    assert_eq!(
        warp(&format!("{odd} vote.sync.ballot.b32 %r0, %p1, -1;"), x),
        each(|_| ballot)
    );
    for (kind, want) in [("any", 1), ("all", 0), ("uni", 0)] {
        let body = format!("{odd} vote.sync.{kind}.pred %p2, %p1, -1; selp.u32 %r0, 1, 0, %p2;");
        assert_eq!(warp(&body, x), each(|_| want), "{kind}");
    }
    let same = |l: u32| {
        (0..32)
            .filter(|k| k % 5 == l % 5)
            .fold(0u32, |m, k| m | 1 << k)
    };
    assert_eq!(warp("match.any.sync.b32 %r0, %r2, -1;", x), each(same));
    let all = "match.all.sync.b32 %r0|%p1, %r2, -1; @%p1 add.u32 %r0, %r0, 1;";
    assert_eq!(warp(all, x), [0; 32]);
    assert_eq!(
        warp(all, [7; 32]),
        [0; 32].map(|_: u32| u32::MAX.wrapping_add(1))
    );
    for (op, ty, want) in [
        ("add", "u32", 61),
        ("max", "s32", 4),
        ("min", "u32", 0),
        ("or", "b32", 7),
        ("and", "b32", 0),
        ("xor", "b32", 0),
    ] {
        let want = if op == "xor" {
            x.iter().fold(0, |a, b| a ^ b)
        } else {
            want
        };
        assert_eq!(
            warp(&format!("redux.sync.{op}.{ty} %r0, %r2, -1;"), x),
            [want; 32],
            "{op}"
        );
    }
    // Within halves.
    let halves = "setp.lt.u32 %p1, %r1, 16; selp.b32 %r3, 0xffff, 0xffff0000, %p1; redux.sync.add.u32 %r0, %r2, %r3;";
    let sum = |from: usize| x[from..from + 16].iter().sum::<u32>();
    assert_eq!(
        warp(halves, x),
        each(|l| if l < 16 { sum(0) } else { sum(16) })
    );
    assert_eq!(
        warp("elect.sync %r0|%p1, -1; @%p1 add.u32 %r0, %r0, 9;", x),
        each(|l| if l == 0 { 9 } else { 0 })
    );
    let diverged = "mov.u32 %r0, 0; setp.lt.u32 %p1, %r1, 5; @!%p1 bra E; activemask.b32 %r0; E:";
    assert_eq!(warp(diverged, x), each(|l| if l < 5 { 31 } else { 0 }));
}

#[test]
fn barriers_reduce() {
    let x = each(|l| l % 3);
    let p = "setp.eq.u32 %p1, %r2, 0;";
    assert_eq!(
        warp(&format!("{p} bar.red.popc.u32 %r0, 0, %p1;"), x),
        [11; 32]
    );
    assert_eq!(
        warp(
            &format!("{p} bar.red.or.pred %p2, 0, %p1; selp.u32 %r0, 1, 0, %p2;"),
            x
        ),
        [1; 32]
    );
    assert_eq!(
        warp(
            &format!("{p} bar.red.and.pred %p2, 0, !%p1; selp.u32 %r0, 1, 0, %p2;"),
            x
        ),
        [0; 32]
    );
}

#[test]
fn branch_tables_and_carries() {
    let table = "{ T: .branchtargets A, B, C; rem.u32 %r3, %r2, 3; brx.idx %r3, T;
        A: mov.u32 %r0, 10; bra E; B: mov.u32 %r0, 20; bra E; C: mov.u32 %r0, 30; E: add.u32 %r0, %r0, %r2; }";
    assert_eq!(warp(table, each(|l| l)), each(|l| (l % 3 + 1) * 10 + l));
    // 64-bit sum from halves: (2^32 l - l) + l.
    let carry = "sub.cc.u32 %r3, 0, %r2; subc.u32 %r4, %r2, 0; add.cc.u32 %r5, %r3, %r2; addc.u32 %r0, %r4, 0;";
    assert_eq!(warp(carry, each(|l| l)), each(|l| l));
}

#[test]
fn matrices_go_through_shared_memory() {
    // Lane l stores l and l + 100 as halves of row l / 4; loads give them back, or transposed.
    let body = |store: &str, load: &str| {
        format!(
            "{{ .shared .align 16 .b8 m[128]; shl.b32 %r3, %r1, 4; and.b32 %r3, %r3, 127; mov.u32 %r4, m; add.u32 %r4, %r4, %r3;
             stmatrix.sync.aligned.m8n8.x1{store}.shared.b16 [%r4], {{%r2}}; bar.warp.sync -1;
             ldmatrix.sync.aligned.m8n8.x1{load}.shared.b16 {{%r0}}, [%r4]; }}"
        )
    };
    let x = each(|l| l | (l + 100) << 16);
    let element = |i: u32, j: u32| (x[(4 * i + j / 2) as usize] >> (16 * (j % 2))) & 0xffff;
    let transposed = each(|l| element(2 * (l % 4), l / 4) | element(2 * (l % 4) + 1, l / 4) << 16);
    assert_eq!(warp(&body("", ""), x), x);
    assert_eq!(warp(&body(".trans", ".trans"), x), x);
    assert_eq!(warp(&body("", ".trans"), x), transposed);
    assert_eq!(warp(&body(".trans", ""), x), transposed);
    assert_eq!(
        warp("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r2;", x),
        transposed
    );
}

/// One mma: 32-bit registers of A, B, C by lane in, D out.
fn mma(
    name: &str,
    a: &[[u32; 32]],
    b: &[[u32; 32]],
    c: &[[u32; 32]],
    d: usize,
    rounding: MmaRounding,
) -> Vec<[u32; 32]> {
    let mut loads = String::new();
    let mut input: Vec<u32> = Vec::new();
    for (i, r) in a.iter().chain(b).chain(c).enumerate() {
        loads += &format!("ld.global.u32 %x{i}, [%d3+{}];\n", 128 * i);
        input.extend(r);
    }
    let list = |from: usize, n: usize, p: &str| {
        let names: Vec<String> = (from..from + n).map(|i| format!("%{p}{i}")).collect();
        format!("{{{}}}", names.join(","))
    };
    let (na, nb, nc) = (a.len(), b.len(), c.len());
    let stores: String = (0..d)
        .map(|i| format!("st.global.u32 [%d4+{}], %y{i};\n", 128 * i))
        .collect();
    let text = format!(
        ".version 8.6\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 i, .param .u64 o)\n{{\n\
         .reg .b32 %r<4>, %x<16>, %y<4>; .reg .b64 %d<8>;\n\
         ld.param.u64 %d1, [i]; ld.param.u64 %d2, [o]; mov.u32 %r1, %laneid; mul.wide.u32 %d3, %r1, 4;\n\
         add.u64 %d4, %d2, %d3; add.u64 %d3, %d1, %d3;\n{loads}\
         mma.sync.aligned.{name} {}, {}, {}, {};\n{stores}ret;\n}}\n",
        list(0, d, "y"),
        list(0, na, "x"),
        list(na, nb, "x"),
        list(na + nb, nc, "x")
    );
    let mut device = Device::new(Config {
        mma: rounding,
        ..Config::default()
    });
    let module = device.load(&text).unwrap();
    let (i, o) = (
        upload(&mut device, &input),
        device.alloc(128 * d as u64).unwrap(),
    );
    let args = [Arg::U64(i), Arg::U64(o)];
    let report = device
        .launch(&module, "k", [1, 1, 1], [32, 1, 1], 0, &args)
        .unwrap();
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
    download::<u32>(&device, o, 32 * d)
        .chunks(32)
        .map(|r| r.try_into().unwrap())
        .collect()
}

/// Places of the elements of A as PTX's documentation lists them for each shape: (row, column)
/// of element `i` of a lane, elements counted through its registers.
fn place_a(shape: &str, lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane % 4);
    match shape {
        "m16n8k8.f16" => (if i < 2 { g } else { g + 8 }, t * 2 + (i & 1)),
        "m16n8k16.f16" => (
            if i < 2 || (4..6).contains(&i) {
                g
            } else {
                g + 8
            },
            t * 2 + (i & 1) + if i < 4 { 0 } else { 8 },
        ),
        "m16n8k4.tf32" => (if i == 0 { g } else { g + 8 }, t),
        "m16n8k8.tf32" => (
            if i == 0 || i == 2 { g } else { g + 8 },
            if i < 2 { t } else { t + 4 },
        ),
        "m16n8k16.s8" => (if i < 4 { g } else { g + 8 }, t * 4 + (i & 3)),
        _ => (
            if i < 4 || (8..12).contains(&i) {
                g
            } else {
                g + 8
            },
            t * 4 + (i & 3) + if i < 8 { 0 } else { 16 },
        ),
    }
}

fn place_b(shape: &str, lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane % 4);
    let row = match shape {
        "m16n8k8.f16" => t * 2 + i,
        "m16n8k16.f16" => t * 2 + (i & 1) + if i < 2 { 0 } else { 8 },
        "m16n8k4.tf32" => t,
        "m16n8k8.tf32" => {
            if i == 0 {
                t
            } else {
                t + 4
            }
        }
        "m16n8k16.s8" => t * 4 + i,
        _ => t * 4 + (i & 3) + if i < 4 { 0 } else { 16 },
    };
    (row, g)
}

fn place_c(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane % 4);
    (if i < 2 { g } else { g + 8 }, t * 2 + (i & 1))
}

#[test]
fn every_mma_shape_agrees_with_f64() {
    type Code = (fn(f64) -> u32, fn(u32) -> f64, u32);
    let f16s: Code = (
        |x| f16::from_f64(x).to_bits() as u32,
        |b| f16::from_bits(b as u16).to_f64(),
        16,
    );
    let bf16s: Code = (
        |x| bf16::from_f64(x).to_bits() as u32,
        |b| bf16::from_bits(b as u16).to_f64(),
        16,
    );
    let tf32s: Code = (
        |x| (x as f32).to_bits() & !0x1fff,
        |b| f32::from_bits(b) as f64,
        32,
    );
    let s8s: Code = (
        |x| (x * 127.0) as i8 as u8 as u32,
        |b| b as u8 as i8 as f64,
        8,
    );
    let u8s: Code = (|x| (x.abs() * 255.0) as u8 as u32, |b| b as u8 as f64, 8);
    let cases: [(&str, &str, usize, Code, Code, bool); 9] = [
        (
            "m16n8k8.row.col.f32.f16.f16.f32",
            "m16n8k8.f16",
            8,
            f16s,
            f16s,
            false,
        ),
        (
            "m16n8k16.row.col.f32.f16.f16.f32",
            "m16n8k16.f16",
            16,
            f16s,
            f16s,
            false,
        ),
        (
            "m16n8k8.row.col.f32.bf16.bf16.f32",
            "m16n8k8.f16",
            8,
            bf16s,
            bf16s,
            false,
        ),
        (
            "m16n8k16.row.col.f32.bf16.bf16.f32",
            "m16n8k16.f16",
            16,
            bf16s,
            bf16s,
            false,
        ),
        (
            "m16n8k4.row.col.f32.tf32.tf32.f32",
            "m16n8k4.tf32",
            4,
            tf32s,
            tf32s,
            false,
        ),
        (
            "m16n8k8.row.col.f32.tf32.tf32.f32",
            "m16n8k8.tf32",
            8,
            tf32s,
            tf32s,
            false,
        ),
        (
            "m16n8k16.row.col.s32.s8.u8.s32",
            "m16n8k16.s8",
            16,
            s8s,
            u8s,
            true,
        ),
        (
            "m16n8k32.row.col.s32.u8.s8.s32",
            "m16n8k32.s8",
            32,
            u8s,
            s8s,
            true,
        ),
        (
            "m16n8k32.row.col.satfinite.s32.s8.s8.s32",
            "m16n8k32.s8",
            32,
            s8s,
            s8s,
            true,
        ),
    ];
    let mut r = random(9);
    for (name, shape, k, (ea, da, bits), (eb, db, _), integer) in cases {
        let per = 32 / bits as usize;
        let mut a = vec![[0u32; 32]; 16 * k / 32 / per];
        let mut b = vec![[0u32; 32]; 8 * k / 32 / per];
        let mut c = vec![[0u32; 32]; 4];
        let (mut ma, mut mb) = (vec![[0f64; 32]; 16], vec![[0f64; 8]; 32]);
        let mut want = vec![[0f64; 8]; 16];
        for lane in 0..32 {
            for i in 0..a.len() * per {
                let v = ea(r() * 2.0 - 1.0);
                a[i / per][lane] |= v << (bits * (i % per) as u32);
                let (row, column) = place_a(shape, lane, i);
                ma[row][column] = da(v);
            }
            for i in 0..b.len() * per {
                let v = eb(r() * 2.0 - 1.0);
                b[i / per][lane] |= v << (bits * (i % per) as u32);
                let (row, column) = place_b(shape, lane, i);
                mb[row][column] = db(v);
            }
            for (i, c) in c.iter_mut().enumerate() {
                let v = r() * 2.0 - 1.0;
                let (row, column) = place_c(lane, i);
                c[lane] = if integer {
                    (v * 1e4) as i32 as u32
                } else {
                    (v as f32).to_bits()
                };
                want[row][column] = if integer {
                    (v * 1e4).trunc()
                } else {
                    v as f32 as f64
                };
            }
        }
        for row in 0..16 {
            for column in 0..8 {
                want[row][column] += (0..k).map(|p| ma[row][p] * mb[p][column]).sum::<f64>();
            }
        }
        for (rounding, tolerance) in [
            (MmaRounding::Exact, 3e-7),
            (MmaRounding::Ampere, 4e-6),
            (MmaRounding::Hopper, 2e-6),
        ] {
            let d = mma(name, &a, &b, &c, 4, rounding);
            let mut differs = false;
            for (i, d) in d.iter().enumerate() {
                for (lane, v) in d.iter().enumerate() {
                    let (row, column) = place_c(lane, i);
                    let exact = want[row][column];
                    if integer {
                        assert_eq!(*v as i32 as f64, exact, "{name} {row} {column}");
                    } else {
                        let got = f32::from_bits(*v);
                        assert!(
                            (got as f64 - exact).abs() <= tolerance * exact.abs().max(1.0),
                            "{name} {rounding:?} {got} {exact}"
                        );
                        differs |= got != exact as f32;
                    }
                }
            }
            // Exact rounds once; the others are seen to cut.
            assert!(
                integer || differs == (rounding != MmaRounding::Exact),
                "{name} {rounding:?}"
            );
        }
    }
}

#[test]
fn f16_accumulators_are_packed() {
    let one = [0x3c00_3c00u32; 32];
    let c: Vec<[u32; 32]> = (0..2)
        .map(|i| each(|l| f16::from_f32((i * 32 + l) as f32).to_bits() as u32))
        .collect();
    let d = mma(
        "m16n8k16.row.col.f16.f16.f16.f16",
        &[one; 4],
        &[one; 2],
        &c,
        2,
        MmaRounding::Exact,
    );
    for i in 0..2 {
        for lane in 0..32u32 {
            let low = f16::from_f32(16.0 + (i * 32 + lane) as f32).to_bits() as u32;
            let high = f16::from_f32(16.0).to_bits() as u32;
            assert_eq!(d[i as usize][lane as usize], low | high << 16);
        }
    }
}

#[test]
fn occupancy_and_roofline_follow_the_data_sheets() {
    use cuda_emulator::estimate::{A100, H100, Limit, occupancy, roofline};
    // 128 threads of 128 registers: 65536 / (128 * 128) = 4 blocks of 4 warps.
    let o = occupancy(&A100, 128, 128, 0);
    assert_eq!((o.blocks, o.share, o.limit), (4, 0.25, Limit::Registers));
    // 100 KiB of shared memory: one block on an A100, two on an H100.
    assert_eq!(occupancy(&A100, 128, 32, 100 << 10).blocks, 1);
    assert_eq!(occupancy(&H100, 128, 32, 100 << 10).blocks, 2);
    assert_eq!(occupancy(&A100, 1024, 32, 0).limit, Limit::Threads);
    let c = cuda_emulator::Counters {
        global_load_sectors: 1 << 20,
        mma_flops: 312_000_000,
        ..Default::default()
    };
    let r = roofline(&A100, &c);
    assert!((r.tensor - 1e-6).abs() < 1e-12 && r.seconds() == r.memory);
}
