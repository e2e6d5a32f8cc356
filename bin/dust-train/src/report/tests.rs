use super::*;
use crate::metrics::{Judgment, Problem, compare};
use crate::tasks::Difficulty;

const HOSTILE: &str =
    "</pre></svg><script>alert(1)</script><img src=x onerror=\"alert(1)\">&'{{ 7 * 7 }}\u{0}";

fn side(shift: usize) -> Vec<Problem> {
    (0..24)
        .map(|i| {
            let right = i % 5;
            let labels: Vec<bool> = (0..4).map(|c| c < right).collect();
            let mut ranking: Vec<usize> = (0..4).collect();
            ranking.rotate_left((i / 3 + shift) % (4 - shift));
            let judgment = Judgment {
                labels,
                ranking: (i % 7 != shift).then_some(ranking),
            };
            Problem {
                id: format!("p{i}"),
                difficulty: Some([Difficulty::Easy, Difficulty::Medium, Difficulty::Hard][i % 3]),
                samples: 4,
                passed: right,
                judgments: vec![judgment.clone()],
                same: vec![judgment],
            }
        })
        .collect()
}

fn data() -> ReportData {
    let judgment = |ranking| Shown {
        candidates: (0..4)
            .map(|i| Candidate {
                program: format!("def f(x):\n    return x + {i}  # {HOSTILE}"),
                verdict: if i == 1 { "passed" } else { "wrong_answer" }.into(),
                right: i == 1,
            })
            .collect(),
        text: format!("Candidate 2 handles the empty list. {HOSTILE}\n\nRanking: 2 > 1 > 4 > 3"),
        ranking,
        reward: 0.75,
    };
    ReportData {
        title: format!("DuST {HOSTILE}"),
        subtitle: "A model ranks its own programs.".into(),
        candidates: 4,
        rows: compare(&side(0), &side(2), 0),
        steps: (0..60)
            .map(|step| {
                let (t, wave) = (step as f64 / 60.0, ((step * 37) % 11) as f64 / 11.0 - 0.5);
                Step {
                    step,
                    reward_mean: 0.1 + 0.4 * t + 0.2 * wave,
                    reward_std: 0.4,
                    pair_accuracy: (step != 9).then_some(0.5 + 0.2 * t),
                    zero_variance: 0.3 - 0.1 * t + 0.1 * wave,
                    invalid: (0.4 - 0.5 * t).max(0.0),
                    entropy: 0.9 - 0.3 * t,
                    kl: 0.002 * t,
                    clip_fraction: 0.004 + 0.003 * wave,
                    grad_norm: if step == 30 { f64::NAN } else { 1.5 + wave },
                }
            })
            .collect(),
        picked_first_before: vec![60, 20, 10, 10],
        picked_first_after: vec![30, 26, 22, 22],
        examples: vec![Example {
            id: format!("builtin/second_largest {HOSTILE}"),
            statement: format!("Write a function. {HOSTILE}"),
            before: judgment(None),
            after: judgment(Some(vec![1, 0, 3, 2])),
        }],
        manifest: vec![
            ("seed".into(), "1".into()),
            ("model".into(), HOSTILE.into()),
        ],
    }
}

#[test]
fn hostile_text_stays_text() {
    let page = html(&data()).unwrap();
    for tag in ["<script", "<img", "onerror=\"", "{{"] {
        let allowed = if tag == "{{" {
            page.matches("{{ 7 * 7 }}").count()
        } else {
            0
        };
        assert_eq!(page.matches(tag).count(), allowed, "{tag}");
    }
    assert!(page.contains("&lt;script&gt;"));
    assert_eq!(page.matches("<pre").count(), page.matches("</pre>").count());
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
}

#[test]
fn the_page_stands_alone_and_shows_everything() {
    let page = html(&data()).unwrap();
    for outside in ["src=\"", "href=\"", "url(", "@import", "<link"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
    for text in [
        "pass@1",
        "NDCG, mixed groups",
        "Best-of-4, by the judge",
        "Best-of-4, random pick",
        "Best-of-4, oracle",
        "Invalid rankings",
        "Gradient norm",
        "Entropy",
        "zero variance",
        "Position 4",
        "no valid ranking",
        "2 &gt; 1 &gt; 4 &gt; 3",
        "wrong_answer",
        "24 held-out problems",
    ] {
        assert!(page.contains(text), "{text}");
    }
    for number in ["NaN", "inf"] {
        assert!(
            !page.replace("info", "").contains(&format!("\"{number}")),
            "{number}"
        );
    }
    // Headline, six curves, positions, strata.
    assert_eq!(page.matches("<svg").count(), 9);
}

#[test]
fn a_run_without_training_or_examples_has_a_report_too() {
    let empty = ReportData {
        title: "t".into(),
        subtitle: String::new(),
        candidates: 4,
        rows: Vec::new(),
        steps: Vec::new(),
        picked_first_before: Vec::new(),
        picked_first_after: vec![0, 0],
        examples: Vec::new(),
        manifest: Vec::new(),
    };
    let page = html(&empty).unwrap();
    assert!(!page.contains("<h2>Training") && !page.contains("<h2>Judgments"));
    let constant = ReportData {
        steps: vec![Step {
            grad_norm: f64::NAN,
            ..Step::default()
        }],
        ..empty
    };
    assert!(html(&constant).unwrap().contains("no values"));
}

#[test]
fn the_figure_is_a_whole_image() {
    let image = svg(&data());
    assert!(image.starts_with("<svg xmlns=") && image.trim_end().ends_with("</svg>"));
    assert_eq!(image.matches("<style>").count(), 1);
    assert!(image.contains("oracle") && image.contains("Best-of-4"));
}

#[test]
fn ticks_are_round_and_cover() {
    for (low, high) in [
        (0.0, 1.0),
        (-0.37, 0.91),
        (1e-6, 3e-6),
        (12.0, 4321.0),
        (5.0, 5.0),
    ] {
        let marks = super::svg::ticks(low, high, 4);
        assert!(marks.len() <= 8 && !marks.is_empty(), "{marks:?}");
        assert!(
            marks[0] <= low + 1e-12 && marks[marks.len() - 1] >= high - 1e-9,
            "{marks:?}"
        );
    }
    assert_eq!(super::svg::number(0.25, 0.05), "0.25");
    assert_eq!(super::svg::number(-2.0, 1.0), "−2");
    assert_eq!(super::svg::number(2e-6, 1e-6), "2e−6");
}
