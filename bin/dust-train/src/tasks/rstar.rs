//! rStar-Coder's `seed_testcase`: Parquet with the text columns `question_id`, `question`,
//! `starter_code`, `inputs`, `outputs`, `func_name` and `class_name`, one problem a row. `inputs` and
//! `outputs` hold JSON lists of the same length.
//!
//! Without a `func_name` a problem is a script: inputs and outputs are whole texts, or lists of lines.
//! With one, an input is the list of the arguments, or a text with one JSON value a line, as in
//! LiveCodeBench; an output is the value, or, where the input was text, JSON again.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as Record};
use serde_json::Value;

use super::jsonl::record_from;
use super::{Broken, Mode, Task, TaskError, TaskSet, Test};

const COLUMNS: [&str; 7] = [
    "question_id",
    "question",
    "starter_code",
    "inputs",
    "outputs",
    "func_name",
    "class_name",
];

#[derive(Default)]
struct Row {
    columns: [String; COLUMNS.len()],
}

impl Row {
    /// A missing or null value is an empty text.
    fn of(record: &Record) -> Result<Self, Broken> {
        let mut row = Self::default();
        for (name, field) in record.get_column_iter() {
            let Some(column) = COLUMNS.iter().position(|column| column == name) else {
                continue;
            };
            row.columns[column] = match field {
                Field::Str(text) => text.clone(),
                Field::Null => String::new(),
                _ => {
                    let remedy = "give the files as they were published";
                    return Err(Broken::new(name, "is not text", remedy));
                }
            };
        }
        Ok(row)
    }

    fn task(self) -> Result<Task, Broken> {
        let [
            id,
            question,
            starter_code,
            inputs,
            outputs,
            func_name,
            class_name,
        ] = self.columns;
        if !matches!(class_name.as_str(), "" | "Solution") {
            let problem = format!("`{class_name}`: tests of a class of its own are not supported");
            return Err(Broken::new("class_name", problem, "leave the problem out"));
        }
        let list = |field: &str, text: &str| {
            record_from::<Vec<Value>>(text.as_bytes()).map_err(|broken| Broken {
                field: format!("{field}.{}", broken.field),
                ..broken
            })
        };
        let (inputs, outputs) = (list("inputs", &inputs)?, list("outputs", &outputs)?);
        if inputs.len() != outputs.len() {
            let problem = format!("has {} items for {} inputs", outputs.len(), inputs.len());
            return Err(Broken::new("outputs", problem, "leave the problem out"));
        }
        let function = Some(func_name).filter(|name| !name.is_empty());
        let pairs = inputs.into_iter().zip(outputs).enumerate();
        let tests = pairs.map(|(i, (input, output))| match function {
            None => Ok(Test {
                input: text(input, &format!("inputs[{i}]"))?.into(),
                output: text(output, &format!("outputs[{i}]"))?.into(),
            }),
            Some(_) => call(input, output, i),
        });
        let task = Task {
            id: format!("rstar/{id}"),
            statement: question,
            starter_code: Some(starter_code).filter(|code| !code.trim().is_empty()),
            mode: match function {
                Some(_) => Mode::Function,
                None => Mode::Stdin,
            },
            tests: tests.collect::<Result<_, _>>()?,
            entry_point: function,
            test_code: None,
            difficulty: None,
            split: None,
            date: None,
            solution: None,
        };
        task.check()?;
        Ok(task)
    }
}

/// A whole text, which may be given as its lines.
fn text(value: Value, field: &str) -> Result<String, Broken> {
    let lines = match value {
        Value::String(text) => return Ok(text),
        Value::Array(lines) => lines,
        _ => return Err(Broken::new(field, "is not text", "leave the problem out")),
    };
    let lines: Option<Vec<_>> = lines
        .into_iter()
        .map(|line| line.as_str().map(str::to_owned))
        .collect();
    lines
        .map(|lines| lines.join("\n"))
        .ok_or_else(|| Broken::new(field, "is not a list of lines", "leave the problem out"))
}

fn call(input: Value, output: Value, i: usize) -> Result<Test, Broken> {
    let json = |field: &str, text: &str| {
        record_from::<Value>(text.as_bytes()).map_err(|broken| Broken {
            field: format!("{field}[{i}]"),
            ..broken
        })
    };
    let Value::String(lines) = input else {
        return Ok(Test { input, output });
    };
    let arguments = lines.trim_end_matches(['\r', '\n']).lines();
    Ok(Test {
        input: arguments
            .map(|line| json("inputs", line))
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        output: match output {
            Value::String(text) => json("outputs", &text)?,
            value => value,
        },
    })
}

/// Reads a Parquet file, or all that a folder holds, in the order of their names. One row is in
/// memory at a time.
pub fn rstar(path: &Path) -> Result<TaskSet, TaskError> {
    let mut set = TaskSet::empty(path);
    for file in files(path)? {
        let unreadable = |error: parquet::errors::ParquetError| TaskError::Spec {
            spec: file.display().to_string(),
            problem: format!("not a Parquet file that can be read: {error}"),
            remedy: "give a file of seed_testcase, compressed with Snappy or not at all".to_owned(),
        };
        let handle = File::open(&file).map_err(|source| TaskError::Io {
            path: file.clone(),
            source,
        })?;
        let reader = SerializedFileReader::new(handle).map_err(unreadable)?;
        let schema = reader.metadata().file_metadata().schema().get_fields();
        if let Some(column) = ["question_id", "question", "inputs", "outputs"]
            .iter()
            .find(|column| !schema.iter().any(|field| field.name() == **column))
        {
            return Err(TaskError::Spec {
                spec: file.display().to_string(),
                problem: format!("has no column `{column}`"),
                remedy: "give a file of seed_testcase; seed_sft has no tests".to_owned(),
            });
        }
        let rows = reader.get_row_iter(None).map_err(unreadable)?;
        for (record, number) in rows.zip(1..) {
            let record = record.map_err(unreadable)?;
            set.add(&file, number, Row::of(&record).and_then(Row::task));
        }
    }
    Ok(set)
}

fn files(path: &Path) -> Result<Vec<PathBuf>, TaskError> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let io = |source| TaskError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "parquet")
        {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(TaskError::Spec {
            spec: path.display().to_string(),
            problem: "the folder holds no .parquet file".to_owned(),
            remedy: "give the folder seed_testcase of rStar-Coder".to_owned(),
        });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;
    use std::sync::Arc;

    /// Writes a file of text columns; `None` is null.
    fn write(path: &Path, columns: &[&str], rows: &[Vec<Option<&str>>], packed: bool) {
        let fields: String = columns
            .iter()
            .map(|name| format!("optional binary {name} (string); "))
            .collect();
        let schema = parse_message_type(&format!("message schema {{ {fields} }}")).unwrap();
        let compression = if packed {
            Compression::SNAPPY
        } else {
            Compression::UNCOMPRESSED
        };
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .build();
        let file = File::create(path).unwrap();
        let mut writer =
            SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for i in 0..columns.len() {
            let mut column = group.next_column().unwrap().unwrap();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row[i].is_some())).collect();
            let values: Vec<ByteArray> = rows.iter().filter_map(|r| r[i]).map(Into::into).collect();
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, Some(&levels), None)
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    const ALL: [&str; 9] = [
        "question_id",
        "question",
        "starter_code",
        "inputs",
        "outputs",
        "is_synthesized",
        "test_case_type",
        "func_name",
        "class_name",
    ];

    fn read(rows: &[[Option<&str>; 6]], packed: bool) -> TaskSet {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data-00000-of-00001.parquet");
        let rows: Vec<Vec<_>> = rows
            .iter()
            .map(|&[id, starter, inputs, outputs, function, class]| {
                let question = Some("What is it?");
                vec![
                    id,
                    question,
                    starter,
                    inputs,
                    outputs,
                    Some("[]"),
                    Some("x"),
                    function,
                    class,
                ]
            })
            .collect();
        write(&path, &ALL, &rows, packed);
        rstar(&path).unwrap()
    }

    #[test]
    fn scripts_and_functions() {
        for packed in [false, true] {
            let set = read(
                &[
                    [
                        Some("1"),
                        None,
                        Some(r#"["1 2\n", ["3", "4"]]"#),
                        Some(r#"["3\n", "7"]"#),
                        None,
                        None,
                    ],
                    [
                        Some("2"),
                        Some("def f(a, b):"),
                        Some(r#"["[1]\n2\n", [[3], 4]]"#),
                        Some(r#"["[1, 2]", [3, 4]]"#),
                        Some("f"),
                        Some(""),
                    ],
                    [
                        Some("3"),
                        Some(""),
                        Some(r#"[["word"]]"#),
                        Some(r#"["word"]"#),
                        Some("g"),
                        Some("Solution"),
                    ],
                ],
                packed,
            );
            assert!(set.refused.is_empty(), "{:?}", set.refused);
            let [script, function, method] = &set.tasks[..] else {
                panic!("{set:?}")
            };
            assert_eq!(
                (script.mode, script.starter_code.as_deref()),
                (Mode::Stdin, None)
            );
            assert_eq!(script.tests[1].input, json!("3\n4"));
            assert_eq!(function.entry_point.as_deref(), Some("f"));
            assert_eq!(
                function.tests[0],
                Test {
                    input: json!([[1], 2]),
                    output: json!([1, 2])
                }
            );
            assert_eq!(
                function.tests[1],
                Test {
                    input: json!([[3], 4]),
                    output: json!([3, 4])
                }
            );
            assert_eq!(
                method.tests[0],
                Test {
                    input: json!(["word"]),
                    output: json!("word")
                }
            );
            assert_eq!(method.id, "rstar/3");
        }
    }

    #[test]
    fn bad_rows_are_refused_by_column() {
        let cases = [
            (
                [Some("1"), None, Some("[1"), Some("[]"), None, None],
                "inputs",
            ),
            ([Some("1"), None, None, Some("[]"), None, None], "inputs"),
            (
                [Some("1"), None, Some(r#"["a"]"#), Some("[]"), None, None],
                "outputs",
            ),
            (
                [Some("1"), None, Some("[]"), Some("[]"), None, None],
                "tests",
            ),
            (
                [Some("1"), None, Some("[1]"), Some(r#"["a"]"#), None, None],
                "inputs[0]",
            ),
            (
                [Some("1"), None, Some(r#"["a"]"#), Some("[[1]]"), None, None],
                "outputs[0]",
            ),
            (
                [
                    Some("1"),
                    None,
                    Some(r#"["x"]"#),
                    Some("[1]"),
                    Some("f"),
                    None,
                ],
                "inputs[0]",
            ),
            (
                [Some("1"), None, Some("[3]"), Some("[1]"), Some("f"), None],
                "tests[0].input",
            ),
            (
                [
                    Some("1"),
                    None,
                    Some("[[]]"),
                    Some("[1]"),
                    Some("f()"),
                    None,
                ],
                "entry_point",
            ),
            (
                [
                    Some("1"),
                    None,
                    Some("[[]]"),
                    Some("[1]"),
                    Some("f"),
                    Some("LRUCache"),
                ],
                "class_name",
            ),
        ];
        for (row, field) in cases {
            let set = read(&[row], false);
            let error = set.refused[0].to_string();
            assert!(
                error.contains(&format!(":1: field `{field}")),
                "{error} should name {field}"
            );
        }
    }

    #[test]
    fn other_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sft.parquet");
        write(
            &path,
            &["question_id", "question"],
            &[vec![Some("1"), Some("q")]],
            false,
        );
        let error = rstar(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("sft.parquet") && error.contains("`inputs`"),
            "{error}"
        );
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = rstar(&path).unwrap_err().to_string();
        assert!(error.contains("not a Parquet file"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(
            rstar(folder.path())
                .unwrap_err()
                .to_string()
                .contains("no .parquet")
        );
        assert!(matches!(rstar(&path), Err(TaskError::Io { .. })));
    }
}
