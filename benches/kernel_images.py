"""Checks that all ways to get the CUDA kernels load on this GPU and give the same bits.

    python -m benches.kernel_images --json FILE

The ways are the cubins of the package, those of a wheel, NVRTC with an empty cache, and that cache.
Each is used in a process of its own. `python -m tools.cubins build/cubins` makes a wheel's cubins;
it needs a network, so they must be there before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import paramstats
from benches import hardware, sanitizer_case
from benches.limited import ROOT
from paramstats._core import cubin_cache, images
from tests import fake_device

_WHEEL = ROOT / "build" / "cubins"


def ways(folder: Path) -> dict[str, Path]:
    """Return the ways and their folders of kernels, of which some are made in `folder`."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(images.FOLDER / "kernels.cu", source)
    # A dry run has no cubins of a wheel, and loads those of the package once more.
    wheel = images.FOLDER if fake_device.active() and not _WHEEL.exists() else _WHEEL
    return {"package": images.FOLDER, "wheel": wheel, "compiled": source, "cached": source}


def use(way: str, folder: Path) -> dict[str, Any]:
    """Read the tensors of benches.sanitizer_case with the kernels of a folder, in this process."""
    images.FOLDER = folder
    torch.cuda.init()
    begin = time.perf_counter()
    image = images.find(torch.cuda.get_device_capability(), wait=True)
    row: dict[str, Any] = {"way": way, "seconds": time.perf_counter() - begin}
    if isinstance(image, str):
        return {**row, "error": image}
    if image.origin.startswith("cubin") != (way in ("package", "wheel")):
        return {**row, "error": f"its kernels are {image.origin}"}
    tensors = {name: t.to("cuda") for name, t in sanitizer_case.tensors()}
    summary = paramstats.summarize(tensors)
    digest = hashlib.sha256(pickle.dumps(summary)).hexdigest()
    backend = paramstats.backend()
    if backend.cuda != "native":
        return {**row, "error": backend.cuda_missing}
    return {**row, "origin": image.origin, "bytes": len(image.data), "digest": digest}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.kernel_images", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--way", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(use(options.way[0], Path(options.way[1]))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, cubin_cache.VARIABLE: str(Path(name, "cache"))}
        for way, folder in ways(Path(name)).items():
            if not folder.exists():
                rows.append({"way": way, "skip": f"{folder} does not exist"})
            else:
                command = (sys.executable, "-m", __spec__.name, "--way", way, str(folder))
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                last = done.stdout.splitlines()[-1:] or ["{}"]
                failed = {"way": way, "error": done.stderr.strip()[-500:]}
                rows.append(json.loads(last[0]) if done.returncode == 0 else failed)
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    digests = {row["digest"] for row in rows if "digest" in row}
    same = len(digests) == 1
    print("all ways give the same bits" if same else f"FAILED: {len(digests)} different results")
    if options.json:
        report = {**hardware.describe("cuda"), "kernel_images": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if same and not any("error" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
