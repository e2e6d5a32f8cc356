//! Downloads from a hub, which is a loopback server here.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use dust_train::checkpoint::Checkpoint;

const TOKEN: &str = "hf_sesame";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The part that runs with another environment, in a process of its own.
#[test]
#[ignore = "run by the other tests"]
fn child() {
    match Checkpoint::open(&std::env::var("DUST_TEST_MODEL").unwrap()) {
        Ok(checkpoint) => {
            let tokens = checkpoint.tokenizer().unwrap().encode("hi", true).unwrap();
            println!("RESULT {} {tokens:?}", checkpoint.names().len());
        }
        Err(error) => println!("RESULT {error}"),
    }
}

fn open(endpoint: &str, home: &Path, token: &str, model: &str) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", home)
        .env("HF_TOKEN", token)
        .env("DUST_TEST_MODEL", model)
        .env("NO_PROXY", "127.0.0.1")
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, result) = text
        .split_once("RESULT ")
        .unwrap_or_else(|| panic!("{text}"));
    result.lines().next().unwrap().to_owned()
}

type Files = Arc<BTreeMap<String, Vec<u8>>>;

fn serve(files: Files) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let files = files.clone();
            std::thread::spawn(move || answer(&stream.unwrap(), &files));
        }
    });
    address
}

fn answer(mut stream: &TcpStream, files: &Files) {
    let mut lines = BufReader::new(stream).lines();
    let mut request = Vec::new();
    while let Some(Ok(line)) = lines
        .next()
        .filter(|l| !l.as_ref().is_ok_and(String::is_empty))
    {
        request.push(line);
    }
    let path = request[0].split(' ').nth(1).unwrap();
    let header = |name: &str| {
        request.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let allowed = header("authorization").is_some_and(|v| v == format!("Bearer {TOKEN}"));
    let listing = || {
        let siblings: Vec<_> = files
            .keys()
            .map(|f| serde_json::json!({"rfilename": f}))
            .collect();
        serde_json::json!({"siblings": siblings, "sha": COMMIT})
            .to_string()
            .into_bytes()
    };
    let body = if path == "/api/models/Org/Model/revision/main" {
        Some(listing())
    } else {
        let file = path.strip_prefix("/Org/Model/resolve/main/");
        file.and_then(|f| files.get(f)).cloned()
    };
    let (status, body) = match (allowed, body) {
        (false, _) => ("401 Unauthorized", Vec::new()),
        (true, None) => ("404 Not Found", Vec::new()),
        (true, Some(body)) => ("206 Partial Content", body),
    };
    // `bytes=0-0` asks for one byte, `bytes=N-` for the rest.
    let range = header("range").unwrap_or_else(|| "bytes=0-".to_owned());
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end
        .parse::<usize>()
        .map_or(body.len(), |e| (e + 1).min(body.len()));
    let part = &body[start.min(end)..end];
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{end}/{}\r\n\
         ETag: \"{path_tag}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        part.len(),
        body.len(),
        path_tag = path.replace('/', "-"),
    )
    .unwrap();
    stream.write_all(part).unwrap();
}

/// The tiny test model as a folder's files.
fn files() -> BTreeMap<String, Vec<u8>> {
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/tiny.gguf");
    let gguf = Checkpoint::open(gguf.to_str().unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("model");
    let texts = gguf.text_files().unwrap();
    let dtype = dust_train::checkpoint::Dtype::Bf16;
    dust_train::checkpoint::save(&folder, gguf.config(), dtype, &texts, |name| {
        Ok(gguf.tensor(name)?.data.into())
    })
    .unwrap();
    fs::read_dir(&folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn a_repository_is_fetched_with_the_token_and_then_found_in_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let endpoint = serve(Arc::new(files()));
    let first = open(&endpoint, home.path(), TOKEN, "Org/Model");
    assert!(first.starts_with("20 ["), "{first}");
    // No server there: the cache must do.
    let second = open("http://127.0.0.1:9", home.path(), "", "Org/Model");
    assert_eq!(first, second);
}

#[test]
fn a_hub_that_refuses_is_reported_in_one_line() {
    let home = tempfile::tempdir().unwrap();
    let mut files = files();
    files.remove("model.safetensors");
    let endpoint = serve(Arc::new(files));
    let missing = open(&endpoint, home.path(), TOKEN, "Org/Model");
    assert!(
        missing.contains("Org/Model: model.safetensors") && missing.contains("404"),
        "{missing}"
    );
    let unknown = open(&endpoint, home.path(), TOKEN, "Org/Other");
    assert!(
        unknown.contains("Org/Other: repository") && unknown.contains("404"),
        "{unknown}"
    );
    let closed = open(&endpoint, home.path(), "wrong", "Org/Model");
    assert!(
        closed.contains("401") && closed.contains("HF_TOKEN"),
        "{closed}"
    );
    let nobody = open("http://127.0.0.1:9", home.path(), TOKEN, "Org/Model");
    assert!(nobody.contains("HF_ENDPOINT"), "{nobody}");
}
