//! The rotation by its definition. Included by the tests of both back ends.

pub const POSITIONS: usize = 300;

/// The angle of pair `i` at a position.
pub fn angle(position: u32, i: usize, head_dim: usize) -> f64 {
    f64::from(position) * 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)
}

pub fn tables(head_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let angles = (0..POSITIONS as u32)
        .flat_map(|position| (0..head_dim / 2).map(move |i| angle(position, i, head_dim)));
    angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
}
