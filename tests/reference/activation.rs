//! SiLU and its derivative in f64. Included by the tests of both back ends.

pub fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

pub fn silu_slope(g: f64) -> f64 {
    let sigmoid = 1.0 / (1.0 + (-g).exp());
    sigmoid * (1.0 + g * (1.0 - sigmoid))
}
