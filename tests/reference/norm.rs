//! RMSNorm and its gradient, plainly. Included by the tests of both back ends.

pub const EPS: f32 = 1e-5;

/// `y`, `rstd`, and the gradients of `x` and `weight` for the gradient `dy`.
pub struct Results<T> {
    pub y: Vec<T>,
    pub rstd: Vec<T>,
    pub dx: Vec<T>,
    pub dweight: Vec<T>,
}

macro_rules! naive {
    ($name:ident, $t:ty) => {
        pub fn $name(x: &[$t], weight: &[$t], dy: &[$t]) -> Results<$t> {
            let width = weight.len();
            let mut results = Results {
                y: Vec::new(),
                rstd: Vec::new(),
                dx: Vec::new(),
                dweight: vec![0.0; width],
            };
            for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
                let mean = x.iter().map(|x| x * x).sum::<$t>() / width as $t;
                let rstd = 1.0 / (mean + EPS as $t).sqrt();
                let h: Vec<$t> = x.iter().map(|x| x * rstd).collect();
                let dot: $t = (0..width).map(|j| dy[j] * weight[j] * h[j]).sum();
                for j in 0..width {
                    results.y.push(h[j] * weight[j]);
                    results
                        .dx
                        .push(rstd * (dy[j] * weight[j] - h[j] * dot / width as $t));
                    results.dweight[j] += dy[j] * h[j];
                }
                results.rstd.push(rstd);
            }
            results
        }
    };
}
naive!(naive_f64, f64);
naive!(naive_f32, f32);
