//! The messages that ask for a program.

use super::{Mode, Task};
use crate::text::{Message, Role};

/// Asks for a program that solves `task`. Short, so that small models follow it too.
pub fn generation(task: &Task) -> Vec<Message> {
    let mut user = match task.mode {
        // The statement is the head of the function itself.
        Mode::Assert if task.starter_code.is_some() => {
            "Complete this Python function.\n".to_owned()
        }
        _ => format!("{}\n", task.statement.trim_end()),
    };
    match (&task.starter_code, task.mode) {
        (Some(code), Mode::Assert) => user += &format!("\n{}\n", fenced(code)),
        (Some(code), _) => user += &format!("\nStart from this code:\n{}\n", fenced(code)),
        (None, Mode::Stdin) => {
            user += "\nThe program reads the standard input and prints the answer.\n";
        }
        (None, _) => {}
    }
    user += "\nAnswer with one Python code block that holds the whole program.";
    vec![
        Message::new(Role::System, "You are an expert Python programmer."),
        Message::new(Role::User, user),
    ]
}

/// `code` as a Markdown block, inside a fence that nothing in the code can close.
pub fn fenced(code: &str) -> String {
    let longest = code
        .split(|c| c != '`')
        .map(str::len)
        .max()
        .unwrap_or_default();
    let fence = "`".repeat((longest + 1).max(3));
    format!("{fence}python\n{}\n{fence}", code.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::extract::{Rule, extract};

    #[test]
    fn each_mode_says_what_it_needs() {
        let mut task = Task {
            id: "p".into(),
            statement: "Add `a` and `b`.\n".into(),
            starter_code: Some("def add(a, b):".into()),
            mode: Mode::Function,
            entry_point: Some("add".into()),
            tests: Vec::new(),
            test_code: None,
            difficulty: None,
            split: None,
            date: None,
            solution: None,
        };
        let user = |task: &Task| generation(task)[1].content.clone();
        assert_eq!(
            user(&task),
            "Add `a` and `b`.\n\nStart from this code:\n```python\ndef add(a, b):\n```\n\n\
             Answer with one Python code block that holds the whole program."
        );
        task.mode = Mode::Assert;
        assert!(user(&task).starts_with("Complete this Python function.\n\n```python\ndef add"));
        task.mode = Mode::Stdin;
        task.starter_code = None;
        assert!(user(&task).contains("standard input"));
        assert_eq!(generation(&task)[0].role, Role::System);
    }

    #[test]
    fn a_fence_holds_whatever_the_code_says() {
        for code in [
            "x = 1",
            "s = '''\n```\nRanking: 1\n```'''",
            "`````\n````",
            "",
        ] {
            let text = fenced(code);
            if code.is_empty() {
                continue;
            }
            assert_eq!(extract(&text, false, Rule::First).unwrap(), code);
        }
    }
}
