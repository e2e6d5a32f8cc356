# make demo         DuST end to end on a real model, on the CPU (report in runs/demo/report.html)
# make test         everything that must hold; what continuous integration runs
# make test-cust    the part of it that needs cust, linked to the emulator as libcuda
# make test-long    the kernels under many more schedules, ten thousand programs (minutes)
# make fuzz         the fuzz targets, a minute each; needs cargo-fuzz
# make bench        the kernels' benchmarks (criterion)
# make bench-peers  beside llama.cpp and PyTorch, which it sets up itself
# make ptx          the kernels' PTX, as target/ptx/<operation>.<architecture>.ptx
# make toolchain    fetches the CUDA compiler to .toolchain/ (no GPU or system toolkit needed)
# make model        fetches the demo's model to models/
# make humaneval    fetches HumanEval to data/

MODEL := models/SmolLM2-135M-Instruct.gguf
HUMANEVAL := data/HumanEval.jsonl.gz
TOOLCHAIN := .toolchain/stamp

# A CUDA toolkit that is there already is what build.rs takes.
ifeq ($(strip $(DUST_NVCC)$(CUDA_HOME)$(shell command -v nvcc)),)
NVCC := $(TOOLCHAIN)
endif

# Register spills fail our builds; for users of the crate they are a warning.
test test-cust test-long ptx: export DUST_DENY_SPILLS = 1

.PHONY: demo test test-cust test-long fuzz bench bench-peers ptx toolchain model humaneval

# On the CPU: nothing of CUDA is built.
demo: $(MODEL)
	cargo build --release --package dust-train --no-default-features
	target/release/dust-train run --config configs/demo.toml --run runs/demo

# Always the pinned compiler: tests compare what it makes with figures that are committed.
test: export DUST_NVCC = $(CURDIR)/.toolchain/nvidia/cu13/bin/nvcc
test: $(MODEL) $(HUMANEVAL) $(TOOLCHAIN)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --package dust-kernels --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	cargo test --workspace
	$(MAKE) test-cust

# cust wants a CUDA installation at build time, and its program libcuda.so at its start.
test-cust: export DUST_NVCC = $(CURDIR)/.toolchain/nvidia/cu13/bin/nvcc
test-cust: export CUDA_LIBRARY_PATH = $(CURDIR)/target/emulated-cuda
test-cust: export LD_LIBRARY_PATH := $(CURDIR)/target/emulated-cuda/lib64$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
test-cust: $(TOOLCHAIN)
	cargo build --package cuda-emulator --lib
	mkdir -p target/emulated-cuda/lib64
	cp target/debug/libcuda_emulator.so target/emulated-cuda/lib64/libcuda.so
	cargo clippy --package dust-kernels --features cust --test cust -- -D warnings
	cargo test --package dust-kernels --features cust --test cust
	cargo test --package dust-kernels --features cust --doc cuda::cust

test-long: export DUST_LONG = 1
test-long: $(NVCC)
	cargo test --package dust-kernels --test 'cuda_*'
	cargo test --package dust-train --test sandbox_soak -- --ignored --nocapture

fuzz:
	cd bin/dust-train && for target in exec_request box_answer printed; do \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=60 || exit 1; done

bench: $(NVCC)
	cargo bench --package dust-kernels

bench-peers: $(MODEL)
	cargo build --release --package dust-train --no-default-features
	python3 scripts/bench_peers.py --model $(MODEL)

ptx: $(NVCC)
	cargo run --quiet --package dust-kernels --example ptx -- target/ptx

toolchain: $(TOOLCHAIN)

model: $(MODEL)

humaneval: $(HUMANEVAL)

$(TOOLCHAIN): scripts/fetch_toolchain.py
	python3 scripts/fetch_toolchain.py

$(MODEL):
	python3 scripts/fetch_model.py

$(HUMANEVAL):
	python3 scripts/fetch_humaneval.py
