//! The report of a run: one self-contained `report.html` without scripts, light or dark as the
//! reader's system is, and the headline figure alone as `report.svg`.
//!
//! [`ReportData`] is all that it shows. Programs and judgments are hostile text: everything goes
//! through escaping, in the template and in the figures.

mod figure;
mod svg;

use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::{Deserialize, Serialize};

use crate::metrics::{Estimate, Metric, Row};

/// All that a report shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReportData {
    /// The heading, for example the model's name.
    pub title: String,
    /// One sentence under it.
    pub subtitle: String,
    /// N of Best-of-N: the candidates of a group.
    pub candidates: usize,
    /// The figures before and after, as [`crate::metrics::compare`] gives them.
    pub rows: Vec<Row>,
    /// One per training step, from `metrics.jsonl`.
    pub steps: Vec<Step>,
    /// How often each shown position was picked first, before training.
    pub picked_first_before: Vec<usize>,
    /// The same after training.
    pub picked_first_after: Vec<usize>,
    /// Judgments to look at.
    pub examples: Vec<Example>,
    /// The run's manifest: names and values in order.
    pub manifest: Vec<(String, String)>,
}

/// What a training step measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// Number of the step.
    pub step: usize,
    /// Mean reward of the judgments.
    pub reward_mean: f64,
    /// Their standard deviation.
    pub reward_std: f64,
    /// Mean pairwise accuracy of the valid rankings; none if there is no such.
    pub pair_accuracy: Option<f64>,
    /// Share of prompts whose judgments all had the same reward.
    pub zero_variance: f64,
    /// Share of judgments without a valid ranking.
    pub invalid: f64,
    /// Mean entropy of a token, in nats.
    pub entropy: f64,
    /// KL divergence from the reference, in nats a token.
    pub kl: f64,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// A group with its judgment before and after training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// The problem's name.
    pub id: String,
    /// Its statement.
    pub statement: String,
    /// The judgment before training.
    pub before: Shown,
    /// The judgment after training.
    pub after: Shown,
}

/// A candidate program with its verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The program.
    pub program: String,
    /// What the sandbox said, for example `passed`.
    pub verdict: String,
    /// Whether that makes it right.
    pub right: bool,
}

/// A group of candidates and the judgment of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The candidates.
    pub candidates: Vec<Candidate>,
    /// The judge's text.
    pub text: String,
    /// The candidates (from 0) from best to worst; nothing if there is no valid ranking.
    pub ranking: Option<Vec<usize>>,
    /// Its reward.
    pub reward: f64,
}

/// The report as one HTML page.
pub fn html(data: &ReportData) -> Result<String, minijinja::Error> {
    let mut env = Environment::new();
    env.add_template("report.html", include_str!("report.html"))?;
    let cells = |metric: Metric| row(data, metric).map(|row| table_row(data, row));
    let strata: Vec<Value> = data
        .rows
        .iter()
        .filter(|row| row.difficulty.is_some() && headline(row.metric))
        .map(|row| table_row(data, row))
        .collect();
    env.get_template("report.html")?.render(context! {
        data => Value::from(Serde(data)),
        style => format!("{}{}", include_str!("report.css"), svg::STYLE),
        problems => data.rows.first().map(|row| row.problems),
        headline => Metric::ALL.iter().filter(|m| headline(**m)).filter_map(|m| cells(*m)).collect::<Vec<_>>(),
        details => Metric::ALL.iter().filter(|m| !headline(**m)).filter_map(|m| cells(*m)).collect::<Vec<_>>(),
        strata,
        figure => safe(figure::headline(data)),
        curves => figure::curves(&data.steps).into_iter().map(safe).collect::<Vec<_>>(),
        positions => safe(figure::positions(data)),
        strata_figure => figure::strata(data).map(safe),
    })
}

/// The headline figure as a file of its own.
pub fn svg(data: &ReportData) -> String {
    svg::standalone(&figure::headline(data))
}

/// Figures escape their own text.
fn safe(text: String) -> Value {
    Value::from_safe_string(text)
}

fn headline(metric: Metric) -> bool {
    matches!(
        metric,
        Metric::Pass1
            | Metric::NdcgMixed
            | Metric::NdcgRandom
            | Metric::PairAccuracy
            | Metric::BestOfN
            | Metric::Random
            | Metric::Oracle
    )
}

fn row(data: &ReportData, metric: Metric) -> Option<&Row> {
    let mut all = data.rows.iter().filter(|row| row.difficulty.is_none());
    all.find(|row| row.metric == metric)
}

/// What people read a metric as; `n` candidates are judged.
pub fn name(metric: Metric, n: usize) -> String {
    match metric {
        Metric::Pass1 => "pass@1".to_owned(),
        Metric::Ndcg => "NDCG, all groups".to_owned(),
        Metric::NdcgMixed => "NDCG, mixed groups".to_owned(),
        Metric::NdcgRandom => "NDCG, random order".to_owned(),
        Metric::PairAccuracy => "Pairwise accuracy".to_owned(),
        Metric::BestOfN => format!("Best-of-{n}, by the judge"),
        Metric::Random => format!("Best-of-{n}, random pick"),
        Metric::Oracle => format!("Best-of-{n}, oracle"),
        Metric::AllRight => "Groups all right".to_owned(),
        Metric::AllWrong => "Groups all wrong".to_owned(),
        Metric::Mixed => "Groups mixed".to_owned(),
        Metric::Invalid => "Invalid rankings".to_owned(),
    }
}

fn table_row(data: &ReportData, row: &Row) -> Value {
    let cell = |estimate: &Option<Estimate>, sign: bool| {
        estimate.map(|e| {
            let number = |x: f64| {
                let text = if sign {
                    format!("{:+.1}", 100.0 * x)
                } else {
                    format!("{:.1}", 100.0 * x)
                };
                // A typographic minus, and no sign on what rounds to zero.
                text.replace("-0.0", "0.0")
                    .replace("+0.0", "0.0")
                    .replace('-', "−")
            };
            context! { value => number(e.value), low => number(e.low), high => number(e.high) }
        })
    };
    // Coloured only where the interval excludes zero and more is better or worse. Over a handful of
    // problems, a bootstrap's interval is too narrow to say so.
    let tone = match (row.metric, &row.change) {
        (
            Metric::NdcgRandom
            | Metric::Random
            | Metric::Oracle
            | Metric::AllRight
            | Metric::AllWrong
            | Metric::Mixed,
            _,
        ) => "",
        _ if row.problems < 10 => "",
        (metric, Some(e)) if e.low > 0.0 || e.high < 0.0 => {
            if (e.low > 0.0) == (metric != Metric::Invalid) {
                "good"
            } else {
                "bad"
            }
        }
        _ => "",
    };
    context! {
        name => name(row.metric, data.candidates),
        stratum => row.difficulty.map(|d| d.to_string()),
        problems => row.problems,
        baseline => matches!(row.metric, Metric::NdcgRandom | Metric::Random | Metric::Oracle),
        before => cell(&row.before, false),
        after => cell(&row.after, false),
        change => cell(&row.change, true),
        tone,
    }
}

#[cfg(test)]
mod tests;
