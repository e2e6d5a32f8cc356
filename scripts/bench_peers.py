#!/usr/bin/env python3
"""Measures dust-train beside llama.cpp and PyTorch on one model, in one run on this machine.

    python3 scripts/bench_peers.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf

Sets the peers up in .venv-peers first (llama.cpp is compiled for this CPU from the sources of
PyPI's llama-cpp-python, about 8 minutes on two cores; PyTorch and transformers are several GB). A
set-up that was cut off goes on where it stopped. Then, `--rounds` times in turn, so that slow
drifts of the machine hit all alike:

- llama.cpp, f16 and bf16 weights: prefill of 512 tokens (logits of the last only); decode of
  1, 8 and 16 sequences in parallel, each after 128 tokens of context, 32 steps, greedy;
- PyTorch + transformers, f32: prefill of 512; a training step (forward, cross-entropy, backward,
  AdamW) on 4 x 512 tokens;
- `dust-train bench --model MODEL --dtype f32|bf16 --json`, which prints {"prefill_512": tok/s,
  "decode_1": ..., "decode_8": ..., "decode_16": ..., "train_4x512": ...}. Its training step keeps
  f32 master weights and f32 arithmetic in both formats.

The medians and every single figure go to target/bench-peers.json, a Markdown table to the
screen. The ceilings (f32 multiply-add peak, memory reads) are measured in each round as well.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-peers"
PYTHON = VENV / "bin/python"
WORK = ROOT / "target/bench-peers"

LLAMA = "llama-cpp-python==0.3.36"
TORCH = ["torch==2.15.0", "transformers==5.24.0", "gguf==0.19.0", "accelerate"]
CONTEXT, DECODE_STEPS, PREFILL, TRAIN_SEQUENCES = 128, 32, 512, 4
OURS = ["dust-train f32", "dust-train bf16"]
LINES = ["prefill_512", "decode_1", "decode_8", "decode_16", "train_4x512"]


def say(text):
    print(f"[bench-peers] {text}", file=sys.stderr, flush=True)


def step(title, command, **kwargs):
    say(title)
    start = time.time()
    result = subprocess.run(command, stdout=sys.stderr, **kwargs)
    if result.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}: failed; run it alone to see why")
    say(f"  done in {time.time() - start:.0f} s")


def has(module):
    return subprocess.run(
        [PYTHON, "-c", f"import {module}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode == 0  # fmt: skip


def set_up(threads):
    """Every step looks first whether its result is there."""
    if not PYTHON.exists():
        step("creating .venv-peers", [sys.executable, "-m", "venv", VENV])
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not has("llama_cpp"):
        flags = {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(threads),
        }
        step(
            f"compiling llama.cpp ({LLAMA}), minutes",
            [*pip, "--no-binary", "llama-cpp-python", LLAMA],
            env=os.environ | flags,
        )
    if not (has("torch") and has("transformers") and has("gguf") and has("accelerate")):
        step("installing PyTorch and transformers, several GB", [*pip, *TORCH])
    WORK.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("bench_ceilings.c")
    step(
        "compiling the ceilings",
        ["gcc", "-O3", "-march=native", "-ffast-math", "-fopenmp", source, "-o", WORK / "ceilings"],
    )


# The peers. Each runs in a process of its own, under .venv-peers, and prints one JSON object.


def llama_convert(source, target, dtype):
    """llama.cpp's own converter, from whatever the source holds."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "bf16": 32}[dtype]
    params.allow_requantize = True
    partial = f"{target}.partial"
    if llama_cpp.llama_model_quantize(source.encode(), partial.encode(), params) != 0:
        sys.exit(f"{source}: llama.cpp cannot convert it to {dtype}")
    os.replace(partial, target)


def llama_bench(path, threads):
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_load_model_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)

    def context(sequences, length):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        return llama_cpp.llama_init_from_model(model, params)

    def decode(ctx, entries):
        """entries: (token, position, sequence, want logits)"""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, logits) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        if llama_cpp.llama_decode(ctx, batch) != 0:
            sys.exit(f"{path}: llama_decode failed on {len(entries)} tokens")
        llama_cpp.llama_synchronize(ctx)
        llama_cpp.llama_batch_free(batch)

    def token(i):
        return 100 + i * 7919 % (size - 200)

    out = {}
    ctx = context(1, PREFILL)
    prompt = [(token(i), i, 0, i == PREFILL - 1) for i in range(PREFILL)]
    for _ in range(2):  # the first pass warms up
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        start = time.perf_counter()
        decode(ctx, prompt)
        out["prefill_512"] = PREFILL / (time.perf_counter() - start)
    llama_cpp.llama_free(ctx)
    for n in (1, 8, 16):
        ctx = context(n, CONTEXT + DECODE_STEPS + 32)
        for s in range(n):
            decode(ctx, [(token(i + s), i, s, i == CONTEXT - 1) for i in range(CONTEXT)])
        # The next token does not change the work, so none is sampled: llama.cpp at its best.
        decode(ctx, [(token(s), CONTEXT, s, True) for s in range(n)])
        start = time.perf_counter()
        for t in range(1, DECODE_STEPS + 1):
            decode(ctx, [(token(s + t), CONTEXT + t, s, True) for s in range(n)])
        out[f"decode_{n}"] = n * DECODE_STEPS / (time.perf_counter() - start)
        llama_cpp.llama_free(ctx)
    return out


def torch_convert(source, target):
    import torch
    from transformers import AutoModelForCausalLM

    source = Path(source)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A model from a GGUF counts as quantised and will not be saved; a fresh one holding the same
    # weights does.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    partial = f"{target}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    os.replace(partial, target)


def torch_bench(path, threads):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.randint(100, model.config.vocab_size - 100, (TRAIN_SEQUENCES, PREFILL))
    out = {}
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            model(tokens[:1], logits_to_keep=1)
            out["prefill_512"] = PREFILL / (time.perf_counter() - start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(2):
        start = time.perf_counter()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out["train_4x512"] = tokens.numel() / (time.perf_counter() - start)
    return out


def run_json(command, threads, optional=False):
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
    if not optional:
        sys.exit(f"{shlex.join(map(str, command))}: {reason}")
    say(f"  no figures: {reason}")
    return {}


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def median(rounds, who, key):
    values = [r[who][key] for r in rounds if isinstance(r[who].get(key), (int, float))]
    return statistics.median(values) if values else None


def table(report):
    def number(x):
        return "-" if x is None else f"{x:.0f}"

    peers = [p for p in report["median"] if p != "ceilings" and p not in OURS]
    ceilings = report["median"]["ceilings"]
    rows = [
        f"{report['date']}, {report['cpu']}, {report['threads']} threads, "
        f"{Path(report['model']).name}, medians of {report['rounds']} rounds; "
        f"ceilings {number(ceilings['fma_gflops'])} GFLOP/s f32, {number(ceilings['read_gbs'])} GB/s",
        f"`{report['command']}`",
        "",
        f"| tokens/s | {' | '.join([*OURS, *peers])} | ours / best peer |",
        "|---" * (len(OURS) + len(peers) + 2) + "|",
    ]
    for line in LINES:
        ours, theirs = ([report["median"][who].get(line) for who in group] for group in (OURS, peers))
        own, best = (max((v for v in values if v), default=None) for values in (ours, theirs))
        ratio = f"{own / best:.2f}" if own and best else "-"
        rows.append(f"| {line} | {' | '.join(map(number, [*ours, *theirs]))} | {ratio} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--ours", default="target/release/dust-train", help="the binary to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", choices=["llama", "torch", "to-f16", "to-bf16", "to-torch"],
                        help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--target", help=argparse.SUPPRESS)
    args = parser.parse_args()

    # Inside a child, under .venv-peers.
    if args.peer in ("llama", "torch"):
        bench = llama_bench if args.peer == "llama" else torch_bench
        print(json.dumps(bench(args.model, args.threads)))
        return
    if args.peer == "to-torch":
        return torch_convert(args.model, args.target)
    if args.peer:
        return llama_convert(args.model, args.target, args.peer.removeprefix("to-"))

    model = Path(args.model).resolve()
    if not model.is_file():
        sys.exit(f"{args.model}: no such file; give --model a GGUF file")
    set_up(args.threads)
    child = [PYTHON, Path(__file__).resolve(), "--threads", str(args.threads)]
    converted = {
        "f16": WORK / f"{model.stem}.f16.gguf",
        "bf16": WORK / f"{model.stem}.bf16.gguf",
        "torch": WORK / f"{model.stem}.hf",
    }
    for kind, target in converted.items():
        if not target.exists():
            command = [*child, "--model", model, "--peer", f"to-{kind}", "--target", target]
            step(f"converting to {target.name}", command)

    commands = {
        "ceilings": [WORK / "ceilings"],
        **{who: [ROOT / args.ours, "bench", "--model", model, "--dtype", who.split()[1], "--json"] for who in OURS},
        "llama.cpp f16": [*child, "--model", converted["f16"], "--peer", "llama"],
        "llama.cpp bf16": [*child, "--model", converted["bf16"], "--peer", "llama"],
        "torch f32": [*child, "--model", converted["torch"], "--peer", "torch"],
    }
    rounds = []
    for i in range(args.rounds):
        figures = {}
        for who, command in commands.items():
            say(f"round {i + 1} of {args.rounds}: {who}")
            if who in OURS and not Path(command[0]).is_file():
                say(f"  no figures: {args.ours} is not built (cargo build --release)")
                figures[who] = {}
                continue
            figures[who] = run_json(command, args.threads, optional=who in OURS)
            shown = ", ".join(f"{k} {v}" if isinstance(v, str) else f"{k} {v:.1f}"
                              for k, v in figures[who].items() if isinstance(v, (str, int, float)))  # fmt: skip
            say(f"  {shown}")
        rounds.append(figures)

    report = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": args.threads,
        "model": str(args.model),
        "command": shlex.join(["python3", os.path.relpath(__file__), *sys.argv[1:]]),
        "rounds": args.rounds,
        "median": {
            who: {key: median(rounds, who, key) for key in
                  (["fma_gflops", "read_gbs"] if who == "ceilings" else LINES)}
            for who in commands
        },
        "all": rounds,
    }  # fmt: skip
    out = ROOT / "target/bench-peers.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    say(f"wrote {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
