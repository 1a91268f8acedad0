"""The CPU time of our float32 products, over plain weights and a GGUF file's codes, beside those of torch and oneDNN.

    python -m benchmarks.speed.grouped_products [--rows 1,4,16,256] [--shapes 576x3072,1536x576]

One thread. A pass multiplies by as many different weights as exceed the processor's caches, so that few rows read them
from memory. The figure is the shortest pass, because other programs can only make one longer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from rich.console import Console
from rich.table import Table

from steering_vectors.models.gguf_codes import CODE_TYPES, Codes
from steering_vectors.runtime.cpu.kernels import Kernels, load
from steering_vectors.runtime.cpu.packing import JoinedProduct, OneDnnProduct

TORCH, ONEDNN, FLOATS = "torch", "oneDNN", "float32"
BYTES = 2**27  # of the float32 weights of a pass


def main(
    rows: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,2,4,8,16,64,256",
    shapes: Annotated[str, typer.Option(help="Inputs and outputs, comma-separated.")] = "576x3072,1536x576",
    passes: Annotated[int, typer.Option(min=1, help="Passes; the shortest counts.")] = 12,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    torch.set_num_threads(1)
    kernels = load()
    if kernels is None:
        raise SystemExit("there are no kernels for this processor")
    counts, found = [int(part) for part in rows.split(",")], []
    for shape in shapes.split(","):
        inputs, outputs = (int(part) for part in shape.split("x"))
        weights = torch.randn(max(1, BYTES // (4 * inputs * outputs)), outputs, inputs)
        times: dict[str, list[float]] = {}
        for kind in (TORCH, ONEDNN, FLOATS, *CODE_TYPES):
            products = [product(kernels, one, kind) for one in weights]
            times[kind] = [microseconds(products, torch.randn(count, inputs), passes) for count in counts]
        found += [
            {"shape": shape, "rows": count, **{kind: round(one[place], 1) for kind, one in times.items()}}
            for place, count in enumerate(counts)
        ]
    _show(found)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def product(kernels: Kernels, weight: torch.Tensor, kind: str) -> Callable[[torch.Tensor], Any]:
    if kind == TORCH:
        return JoinedProduct(weight, None)
    if kind == ONEDNN:
        return OneDnnProduct(weight, None)
    if kind == FLOATS:
        return kernels.grouped(weight)
    return kernels.grouped(Codes(kind, torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[kind]))))


def microseconds(products: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor, passes: int) -> float:
    """CPU time of a product in the shortest pass over all, after one that warms up."""
    spent = []
    for _ in range(passes + 1):
        began = time.process_time()
        for product in products:
            product(x)
        spent.append(time.process_time() - began)
    return 1e6 * min(spent[1:]) / len(products)


def _show(found: list[dict[str, Any]]) -> None:
    table = Table("inputs x outputs", "rows", f"{TORCH}, us", ONEDNN, FLOATS, *CODE_TYPES)
    for one in found:
        cells = (f"{one[kind]:,.0f} ({one[kind] / one[TORCH]:.2f})" for kind in (ONEDNN, FLOATS, *CODE_TYPES))
        table.add_row(one["shape"], str(one["rows"]), f"{one[TORCH]:,.0f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
