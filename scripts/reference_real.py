#!/usr/bin/env python3
"""Scores and continues text with transformers on a real GGUF model, to hold dust-train against.

    .venv/bin/python scripts/reference_real.py score MODEL.gguf --input texts.jsonl --output ref.jsonl
    .venv/bin/python scripts/reference_real.py golden MODEL.gguf
    .venv/bin/python scripts/reference_real.py compare ref.jsonl ours.jsonl

`score` reads and writes the JSON lines of `dust-train score`: {"id", "text"} or {"id", "tokens"}
in, {"id", "tokens", "logprobs", "entropy"} out. A line with "messages" (a chat) or "greedy": N is
continued by N greedy tokens, written as "greedy". Without --input it takes the built-in texts and
five chat prompts. `golden` writes bin/dust-train/tests/golden/smollm2.json. `compare` prints the
largest and mean absolute difference and the first greedy token that differs.

The weights are dequantised by transformers' own GGUF loader and everything runs in float32.
"""

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "bin/dust-train/tests/golden/smollm2.json"

TEXTS = {
    "prose": "The river had risen in the night, and by morning the lower fields lay under a sheet "
    "of brown water. Nobody in the village was surprised. They moved the sheep to the hill, "
    "counted them twice, and sat down to wait until the rain from the mountains had passed.",
    "code": 'def count_vowels(text):\n    """Return how many vowels the text has."""\n'
    "    total = 0\n    for letter in text.lower():\n        if letter in 'aeiou':\n"
    "            total += 1\n    return total\n\nprint(count_vowels('Benchmark 2024'))\n",
    "mixed": "Größe: 12,5 µm — naïve café №7; 3.14159 × 2 = 6.28318. 你好,世界! "
    "See https://example.org/a?b=1&c=2 (v1.0.3-rc1), don't we'll it's I'M\t\ttabs\n\n\nlines 🙂",
}
CHATS = {
    "capital": "What is the capital of France?",
    "is_even": "Write a Python function is_even(n) that returns True if n is even.",
    "reverse": "Write a Python function reverse_string(s) that returns s reversed.",
    "water": "Explain in two sentences why ice floats on water.",
    "list": "List three uses of a rope.",
}


def load(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path}: no such file; give the path of a GGUF model")
    folder, file = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), tokenizer


def tokens_of(line, tokenizer):
    if "tokens" in line:
        return line["tokens"]
    if "messages" in line:
        return tokenizer.apply_chat_template(
            line["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer(line["text"], add_special_tokens=False).input_ids


def score(model, tokens):
    import torch

    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    chosen = log_p.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return chosen.tolist(), (-(log_p.exp() * log_p).sum(-1)).tolist()


def greedy(model, tokens, count):
    """The continuation, and the smallest lead of a winner's logit over the second's."""
    import torch

    out, margin, cache, feed = [], math.inf, None, tokens
    with torch.no_grad():
        for _ in range(count):
            step = model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            top = step.logits[0, -1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            out.append(int(top.indices[0]))
            feed = out[-1:]
    return out, margin


def builtin_lines(greedy_tokens):
    lines = [{"id": name, "text": text} for name, text in TEXTS.items()]
    for name, question in CHATS.items():
        messages = [{"role": "user", "content": question}]
        lines.append({"id": name, "messages": messages, "greedy": greedy_tokens})
    return lines


def answer(model, tokenizer, line):
    tokens = tokens_of(line, tokenizer)
    logprobs, entropy = score(model, tokens)
    out = {"id": line.get("id"), "tokens": tokens, "logprobs": logprobs, "entropy": entropy}
    if "greedy" in line:
        out["greedy"], out["greedy_margin"] = greedy(model, tokens, line["greedy"])
    return out


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def run_score(args):
    lines = read_lines(args.input) if args.input else builtin_lines(args.greedy)
    model, tokenizer = load(args.model)
    with open(args.output, "w", encoding="utf-8") if args.output else sys.stdout as file:
        for line in lines:
            print(json.dumps(answer(model, tokenizer, line)), file=file, flush=True)


def run_golden(args):
    model, tokenizer = load(args.model)
    lines = builtin_lines(32)
    texts, chats = lines[: len(TEXTS)], lines[len(TEXTS) :][:3]
    golden = {
        "texts": [{"text": line["text"]} | answer(model, tokenizer, line) for line in texts],
        "chats": [
            {"messages": line["messages"]} | answer(model, tokenizer, line) for line in chats
        ],
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN.relative_to(ROOT)}")


def run_compare(args):
    left, right = ({line["id"]: line for line in read_lines(p)} for p in (args.left, args.right))
    shared = [key for key in left if key in right]
    if not shared:
        sys.exit(f"{args.right}: no id in common with {args.left}")
    failed = False
    for field in ("logprobs", "entropy"):
        gaps = []
        for key in shared:
            a, b = left[key], right[key]
            if a["tokens"] != b["tokens"]:
                first = next(
                    (i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y),
                    min(len(a["tokens"]), len(b["tokens"])),
                )
                print(f"{key}: tokens differ from position {first}")
                failed = True
                continue
            gaps += [abs(x - y) for x, y in zip(a[field], b[field], strict=True)]
        if gaps:
            print(f"{field}: max {max(gaps):.2e}, mean {sum(gaps) / len(gaps):.2e}, n {len(gaps)}")
    for key in shared:
        a, b = left[key].get("greedy"), right[key].get("greedy")
        if a and b:
            first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            same = f"equal over {min(len(a), len(b))} tokens"
            print(f"{key}: greedy {same if first is None else f'differs at token {first}'}")
    sys.exit(1 if failed else 0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("score", help="log-probabilities, entropies, greedy tokens")
    command.add_argument("model")
    command.add_argument("--input", help="JSON lines; default: the built-in texts and chats")
    command.add_argument("--output", help="default: standard output")
    command.add_argument("--greedy", type=int, default=64, help="tokens per built-in chat")
    command.set_defaults(run=run_score)
    command = commands.add_parser("golden", help="write the committed golden file")
    command.add_argument("model")
    command.set_defaults(run=run_golden)
    command = commands.add_parser("compare", help="compare two files of scores")
    command.add_argument("left")
    command.add_argument("right")
    command.set_defaults(run=run_compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
