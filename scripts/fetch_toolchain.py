#!/usr/bin/env python3
"""Fetches the CUDA compiler to .toolchain/: nvcc 13.0, and the ptxas of CUDA 12.0.

Both come as Python wheels from the package index (130 MB down, 320 MB on disk; nothing is put
elsewhere, no system toolkit and no GPU are needed). The old ptxas is what tests hold our PTX
against, so that it loads on drivers from CUDA 12.0 on. gcc must be on PATH, nvcc calls it.
Does nothing if .toolchain/ already holds these versions.
"""

import shutil
import subprocess
import sys
from pathlib import Path

# Pinned and without dependencies: the wheels' own requirements are loose, and the versions that
# pip would mix refuse each other.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvcc-cu12==12.0.140",
]
TARGET = Path(__file__).resolve().parent.parent / ".toolchain"
STAMP = TARGET / "stamp"


def main() -> int:
    wanted = "".join(f"{wheel}\n" for wheel in WHEELS)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        STAMP.touch()  # make compares times
        print(f"{TARGET.name}: already there")
        return 0
    if shutil.which("gcc") is None:
        print("gcc: not on PATH, and nvcc needs it (Debian: apt install gcc g++)", file=sys.stderr)
        return 1
    partial = TARGET.with_name(".toolchain.partial")
    shutil.rmtree(partial, ignore_errors=True)
    print("fetching nvcc 13.0 and the ptxas of 12.0 (130 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(partial), *WHEELS]
    if subprocess.run(command).returncode != 0:
        print(
            "pip could not fetch the compiler; check the network and that `python3 -m pip` works "
            "(Debian: apt install python3-pip). With a CUDA toolkit of your own, set CUDA_HOME.",
            file=sys.stderr,
        )
        return 1
    (partial / "stamp").write_text(wanted)
    if TARGET.is_symlink():
        TARGET.unlink()
    elif TARGET.exists():
        shutil.rmtree(TARGET)
    partial.rename(TARGET)
    print(f"{TARGET.name}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
