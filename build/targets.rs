//! The targets that `DUST_CUDA_ARCHS` may name.

/// A compute capability as nvcc writes it, and the first PTX ISA that has it. A test holds the
/// table against ptxas.
pub const TARGETS: &[(&str, &str)] = &[
    ("80", "7.0"),
    ("86", "7.1"),
    ("87", "7.4"),
    ("88", "7.3"),
    ("89", "7.8"),
    ("90", "7.8"),
    ("90a", "8.0"),
    ("100", "8.6"),
    ("100a", "8.6"),
    ("103", "8.8"),
    ("103a", "8.8"),
    ("110", "9.0"),
    ("110a", "9.0"),
    ("120", "8.7"),
    ("120a", "8.7"),
    ("121", "8.8"),
    ("121a", "8.8"),
];
