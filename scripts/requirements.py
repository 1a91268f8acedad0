"""Write docker/requirements.txt: what the image installs, at the versions of constraints.txt, with the hashes of PyPI.

python scripts/requirements.py

torch and what only its wheels need are left out, since they come from an index that the builder of the image chooses.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docker" / "requirements.txt"
HEADER = """\
# What the image installs, with PyPI's hashes. Written by scripts/requirements.py: run `make requirements`, do not edit.
# torch and CUDA's libraries come from the index that the build argument TORCH_INDEX_URL names, so they are not here.
"""
OF_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")
COMPILE = (
    *("uv", "pip", "compile", "pyproject.toml", "--extra", "schema", "--extra", "postgres"),
    *("--constraint", "constraints.txt"),
    *("--python-version", "3.11", "--python-platform", "linux", "--default-index", "https://pypi.org/simple"),
    *("--generate-hashes", "--no-annotate", "--no-header", "--quiet"),
)


def main() -> None:
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv) if uv.exists() else "uv", *COMPILE[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    entries = re.findall(r"^\S+==(?:.|\n(?= ))*\n", done.stdout, re.MULTILINE)
    PAGE.write_text(HEADER + "".join(entry for entry in entries if not OF_TORCH.match(entry)), encoding="utf-8")


if __name__ == "__main__":
    main()
