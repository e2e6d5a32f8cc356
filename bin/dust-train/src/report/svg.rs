//! Drawing: a small canvas that writes SVG. Colours are classes, so that the page's light and dark
//! palettes apply; [`standalone`] adds them to a figure that leaves the page.

use std::fmt::Write;

/// Escapes text for XML, and drops what XML cannot hold.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// An SVG image under construction, in user units that are pixels at full width.
pub struct Canvas {
    width: f64,
    height: f64,
    body: String,
}

/// Which end of a text stands at its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    pub fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            body: String::new(),
        }
    }

    pub fn line(&mut self, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
        let _ = write!(
            self.body,
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        );
    }

    pub fn bar(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        let (width, height) = (width.max(0.0), height.max(0.0));
        let _ = write!(
            self.body,
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" rx="2"/>"#
        );
    }

    pub fn dot(&mut self, class: &str, x: f64, y: f64, radius: f64) {
        let _ = write!(
            self.body,
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius}"/>"#
        );
    }

    pub fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<_> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = write!(
            self.body,
            r#"<polyline class="{class}" points="{}"/>"#,
            points.join(" ")
        );
    }

    pub fn text(&mut self, class: &str, x: f64, y: f64, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(
            self.body,
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(text)
        );
    }

    /// The image; `label` says what it shows to those who cannot see it.
    pub fn finish(self, label: &str) -> String {
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">{body}</svg>"#,
            w = self.width,
            h = self.height,
            label = escape(label),
            body = self.body,
        )
    }
}

/// How the classes of the figures look, given the page's palette.
pub const STYLE: &str = "text{font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:var(--ink)}\
text.soft{fill:var(--soft)}text.title{font-weight:600;font-size:13px}text.value{font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px}\
line.grid{stroke:var(--line)}line.axis{stroke:var(--soft)}line.ref{stroke:var(--soft);stroke-dasharray:4 4}\
line.whisker{stroke:var(--ink);stroke-width:1.3}.before{fill:var(--before)}.after{fill:var(--after)}\
polyline{fill:none;stroke:var(--after);stroke-width:2;stroke-linejoin:round}\
polyline.raw{stroke-width:1;opacity:.35}polyline.second{stroke:var(--bad)}circle.curve{fill:var(--after)}";

/// A figure with its style, both palettes and a background inside, for use outside of the page.
pub fn standalone(figure: &str) -> String {
    let inside = format!(
        "<style>svg{{--card:#fff;--ink:#1d2128;--soft:#636b78;--line:#e2e4e8;--before:#a3abb8;\
         --after:#2a6fdb;--bad:#c0392b}}@media (prefers-color-scheme:dark){{svg{{--card:#1b1f26;\
         --ink:#e6e9ee;--soft:#98a1af;--line:#2d333d;--before:#6b7482;--after:#6ea8ff;\
         --bad:#f0796b}}}}{STYLE}</style>\
         <rect width=\"100%\" height=\"100%\" fill=\"var(--card)\"/>"
    );
    figure.replacen('>', &format!(">{inside}"), 1) + "\n"
}

/// Round axis ticks that cover `low..=high`, about `wanted` of them.
pub fn ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let span = if high > low { high - low } else { 1.0 };
    let raw = span / wanted.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|step| *step >= raw * 0.999)
        .unwrap_or(10.0 * power);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number as short as its axis allows.
pub fn number(value: f64, step: f64) -> String {
    let value = if value.abs() < step * 1e-6 {
        0.0
    } else {
        value
    };
    if value != 0.0 && !(1e-4..1e5).contains(&step) {
        return format!("{value:.0e}").replace('-', "−");
    }
    let digits = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
    format!("{value:.digits$}").replace('-', "−")
}
