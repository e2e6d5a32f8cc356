//! The figures of the report.

use super::svg::{Anchor, Canvas, number, ticks};
use super::{ReportData, Step, name};
use crate::metrics::{Estimate, Metric, Row};
use crate::tasks::Difficulty;

const BARS: [&str; 2] = ["before", "after"];

/// One pair of bars, before and after training.
struct Pair {
    label: String,
    note: String,
    bars: [Option<Estimate>; 2],
    /// Dashed marks across each bar, with a word beside the last one.
    marks: Vec<(&'static str, [Option<f64>; 2])>,
}

/// pass@1, NDCG of the mixed groups and Best-of-N, with the random and the oracle level of the last.
pub fn headline(data: &ReportData) -> String {
    let find = |metric| super::row(data, metric);
    let value = |metric: Metric| {
        find(metric).map_or([None; 2], |row| sides(row).map(|e| e.map(|e| e.value)))
    };
    let pair = |metric: Metric, note: &str| Pair {
        label: name(metric, data.candidates),
        note: note.to_owned(),
        bars: find(metric).map_or([None; 2], sides),
        marks: Vec::new(),
    };
    let mut best = pair(Metric::BestOfN, "the top-ranked program is right");
    best.label = format!("Best-of-{}", data.candidates);
    best.marks = vec![
        ("random", value(Metric::Random)),
        ("oracle", value(Metric::Oracle)),
    ];
    let mut judge = pair(Metric::NdcgMixed, "the judge, on the same programs");
    judge.marks = vec![("random", value(Metric::NdcgRandom))];
    let pairs = [pair(Metric::Pass1, "the generator"), judge, best];
    grouped(&pairs, 340.0, None, "Before and after training")
}

/// Best-of-N in each stratum.
pub fn strata(data: &ReportData) -> Option<String> {
    let in_stratum = |metric: Metric, difficulty: Difficulty| {
        let mut rows = data.rows.iter();
        rows.find(|row| row.metric == metric && row.difficulty == Some(difficulty))
    };
    let pairs: Vec<Pair> = [Difficulty::Easy, Difficulty::Medium, Difficulty::Hard]
        .into_iter()
        .filter_map(|difficulty| {
            let row = in_stratum(Metric::BestOfN, difficulty)?;
            let value = |metric| {
                in_stratum(metric, difficulty)
                    .map_or([None; 2], |row| sides(row).map(|e| e.map(|e| e.value)))
            };
            Some(Pair {
                label: format!("Best-of-{}, {difficulty}", data.candidates),
                note: format!("{} problems", row.problems),
                bars: sides(row),
                marks: vec![
                    ("random", value(Metric::Random)),
                    ("oracle", value(Metric::Oracle)),
                ],
            })
        })
        .collect();
    (!pairs.is_empty()).then(|| grouped(&pairs, 300.0, None, "Best-of-N by difficulty"))
}

/// How often each shown position was picked first.
pub fn positions(data: &ReportData) -> String {
    let share = |counts: &[usize], position: usize| {
        let total: usize = counts.iter().sum();
        let value = *counts.get(position)? as f64 / (total > 0).then_some(total as f64)?;
        // Plain counts: the bar ends without a whisker.
        Some(Estimate {
            value,
            low: value,
            high: value,
        })
    };
    let (before, after) = (&data.picked_first_before, &data.picked_first_after);
    let k = before.len().max(after.len());
    let pairs: Vec<Pair> = (0..k)
        .map(|position| Pair {
            label: format!("Position {}", position + 1),
            note: String::new(),
            bars: [share(before, position), share(after, position)],
            marks: Vec::new(),
        })
        .collect();
    let even = (k > 0).then(|| 1.0 / k as f64);
    grouped(
        &pairs,
        260.0,
        even,
        "Share of judgments that rank a position first",
    )
}

fn sides(row: &Row) -> [Option<Estimate>; 2] {
    [row.before, row.after]
}

/// Pairs of bars over an axis in percent; `level` is a dashed line across all of it.
fn grouped(pairs: &[Pair], height: f64, level: Option<f64>, title: &str) -> String {
    const WIDTH: f64 = 860.0;
    const LEFT: f64 = 52.0;
    let (top, bottom) = (44.0, height - 50.0);
    let mut canvas = Canvas::new(WIDTH, height);
    canvas.text("title", LEFT, 18.0, Anchor::Start, title);
    for (i, label) in ["Before", "After"].into_iter().enumerate() {
        let x = WIDTH - 150.0 + 80.0 * i as f64;
        canvas.bar(BARS[i], x, 8.0, 12.0, 12.0);
        canvas.text("", x + 18.0, 18.5, Anchor::Start, label);
    }
    let y = |share: f64| bottom - share.clamp(0.0, 1.0) * (bottom - top);
    for tick in [0, 20, 40, 60, 80, 100] {
        let at = y(f64::from(tick) / 100.0);
        let class = if tick == 0 { "axis" } else { "grid" };
        canvas.line(class, LEFT, at, WIDTH, at);
        let text = if tick == 100 {
            "100 %".to_owned()
        } else {
            tick.to_string()
        };
        canvas.text("soft", LEFT - 8.0, at + 4.0, Anchor::End, &text);
    }
    if let Some(level) = level {
        canvas.line("ref", LEFT, y(level), WIDTH, y(level));
    }
    let slot = (WIDTH - LEFT) / pairs.len().max(1) as f64;
    let bar = (slot * 0.26).min(64.0);
    for (i, pair) in pairs.iter().enumerate() {
        let centre = LEFT + slot * (i as f64 + 0.5);
        for (side, estimate) in pair.bars.iter().enumerate() {
            let x = centre - bar - 3.0 + side as f64 * (bar + 6.0);
            let middle = x + bar / 2.0;
            let Some(e) = estimate else {
                canvas.text("soft", middle, bottom - 6.0, Anchor::Middle, "none");
                continue;
            };
            canvas.bar(BARS[side], x, y(e.value), bar, bottom - y(e.value));
            if e.high > e.low {
                canvas.line("whisker", middle, y(e.low), middle, y(e.high));
                for end in [e.low, e.high] {
                    canvas.line("whisker", middle - 4.0, y(end), middle + 4.0, y(end));
                }
            }
        }
        let mut last = f64::INFINITY;
        for (word, values) in &pair.marks {
            for (side, value) in values.iter().enumerate() {
                let Some(value) = *value else { continue };
                let x = centre - bar - 3.0 + side as f64 * (bar + 6.0);
                canvas.line("ref", x - 2.0, y(value), x + bar + 2.0, y(value));
                if side == 1 {
                    // The marks come from low to high; close ones must not print over each other.
                    last = (y(value) + 4.0).min(last - 14.0);
                    canvas.text("soft", x + bar + 8.0, last, Anchor::Start, word);
                }
            }
        }
        for (side, estimate) in pair.bars.iter().enumerate() {
            let Some(e) = estimate else { continue };
            let middle = centre - bar / 2.0 - 3.0 + side as f64 * (bar + 6.0);
            let value = format!("{:.1}", 100.0 * e.value);
            canvas.text("value", middle, y(e.high) - 7.0, Anchor::Middle, &value);
        }
        canvas.text("", centre, bottom + 20.0, Anchor::Middle, &pair.label);
        canvas.text("soft", centre, bottom + 37.0, Anchor::Middle, &pair.note);
    }
    canvas.finish(title)
}

type Series = (&'static str, fn(&Step) -> f64);

/// The training curves; none without steps.
pub fn curves(steps: &[Step]) -> Vec<String> {
    if steps.is_empty() {
        return Vec::new();
    }
    let charts: [(&str, &[Series]); 6] = [
        (
            "Reward, mean",
            &[
                ("all answers", |s| s.reward_mean),
                ("pairs in order, valid", |s| {
                    s.pair_accuracy.unwrap_or(f64::NAN)
                }),
            ],
        ),
        (
            "Share of prompts and judgments",
            &[
                ("zero variance", |s| s.zero_variance),
                ("invalid", |s| s.invalid),
            ],
        ),
        ("Entropy, nats a token", &[("", |s| s.entropy)]),
        ("KL from the reference, nats a token", &[("", |s| s.kl)]),
        ("Clip fraction of the tokens", &[("", |s| s.clip_fraction)]),
        ("Gradient norm", &[("", |s| s.grad_norm)]),
    ];
    let draw = |(title, series): (&str, &[Series])| curve(steps, title, series);
    charts.into_iter().map(draw).collect()
}

/// One chart over the steps: every value thin, a moving average over a tenth of the run bold.
fn curve(steps: &[Step], title: &str, series: &[Series]) -> String {
    const WIDTH: f64 = 320.0;
    const HEIGHT: f64 = 210.0;
    const LEFT: f64 = 52.0;
    let (top, bottom, right) = (46.0, HEIGHT - 40.0, WIDTH - 12.0);
    let mut canvas = Canvas::new(WIDTH, HEIGHT);
    canvas.text("title", 8.0, 16.0, Anchor::Start, title);
    let lines: Vec<Vec<(f64, f64)>> = series
        .iter()
        .map(|(_, value)| {
            let points = steps.iter().map(|s| (s.step as f64, value(s)));
            points.filter(|(_, v)| v.is_finite()).collect()
        })
        .collect();
    let values = || lines.iter().flatten().map(|&(_, v)| v);
    let (low, high) = (
        values().fold(f64::INFINITY, f64::min),
        values().fold(f64::NEG_INFINITY, f64::max),
    );
    if low > high {
        canvas.text(
            "soft",
            WIDTH / 2.0,
            HEIGHT / 2.0,
            Anchor::Middle,
            "no values",
        );
        return canvas.finish(title);
    }
    // A flat line still needs a scale.
    let margin = if high > low {
        0.0
    } else {
        (low.abs() * 0.1).max(0.05)
    };
    let marks = ticks(low - margin, high + margin, 4);
    let (floor, ceiling) = (marks[0], marks[marks.len() - 1]);
    let step = marks.get(1).map_or(1.0, |second| second - floor);
    let y =
        |v: f64| bottom - (v - floor) / (ceiling - floor).max(f64::MIN_POSITIVE) * (bottom - top);
    for (i, &mark) in marks.iter().enumerate() {
        let class = if i == 0 { "axis" } else { "grid" };
        canvas.line(class, LEFT, y(mark), right, y(mark));
        canvas.text(
            "soft",
            LEFT - 7.0,
            y(mark) + 4.0,
            Anchor::End,
            &number(mark, step),
        );
    }
    let first = steps.iter().map(|s| s.step).min().unwrap_or(0) as f64;
    let last = steps.iter().map(|s| s.step).max().unwrap_or(0) as f64;
    let x = |s: f64| LEFT + 6.0 + (s - first) / (last - first).max(1.0) * (right - LEFT - 12.0);
    let along = ticks(first, last, 5);
    let stride = along.get(1).map_or(1.0, |second| second - along[0]);
    for mark in along
        .into_iter()
        .filter(|m| (first..=last).contains(m) && m.fract() == 0.0)
    {
        canvas.text(
            "soft",
            x(mark),
            bottom + 17.0,
            Anchor::Middle,
            &number(mark, stride.max(1.0)),
        );
    }
    canvas.text(
        "soft",
        (LEFT + right) / 2.0,
        bottom + 34.0,
        Anchor::Middle,
        "step",
    );
    for (i, (line, (label, _))) in lines.iter().zip(series).enumerate() {
        let class = if i == 0 { "" } else { "second" };
        let points: Vec<_> = line.iter().map(|&(s, v)| (x(s), y(v))).collect();
        let window = points.len() / 10;
        if window > 1 {
            canvas.path(&format!("raw {class}"), &points);
            let smooth = line.iter().enumerate().map(|(j, &(s, _))| {
                let near =
                    &line[j.saturating_sub(window / 2)..(j + window / 2 + 1).min(line.len())];
                (
                    x(s),
                    y(near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64),
                )
            });
            canvas.path(class, &smooth.collect::<Vec<_>>());
        } else {
            canvas.path(class, &points);
            if let [only] = points[..] {
                canvas.dot("curve", only.0, only.1, 3.0);
            }
        }
        if !label.is_empty() {
            let from = 8.0 + 130.0 * i as f64;
            canvas.path(class, &[(from, 31.0), (from + 18.0, 31.0)]);
            canvas.text("soft", from + 24.0, 35.0, Anchor::Start, label);
        }
    }
    canvas.finish(title)
}
