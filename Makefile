# make demo         DuST end to end on a real model, on the CPU (report in runs/demo/report.html)
# make test         everything that must hold; what continuous integration runs
# make test-long    ten thousand programs in the sandbox (minutes)
# make fuzz         the fuzz targets, a minute each; needs cargo-fuzz
# make bench        the kernels' benchmarks (criterion)
# make bench-peers  beside llama.cpp and PyTorch, which it sets up itself
# make model        fetches the demo's model to models/
# make humaneval    fetches HumanEval to data/

MODEL := models/SmolLM2-135M-Instruct.gguf
HUMANEVAL := data/HumanEval.jsonl.gz

.PHONY: demo test test-long fuzz bench bench-peers model humaneval

demo: $(MODEL)
	cargo build --release --package dust-train
	target/release/dust-train run --config configs/demo.toml --run runs/demo

test: $(MODEL) $(HUMANEVAL)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	cargo test --workspace

test-long:
	cargo test --package dust-train --test sandbox_soak -- --ignored --nocapture

fuzz:
	cd bin/dust-train && for target in exec_request box_answer printed; do \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=60 || exit 1; done

bench:
	cargo bench --package dust-kernels

bench-peers: $(MODEL)
	cargo build --release --package dust-train
	python3 scripts/bench_peers.py --model $(MODEL)

model: $(MODEL)

humaneval: $(HUMANEVAL)

$(MODEL):
	python3 scripts/fetch_model.py

$(HUMANEVAL):
	python3 scripts/fetch_humaneval.py
