//! Model files against independent implementations (golden files made by
//! `scripts/make_format_goldens.py`), round trips, and damaged input.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use dust_train::checkpoint::{Checkpoint, Dtype, Error, GgmlType, Gguf, ModelConfig, save};
use dust_train::text::{ChatOptions, ChatTemplate, Message, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/formats")
        .join(name)
}

fn golden(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(data(name)).unwrap()).unwrap()
}

fn open(path: &Path) -> Result<Checkpoint, Error> {
    Checkpoint::open(path.to_str().unwrap())
}

fn unhex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    let byte = |i| u8::from_str_radix(&text[i..i + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

/// A model with random weights in a folder, and its weights.
fn write_model(folder: &Path, config: &Value, dtype: Dtype) -> ModelConfig {
    fs::create_dir_all(folder.with_extension("source")).unwrap();
    fs::write(
        folder.with_extension("source").join("config.json"),
        config.to_string(),
    )
    .unwrap();
    let config = ModelConfig::from_folder(&folder.with_extension("source")).unwrap();
    save(folder, &config, dtype, &[], |name| {
        Ok(Cow::Owned(weights(&config, name)))
    })
    .unwrap();
    config
}

/// Weights that bf16 holds exactly.
fn weights(config: &ModelConfig, name: &str) -> Vec<f32> {
    let tensors = config.expected_tensors();
    let (_, shape) = tensors.iter().find(|(n, _)| n == name).unwrap();
    let seed = name.bytes().map(usize::from).sum::<usize>();
    (0..shape.iter().product())
        .map(|i| ((i * 37 + seed) % 255) as f32 / 128.0 - 1.0)
        .collect()
}

fn tiny_hf(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "hidden_act": "silu", "tie_word_embeddings": model_type == "qwen3",
        "bos_token_id": 1, "eos_token_id": [2, 3]
    })
}

#[test]
fn blocks_are_decoded_as_the_reference_does_bit_for_bit() {
    let cases = golden("quants.json");
    for case in cases.as_array().unwrap() {
        let ty = GgmlType::from_id(case["type"].as_u64().unwrap() as u32).unwrap();
        let bytes = unhex(&case["bytes"]);
        let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
        ty.dequantize(&bytes, &mut out);
        let out: Vec<u8> = out.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(out, unhex(&case["values"]), "{ty:?}");
    }
    assert_eq!(cases.as_array().unwrap().len(), 10);
}

#[test]
fn gguf_tensors_have_hugging_face_names_and_layout() {
    let checkpoint = open(&data("tiny.gguf")).unwrap();
    let sums = &golden("tiny.json")["sums"];
    assert_eq!(checkpoint.names().len(), sums.as_object().unwrap().len());
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(&name).unwrap();
        assert_eq!(tensor.shape.iter().product::<usize>(), tensor.data.len());
        // Weights that depend on the position make the sum see every permutation.
        let sum: f64 = tensor
            .data
            .iter()
            .enumerate()
            .map(|(i, &x)| f64::from(x) * ((i + 1) % 1009) as f64)
            .sum();
        let expected = sums[&name].as_f64().unwrap();
        assert!((sum - expected).abs() < 1e-6, "{name}: {sum} {expected}");
    }
}

fn check_tokens(tokenizer: &Tokenizer, cases: &Value) {
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        for (name, special) in [("literal", false), ("special", true)] {
            let tokens = tokenizer.encode(text, special).unwrap();
            assert_eq!(json!(tokens), case[name], "{name} {text:?}");
            assert_eq!(tokenizer.decode(&tokens), text);
            let mut stream = tokenizer.stream();
            let mut shown: String = tokens.iter().map(|&t| stream.push(t)).collect();
            assert!(!shown.contains('\u{fffd}'), "{text:?}");
            shown += &stream.finish();
            assert_eq!(shown, text);
        }
    }
    assert!(cases.as_array().unwrap().len() > 15);
}

#[test]
fn gguf_tokenizer_gives_the_tokens_of_llama_cpp() {
    let checkpoint = open(&data("tiny.gguf")).unwrap();
    check_tokens(
        &checkpoint.tokenizer().unwrap(),
        &golden("tiny.json")["tokens"],
    );
}

/// The same with the whole vocabulary, that of the demo's model.
#[test]
fn smollm2_tokens_are_those_of_llama_cpp() {
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.gguf");
    assert!(
        model.exists(),
        "{}: no such file; `make model` fetches it",
        model.display()
    );
    let checkpoint = open(&model).unwrap();
    assert_eq!(checkpoint.config().hidden, 576);
    let tokenizer = checkpoint.tokenizer().unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.eos_ids(), [2]);
    check_tokens(&tokenizer, &golden("tokens.json"));
}

#[test]
fn a_stream_shows_broken_bytes_and_goes_on() {
    let tokenizer = open(&data("tiny.gguf")).unwrap().tokenizer().unwrap();
    // The byte-level letters of 0xF0 0x9F, the beginning of a character that never ends.
    let broken = [tokenizer.id("ð").unwrap(), tokenizer.id("Ł").unwrap()];
    let letter = tokenizer.id("a").unwrap();
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(broken[0]) + &stream.push(broken[1]), "");
    let text = stream.push(letter);
    assert!(
        text.starts_with('\u{fffd}') && text.ends_with('a'),
        "{text:?}"
    );
    assert_eq!(stream.push(broken[0]), "");
    assert_eq!(stream.finish(), "\u{fffd}");

    let mut stream = tokenizer.stream();
    let shown: usize = (0..100).map(|_| stream.push(broken[0]).len()).sum();
    assert!(
        shown > 0,
        "an endless run of broken bytes is held back for ever"
    );
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let golden = golden("chat.json");
    let tokenizer = open(&data("tiny.gguf")).unwrap().tokenizer().unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let source = golden["templates"][name].as_str().unwrap().to_owned();
        let template = ChatTemplate::new(Path::new(name), source, &tokenizer).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let options = ChatOptions {
            add_generation_prompt: case["prompt"].as_bool().unwrap(),
            enable_thinking: case["thinking"].as_bool(),
            ..ChatOptions::default()
        };
        assert_eq!(
            template.render(&messages, &options).unwrap(),
            case["text"],
            "{case}"
        );
    }
}

#[test]
fn templates_can_fail_loop_and_ask_for_the_date_in_one_line() {
    let tokenizer = open(&data("tiny.gguf")).unwrap().tokenizer().unwrap();
    let render = |source: &str| {
        let template = ChatTemplate::new(Path::new("t"), source.to_owned(), &tokenizer)?;
        let options = ChatOptions {
            now: std::time::UNIX_EPOCH,
            ..ChatOptions::default()
        };
        template.render(&[], &options)
    };
    assert_eq!(
        render("{{ strftime_now('%d %b %Y') }}").unwrap(),
        "01 Jan 1970"
    );
    assert_eq!(
        render("{{ bos_token }}{{ eos_token }}").unwrap(),
        "<|im_start|><|im_end|>"
    );
    let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    for (source, part) in [
        ("{{ raise_exception('no\nsystem') }}", "no system"),
        ("{% if %}", "chat_template"),
        ("{{ strftime_now('%!') }}", "chat_template"),
        (nested, "chat_template"),
    ] {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn rotary_frequencies_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    for case in golden("rope.json").as_array().unwrap() {
        fs::write(
            folder.path().join("config.json"),
            case["config"].to_string(),
        )
        .unwrap();
        let config = ModelConfig::from_folder(folder.path()).unwrap();
        let found = config.rope_frequencies();
        assert_eq!(
            found.attention_factor,
            case["attention_factor"].as_f64().unwrap()
        );
        for (x, y) in found
            .inverse
            .iter()
            .zip(case["inverse"].as_array().unwrap())
        {
            // The golden values were computed in f32.
            let y = y.as_f64().unwrap();
            assert!((x / y - 1.0).abs() < 2e-6, "{x} {y} {case}");
        }
        // The older way to write the same down, which is the one that we write.
        fs::write(
            folder.path().join("config.json"),
            config.to_hf("float32").to_string(),
        )
        .unwrap();
        assert_eq!(ModelConfig::from_folder(folder.path()).unwrap(), config);
    }
}

#[test]
fn folders_round_trip_in_every_architecture_and_type() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, tensors) in [("llama", 21), ("qwen2", 27), ("qwen3", 24)] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let folder = scratch.path().join("model");
            // The second time over the first: replacing works.
            let config = write_model(&folder, &tiny_hf(name), dtype);
            let checkpoint = open(&folder).unwrap();
            assert_eq!(*checkpoint.config(), config);
            assert_eq!(checkpoint.names().len(), tensors);
            for name in checkpoint.names() {
                assert_eq!(
                    checkpoint.tensor(&name).unwrap().data,
                    weights(&config, &name)
                );
            }
            assert_eq!(config.eos, [2, 3]);
            let left: Vec<_> = fs::read_dir(scratch.path()).unwrap().collect();
            assert_eq!(left.len(), 2, "{left:?}");
        }
    }
}

#[test]
fn a_gguf_model_becomes_a_folder_with_the_same_tensors_tokens_and_chat() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("model");
    let gguf = open(&data("tiny.gguf")).unwrap();
    let files = gguf.text_files().unwrap();
    save(&folder, gguf.config(), Dtype::F32, &files, |name| {
        Ok(Cow::Owned(gguf.tensor(name)?.data))
    })
    .unwrap();
    let copy = open(&folder).unwrap();
    assert_eq!(copy.config(), gguf.config());
    for name in gguf.names() {
        assert_eq!(copy.tensor(&name).unwrap(), gguf.tensor(&name).unwrap());
    }
    let (tokenizer, again) = (gguf.tokenizer().unwrap(), copy.tokenizer().unwrap());
    check_tokens(&again, &golden("tiny.json")["tokens"]);
    assert_eq!(again.eos_ids(), tokenizer.eos_ids());
    let talk = [Message::new(dust_train::text::Role::User, "hi")];
    let render = |checkpoint: &Checkpoint, tokenizer: &Tokenizer| {
        let template = checkpoint.chat_template(tokenizer).unwrap();
        assert!(!template.is_fallback());
        template.render(&talk, &ChatOptions::default()).unwrap()
    };
    assert_eq!(render(&gguf, &tokenizer), render(&copy, &again));

    // Without its template, the vocabulary still says ChatML; without a vocabulary, nothing does.
    fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
    assert!(copy.chat_template(&again).unwrap().is_fallback());
}

#[test]
fn a_failed_save_leaves_nothing_and_spares_what_was_there() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("model");
    let config = write_model(&folder, &tiny_hf("llama"), Dtype::F32);
    let before = fs::read(folder.join("model.safetensors")).unwrap();
    let short = |_: &str| Ok(Cow::Owned(vec![0.0]));
    let error = save(&folder, &config, Dtype::Bf16, &[], short).unwrap_err();
    assert!(
        error.to_string().contains("1 elements instead of 88"),
        "{error}"
    );
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), before);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2);

    let other = scratch.path().join("other");
    fs::create_dir(&other).unwrap();
    let error = save(&other, &config, Dtype::F32, &[], short).unwrap_err();
    assert!(error.to_string().contains("holds no model"), "{error}");
}

#[test]
fn what_is_not_supported_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    for (base, field, value) in [
        ("llama", "model_type", json!("mamba")),
        ("llama", "model_type", json!(3)),
        ("llama", "hidden_act", json!("gelu")),
        ("llama", "mlp_bias", json!(true)),
        ("llama", "attention_bias", json!(true)),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "quantization_config", json!({"bits": 4})),
        ("llama", "hidden_size", json!(-1)),
        ("llama", "vocab_size", json!(1u64 << 40)),
        ("llama", "rope_scaling", json!({"rope_type": "longrope"})),
        (
            "llama",
            "rope_scaling",
            json!({"type": "linear", "factor": 0}),
        ),
        (
            "llama",
            "rope_parameters",
            json!({"partial_rotary_factor": 0.5}),
        ),
        ("llama", "eos_token_id", json!("x")),
        (
            "qwen2",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
    ] {
        let mut config = tiny_hf(base);
        config[field] = value;
        fs::write(&path, config.to_string()).unwrap();
        let error = ModelConfig::from_folder(folder.path())
            .unwrap_err()
            .to_string();
        let spelled = field.replace("vocab_size", "vocabulary size");
        assert!(
            error.contains("config.json") && error.contains(&spelled),
            "{error}"
        );
        assert!(!error.contains('\n') && error.contains("; "), "{error}");
    }
    let mut config = tiny_hf("qwen2");
    config["use_sliding_window"] = json!(true);
    config["sliding_window"] = json!(32);
    config["max_window_layers"] = json!(2);
    fs::write(&path, config.to_string()).unwrap();
    ModelConfig::from_folder(folder.path()).expect("the window begins after the last layer");
    config["max_window_layers"] = json!(1);
    fs::write(&path, config.to_string()).unwrap();
    assert!(ModelConfig::from_folder(folder.path()).is_err());
    let mut config = tiny_hf("llama");
    config["num_key_value_heads"] = json!(0);
    fs::write(&path, config.to_string()).unwrap();
    assert!(ModelConfig::from_folder(folder.path()).is_err());
}

#[test]
fn damaged_folders_give_one_line() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("model");
    let weights = folder.join("model.safetensors");
    let message = || {
        let error = open(&folder).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    write_model(&folder, &tiny_hf("llama"), Dtype::F32);
    let bytes = fs::read(&weights).unwrap();

    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(message().contains("cut short"));
    fs::write(&weights, &bytes[..5]).unwrap();
    assert!(message().contains("only 5 bytes"));
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&weights, huge).unwrap();
    assert!(message().contains("do not fit"));

    let text = String::from_utf8_lossy(&bytes[8..2000]).into_owned();
    let swap = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = 8 + text.find(from).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&weights, changed).unwrap();
    };
    swap("model.norm.weight", "model.morn.weight");
    assert!(message().contains("model.norm.weight: the tensor is missing"));
    swap("\"shape\":[11,8]", "\"shape\":[8,11]");
    assert!(message().contains("shape [8, 11] instead of [11, 8]"));
    swap("\"dtype\":\"F32\"", "\"dtype\":\"I32\"");
    let error = open(&folder).and_then(|c| {
        c.names()
            .iter()
            .try_for_each(|name| c.tensor(name).map(drop))
    });
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("I32 is not supported")
    );
    fs::remove_file(&weights).unwrap();
    assert!(message().contains("cannot open"));

    let index = json!({"weight_map": {"model.norm.weight": "../secret"}});
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    assert!(message().contains("not a plain file name"));
    for nonsense in ["no/such/model", "/nonexistent", "../x", "a/b@", ""] {
        let error = Checkpoint::open(nonsense).unwrap_err().to_string();
        assert!(error.contains("Owner/Name"), "{error}");
    }
}

/// Reads everything there is to read.
fn read_all(path: &Path) {
    let Ok(checkpoint) = open(path) else { return };
    for name in checkpoint.names() {
        let _ = checkpoint.tensor(&name);
    }
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        let _ = checkpoint.chat_template(&tokenizer);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_gguf_never_panics(
        edits in prop::collection::vec((0usize..60_000, any::<u8>()), 0..6),
        header in prop::collection::vec((0usize..900, any::<u8>()), 0..3),
        length in 0usize..200_000,
    ) {
        let mut bytes = fs::read(data("tiny.gguf")).unwrap();
        for (at, byte) in edits.into_iter().chain(header) {
            bytes[at] = byte;
        }
        bytes.truncate(length);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        read_all(file.path());
    }

    #[test]
    fn damaged_safetensors_never_panic(
        edits in prop::collection::vec((0usize..2500, any::<u8>()), 0..4),
        length in 0usize..20_000,
    ) {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("model");
        write_model(&folder, &tiny_hf("qwen3"), Dtype::Bf16);
        let weights = folder.join("model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        bytes.truncate(length);
        fs::write(&weights, bytes).unwrap();
        read_all(&folder);
    }

    #[test]
    fn arbitrary_bytes_are_not_gguf(bytes in prop::collection::vec(any::<u8>(), 0..200), magic: bool) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let start: &[u8] = if magic { b"GGUF\x03\0\0\0" } else { b"" };
        fs::write(file.path(), [start, &bytes].concat()).unwrap();
        if let Ok(gguf) = Gguf::open(file.path()) {
            prop_assert!(ModelConfig::from_gguf(&gguf).is_err());
        }
    }
}
