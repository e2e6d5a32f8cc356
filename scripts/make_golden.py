#!/usr/bin/env python3
"""Makes the golden files that hold dust-train against PyTorch and transformers.

    python3 -m venv .venv && .venv/bin/pip install --no-deps -r scripts/requirements-golden.txt
    .venv/bin/python scripts/make_golden.py

Each folder under bin/dust-train/tests/golden/ is a tiny random checkpoint in the Hugging Face
layout with the numbers that a right implementation must reproduce (golden.json,
golden.safetensors; the schema is in the README there). transformers builds the model and runs it
in float64. Three of its parts compute in float32 whatever the weights' type: the RMS norm, the
rotary angles and the eager softmax. The first two are replaced here by the same formulas in
float64, and attention goes through scaled_dot_product_attention, which keeps float64. A finite
difference of the GRPO loss along a random direction proves that nothing else rounds.

Training check: one prompt, three answers, each sequence is prompt + answer; only answer tokens
count. For an answer token with log-probability lp (temperature 1), its recorded log-probability
lp_old, the reference's lp_ref and its answer's advantage A:

    r         = exp(lp - lp_old)
    surrogate = min(r A, clip(r, 1 - lo, 1 + hi) A)            lo = 0.2, hi = 0.28
    surrogate = max(surrogate, c A)  when A < 0                c = 3.0 (dual clip)
    kl3       = exp(lp_ref - lp) - (lp_ref - lp) - 1
    loss      = -sum(surrogate - beta kl3) / (number of answer tokens in the mini-batch)
                                                               beta = 0.05

AdamW, step t = 1, 2, moments from zero, with g the loss gradient at the current parameters:

    g  = g min(1, max_norm / |g|)     |g| over all parameters together, max_norm = 1.0
    m  = b1 m + (1 - b1) g            b1 = 0.9
    v  = b2 v + (1 - b2) g^2          b2 = 0.95
    p  = p - lr wd p                  lr = 1e-3, wd = 0.1 for matrices, 0 for norms and biases
    p  = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)          eps = 1e-8
"""

import argparse
import copy
import json
import math
import shutil
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "bin/dust-train/tests/golden"

VOCAB = 149  # prime: no tile divides it
SEQUENCE_LENGTHS = (7, 37)
GREEDY_TOKENS = 16
PROMPT_LENGTH = 11
ANSWER_LENGTHS = (5, 14, 9)
ADVANTAGES = (1.25, -0.375, -0.875)
LOSS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "kl_beta": 0.05}
ADAMW = {
    "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0,
}  # fmt: skip

SHARED = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "intermediate_size": 50, "hidden_act": "silu",
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0, "use_cache": True,
}  # fmt: skip
LLAMA = SHARED | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48,
    "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
QWEN2 = SHARED | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 48,
    "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32,
    "max_window_layers": 2,
}  # fmt: skip
QWEN3 = SHARED | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
    "attention_bias": False, "rope_theta": 1000000.0, "use_sliding_window": False,
    "sliding_window": None, "max_window_layers": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# name -> config, dtype of the stored weights, options. The config files are in the form of the
# published checkpoints (rope_theta, rope_scaling, torch_dtype); "modern" ones are in the form
# that transformers 5 writes (rope_parameters, dtype). A loader meets both.
MODELS = {
    "llama-tied": (LLAMA | {"tie_word_embeddings": True}, "float32", {}),
    "llama-untied": (LLAMA | {"tie_word_embeddings": False}, "float16", {}),
    "llama3-rope": (
        LLAMA | {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE}, "bfloat16", {},
    ),
    "qwen2-tied": (QWEN2 | {"tie_word_embeddings": True}, "bfloat16", {"params": True}),
    "qwen2-untied": (QWEN2 | {"tie_word_embeddings": False}, "bfloat16", {"modern": True}),
    "qwen3-tied": (QWEN3 | {"tie_word_embeddings": True}, "bfloat16", {"modern": True}),
    "qwen3-untied": (
        QWEN3 | {"tie_word_embeddings": False}, "bfloat16", {"params": True, "shard": "30KB"},
    ),
    "qwen3-yarn": (
        QWEN3 | {"tie_word_embeddings": True, "rope_theta": 10000.0, "rope_scaling": YARN_ROPE},
        "bfloat16", {},
    ),
}  # fmt: skip


def random_parameters(model, generator):
    """Fills every parameter in name order, independent of transformers' own initialisation.

    Norm weights and biases are far from 1 and 0, so that one left out shows. Values are exact in
    float32, float16 and bfloat16 at once: the storage type then changes no number.
    """
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                x = 1.0 + 0.3 * x
            elif p.dim() == 1:
                x = 0.5 * x
            elif "embed_tokens" in name or "lm_head" in name:
                x = 0.25 * x
            else:
                x = x / math.sqrt(p.shape[1])
            p.copy_(x.bfloat16().half())


def inverse_frequencies(config):
    """Rotary frequencies in float64 and the factor on cos and sin."""
    rope = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = rope["rope_theta"]
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = rope["rope_type"]
    if kind == "default":
        return plain, 1.0
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    if kind == "llama3":
        # Whole turns within the original context decide: many are kept, few are stretched,
        # those between are blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * plain / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":

        def pair_with_turns(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_with_turns(rope.get("beta_fast") or 32)), 0)
        high = min(math.ceil(pair_with_turns(rope.get("beta_slow") or 1)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return plain * (keep + (1 - keep) / factor), 0.1 * math.log(factor) + 1.0
    raise ValueError(f"rope_type {kind}: no float64 formula here")


def rotary_forward(rotary, x, position_ids):
    angles = position_ids[..., None].double() * rotary.frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * rotary.scale, angles.sin() * rotary.scale


def norm_forward(norm, x):
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return norm.weight * x * torch.rsqrt(mean_square + norm.variance_epsilon)


def to_float64(model):
    """The same model with every operation in float64."""
    model = copy.deepcopy(model).double()
    rotary = model.model.rotary_emb
    rotary.frequencies, rotary.scale = inverse_frequencies(model.config)
    torch.testing.assert_close(rotary.frequencies.float(), rotary.original_inv_freq.float())
    assert math.isclose(rotary.scale, rotary.attention_scaling, rel_tol=1e-9)
    # Bound methods, so that a deep copy of the model binds them to its own modules.
    rotary.forward = types.MethodType(rotary_forward, rotary)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm_forward, module)
    return model


def logits_of(model, tokens):
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def score(model, tokens):
    """Logits; log p(token t+1 | tokens <= t); entropy of that same distribution."""
    with torch.no_grad():
        logits = logits_of(model, tokens)
    log_p = logits[:-1].log_softmax(-1)
    logprobs = log_p.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return logits, logprobs, -(log_p.exp() * log_p).sum(-1)


def greedy(model, tokens):
    """The continuation and the smallest lead of a winner over the second."""
    tokens, margin = list(tokens), math.inf
    start = len(tokens)
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            best, second = logits_of(model, tokens)[-1].topk(2).values.tolist()
            margin = min(margin, best - second)
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[start:], margin


def answer_logprobs(model, batch):
    """Per answer, the log-probabilities of its tokens."""
    out = []
    for answer in batch["answers"]:
        log_p = logits_of(model, batch["prompt"] + answer)[:-1].log_softmax(-1)
        log_p = log_p[len(batch["prompt"]) - 1 :]
        out.append(log_p.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return out


def grpo_loss(model, batch):
    """The loss of the head of this file, and what it is made of."""
    lo, hi = 1 - LOSS["clip_low"], 1 + LOSS["clip_high"]
    total, kl_total, count, clipped = 0.0, 0.0, 0, {"low": 0, "high": 0, "dual": 0}
    logprobs = answer_logprobs(model, batch)
    for lp, old, ref, advantage in zip(
        logprobs, batch["old_logprobs"], batch["ref_logprobs"], batch["advantages"]
    ):
        ratio = (lp - torch.tensor(old, dtype=lp.dtype)).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(lo, hi) * advantage)
        if advantage < 0:
            surrogate = surrogate.clamp(min=LOSS["dual_clip"] * advantage)
            clipped["low"] += int((ratio < lo).sum())
            clipped["dual"] += int((ratio > LOSS["dual_clip"]).sum())
        else:
            clipped["high"] += int((ratio > hi).sum())
        gap = torch.tensor(ref, dtype=lp.dtype) - lp
        kl = gap.exp() - gap - 1
        total = total + (surrogate - LOSS["kl_beta"] * kl).sum()
        kl_total = kl_total + kl.sum()
        count += len(lp)
    return -total / count, {
        "kl_mean": float(kl_total.detach() / count),
        "num_tokens": count,
        "clipped_tokens": clipped,
        "logprobs": [lp.tolist() for lp in logprobs],
    }


def make_batch(model, generator):
    """Prompt, answers, and log-probabilities off by enough that each clip rule is hit."""

    def draw(n):
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    batch = {
        "prompt": draw(PROMPT_LENGTH),
        "answers": [draw(n) for n in ANSWER_LENGTHS],
        "advantages": list(ADVANTAGES),
    }
    with torch.no_grad():
        logprobs = answer_logprobs(model, batch)
    batch["old_logprobs"], batch["ref_logprobs"] = [], []
    edges = torch.tensor([1 - LOSS["clip_low"], 1 + LOSS["clip_high"], LOSS["dual_clip"]]).double()
    for lp in logprobs:
        gap = 0.25 * torch.randn(len(lp), generator=generator, dtype=torch.float64)
        gap[1::4] += 1.4  # ratio about 4: beyond the dual clip
        # A ratio on an edge would make the gradient's branch a matter of rounding.
        near = (gap[:, None] - edges.log()).abs().amin(1) < 0.01
        gap[near] += 0.03
        off = 0.3 * torch.randn(len(lp), generator=generator, dtype=torch.float64)
        batch["old_logprobs"].append((lp - gap).float().tolist())
        batch["ref_logprobs"].append((lp + off).float().tolist())
    return batch


def gradients(model, batch):
    model.zero_grad()
    loss, parts = grpo_loss(model, batch)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values()))
    return float(loss.detach()), parts, grads, norm


def adamw_step(model, grads, norm, state, step):
    b1, b2 = ADAMW["beta1"], ADAMW["beta2"]
    scale = min(1.0, ADAMW["max_norm"] / norm)
    with torch.no_grad():
        for name, p in model.named_parameters():
            g = grads[name] * scale
            m, v = state.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            state[name] = (m, v)
            if p.dim() > 1:
                p -= ADAMW["lr"] * ADAMW["weight_decay"] * p
            denominator = (v / (1 - b2**step)).sqrt() + ADAMW["eps"]
            p -= ADAMW["lr"] * (m / (1 - b1**step)) / denominator


def check_against_torch_adamw(model, grads, norm, stepped):
    """Our two-line AdamW is PyTorch's."""
    model = copy.deepcopy(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": ADAMW["weight_decay"]}, {"params": plain}],
        lr=ADAMW["lr"], betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"], weight_decay=0.0,
    )  # fmt: skip
    for name, p in model.named_parameters():
        p.grad = grads[name] * min(1.0, ADAMW["max_norm"] / norm)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, stepped[name], rtol=1e-12, atol=1e-14)


def check_finite_difference(model, batch, grads, generator):
    """Central difference of the loss along a random direction, fourth order."""
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in sorted(model.named_parameters())
    }
    expected = sum(float((grads[n] * d).sum()) for n, d in direction.items())

    def at(h):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += h * direction[name]
            return float(grpo_loss(moved, batch)[0])

    h = 1e-5
    got = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    error = abs(got - expected) / abs(expected)
    assert error < 1e-7, f"finite difference {got} against gradient {expected}"
    return error


def train(model, batch, check=None):
    """Two AdamW steps on the same mini-batch, with everything worth comparing."""
    model, state = copy.deepcopy(model), {}
    out = {"losses": [], "grad_norms": [], "params": []}
    for step in (1, 2):
        loss, parts, grads, norm = gradients(model, batch)
        before = copy.deepcopy(model) if check and step == 1 else None
        adamw_step(model, grads, norm, state, step)
        out["losses"].append(loss)
        out["grad_norms"].append(norm)
        out["params"].append({n: p.detach().clone() for n, p in model.named_parameters()})
        if step == 1:
            out["parts"], out["grads"] = parts, grads
            if check:
                check_against_torch_adamw(before, grads, norm, out["params"][0])
    with torch.no_grad():
        out["losses"].append(float(grpo_loss(model, batch)[0]))
    return out


def worst(a, b):
    return float((a.double() - b.double()).abs().max())


def float32_errors(model, sequences, scored, batch, trained):
    """How far transformers itself is from the golden numbers in float32: the yardstick."""
    errors = {"logits": 0.0, "logprobs": 0.0, "entropy": 0.0}
    for tokens, golden in zip(sequences, scored):
        for key, x, y in zip(errors, score(model, tokens), golden):
            errors[key] = max(errors[key], worst(x, y))
    other = train(model, batch)
    errors["loss"] = abs(other["losses"][0] - trained["losses"][0])
    errors["grad_relative"] = max(
        worst(other["grads"][n], g) / float(g.abs().max()) for n, g in trained["grads"].items()
    )
    for step in (0, 1):
        gaps = torch.cat([
            (other["params"][step][n].double() - p).abs().flatten()
            for n, p in trained["params"][step].items()
        ])  # fmt: skip
        errors[f"step{step + 1}"] = float(gaps.max())
        errors[f"step{step + 1}_share_over_1e-5"] = float((gaps > 1e-5).double().mean())
    return errors


def as_stored(config, dtype, modern):
    """The config file's content, in the published or in transformers 5's form."""
    config = config | {"torch_dtype": dtype}
    if modern:
        config["dtype"] = config.pop("torch_dtype")
        rope = {"rope_type": "default"} | config.pop("rope_scaling", {})
        config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    return config


def write_checkpoint(folder, model, config, dtype, shard):
    shutil.rmtree(folder, ignore_errors=True)
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    stored.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(name, index):
    config, dtype, options = MODELS[name]
    config = as_stored(config, dtype, options.get("modern", False))
    generator = torch.Generator().manual_seed(1000 + index)
    folder = GOLDEN / name

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    random_parameters(model, generator)
    write_checkpoint(folder, model, config, dtype, options.get("shard", "1GB"))
    # What is on the disk is what is measured.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    exact = to_float64(model)

    sequences = []
    for length in SEQUENCE_LENGTHS:
        # Greedy tokens must not hang on rounding: draw again where two logits nearly tie.
        while True:
            tokens = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            continuation, margin = greedy(exact, tokens)
            if margin > 0.01:
                break
        sequences.append((tokens, continuation, margin))
    scored = [score(exact, tokens) for tokens, _, _ in sequences]

    batch = make_batch(exact, generator)
    trained = train(exact, batch, check=True)
    parts = trained["parts"]
    assert all(parts["clipped_tokens"].values()), f"a clip rule is idle: {parts}"
    difference = check_finite_difference(exact, batch, trained["grads"], generator)
    errors = float32_errors(model, [s[0] for s in sequences], scored, batch, trained)

    golden = {
        "sequences": [
            {
                "tokens": tokens, "logprobs": logprobs.tolist(), "entropy": entropy.tolist(),
                "greedy": continuation, "greedy_margin": margin,
            }
            for (tokens, continuation, margin), (_, logprobs, entropy) in zip(sequences, scored)
        ],
        "grpo": batch | LOSS | parts | {
            "loss": trained["losses"][0], "grad_norm": trained["grad_norms"][0],
        },
        "adamw": ADAMW | {"losses": trained["losses"], "grad_norms": trained["grad_norms"]},
        "float32_error": errors,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")

    tensors = {f"logits.{i}": logits for i, (logits, _, _) in enumerate(scored)}
    tensors |= {f"grad.{n}": g for n, g in trained["grads"].items()}
    if options.get("params"):
        for step in (0, 1):
            tensors |= {f"step{step + 1}.{n}": p for n, p in trained["params"][step].items()}
    save_file(
        {n: t.detach().float().contiguous() for n, t in tensors.items()},
        folder / "golden.safetensors",
    )
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"| {name} | {dtype} | {size // 1000} | {errors['logits']:.1e} | {errors['logprobs']:.1e} "
        f"| {errors['entropy']:.1e} | {errors['loss']:.1e} | {errors['grad_relative']:.1e} "
        f"| {errors['step1']:.1e} ({errors['step1_share_over_1e-5']:.2%}) | {difference:.0e} "
        f"| {min(s[2] for s in sequences):.2f} | {parts['clipped_tokens']} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    names = parser.parse_args().names or list(MODELS)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # one order of summation: the same files on every machine
    print(
        "| model | weights | kB | logits | logprobs | entropy | loss | grad (relative) "
        "| step 1 (share > 1e-5) | finite difference | greedy margin | clipped |"
    )
    print("|---" * 12 + "|")
    for name in names:
        make(name, list(MODELS).index(name))


if __name__ == "__main__":
    main()
