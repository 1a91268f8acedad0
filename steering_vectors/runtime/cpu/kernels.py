"""The compiled kernels of this package: which of them this processor can run, and calling them with tensors.

Owns the border to C: pointers, sizes and their checks. They are compiled when the package is installed, where there is
a compiler; `load` is None where there is none, or where the processor is another, and everything works without them.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from steering_vectors.runtime.cpu.layouts import LANES, ordered, ordered_codes, ordered_scales
from steering_vectors.runtime.cpu.quantization import Quantized

logger = logging.getLogger(__name__)

NAMES = ("avx512_bf16", "avx2")  # the better one first
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"}
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
KINDS = {"int8": 1, "int4": 2}  # as products.hpp has them
LARGEST_HEAD = 512


class _Pass(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "queries", "length")),
        *((name, c_void_p) for name in ("cosines", "sines", "slots", "places", "mask")),
    ]


class _Attention(Structure):
    _fields_ = [
        ("given", _Pass),
        *((name, c_int64) for name in ("heads", "groups", "size", "columns")),
        *((name, c_float) for name in ("scaling", "epsilon")),
        *((name, c_void_p) for name in ("joined", "query_norm", "key_norm", "keys", "values", "out")),
    ]


class _Product(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "added", "out")),
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "kind")),
        ("scales", c_void_p),
    ]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("epsilon", c_float)]


class _Block(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("first", "second")),
        *((name, _Product) for name in ("joined", "output", "gate_up", "down")),
        ("attention", _Attention),
    ]


@cache
def load() -> Kernels | None:
    """The best kernels that this processor runs, loaded once; None if there are none."""
    for path in compiled():
        try:
            return Kernels(path)
        except OSError as error:  # compiled against another OpenMP than torch's
            logger.warning("the kernels in %s cannot be loaded: %s", path.name, error)
    return None


def compiled() -> list[Path]:
    """The libraries that were compiled and that this processor runs, the best first."""
    return [path for name in NAMES if _runs(name) and (path := _path(name)) is not None]


def _path(name: str) -> Path | None:
    places = (Path(__file__).with_name(name + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((place for place in places if place.exists()), None)


def _runs(name: str) -> bool:
    """Whether the processor has the instructions, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    needed = {"avx2", "fma"} if name == "avx2" else AVX512
    return needed <= flags


class Kernels:
    """Functions over contiguous tensors of one dtype, bfloat16 or float32, on a CPU."""

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: most calls take microseconds
        self.has_products = bool(library.has_products())
        self._norm = {dtype: getattr(library, f"norm_{suffix}") for dtype, suffix in SUFFIXES.items()}
        self._gated = {dtype: getattr(library, f"gated_{suffix}") for dtype, suffix in SUFFIXES.items()}
        unlocked = ctypes.CDLL(str(path))
        self._attend = {dtype: getattr(unlocked, f"attend_{suffix}") for dtype, suffix in SUFFIXES.items()}
        for norm, gated, attend in zip(self._norm.values(), self._gated.values(), self._attend.values(), strict=True):
            norm.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float]
            gated.argtypes = [c_void_p, c_void_p, c_int64, c_int64]
            attend.argtypes = [POINTER(_Attention)]
            norm.restype = gated.restype = attend.restype = None
        if self.has_products:
            self._product, self._attend_prompts = unlocked.product, unlocked.attend_prompts
            self._product.argtypes, self._product.restype = [POINTER(_Product)], None
            self._attend_prompts.argtypes, self._attend_prompts.restype = [POINTER(_Attention)], None
            self.block = unlocked.block
            self.block.argtypes = [POINTER(_Block), POINTER(_Pass), c_void_p, c_void_p, c_void_p]
            self.block.restype = None

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Root mean square normalisation of the last dimension."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._norm[x.dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, epsilon)
        return out

    def gated(self, both: torch.Tensor) -> torch.Tensor:
        """silu(g) · u of `[…, 2n]`, where g is the first half of the last dimension and u the second."""
        size = both.shape[-1] // 2
        out = both.new_empty((*both.shape[:-1], size))
        self._gated[both.dtype](both.data_ptr(), out.data_ptr(), out.numel() // size, size)
        return out

    def attend(
        self, heads: Heads, joined: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, given: Pass
    ) -> torch.Tensor:
        """Attention of new tokens over their row's slot, `[rows, queries, heads · size]`.

        `joined` `[rows, queries, (heads + 2 · groups) · size]` are queries, keys and values before their position is
        turned in. Keys and values go to the pass's columns of the cache `[slots, groups, columns, size]`. More than one
        query a row needs `takes_prompts`.
        """
        rows, queries = joined.shape[:2]
        out = joined.new_empty((rows, queries, heads.heads * heads.size))
        described = heads.described(keys, values)
        described.given, described.joined, described.out = given.described, joined.data_ptr(), out.data_ptr()
        if queries == 1:
            self._attend[joined.dtype](described)
        else:
            self._attend_prompts(described)
        return out

    def takes_prompts(self, heads: Heads, dtype: torch.dtype) -> bool:
        """Whether `attend` takes more than one query a row."""
        return self.has_products and dtype == torch.bfloat16 and heads.size % LANES == 0

    def packed(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
        """x Wᵀ + b for a bfloat16 weight `[outputs, inputs]`, which is copied; the number of inputs is even."""
        outputs, inputs = weight.shape
        return Product(self._product, ordered(weight), inputs, outputs, bias)

    def quantized(self, weight: Quantized, bias: torch.Tensor | None = None) -> Product:
        """x Wᵀ + b for a weight of 8 or 4 bits `[outputs, inputs]`, which is copied; the number of inputs is even."""
        outputs, inputs = weight.codes.shape
        codes, scales = ordered_codes(weight), ordered_scales(weight)
        return Product(self._product, codes, inputs, outputs, bias, KINDS[weight.kind], scales)


class Product:
    """A weight in the order in which the kernel reads it. One call at a time."""

    def __init__(
        self,
        function: Any,
        ordered: torch.Tensor,
        inputs: int,
        outputs: int,
        bias: torch.Tensor | None,
        kind: int = 0,
        scales: torch.Tensor | None = None,
    ) -> None:
        self._function, self._kept = function, (ordered, None if bias is None else bias.contiguous(), scales)
        ordered, bias, scales = self._kept
        self.given = _Product(
            weight=ordered.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            inputs=inputs,
            outputs=outputs,
            kind=kind,
            scales=None if scales is None else scales.data_ptr(),
        )

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        given = self.given
        out = x.new_empty((*x.shape[:-1], given.outputs))
        given.x, given.out, given.rows = x.data_ptr(), out.data_ptr(), x.numel() // given.inputs
        given.added = None if added is None else added.data_ptr()
        self._function(given)
        return out


class Pass:
    """What all blocks of one forward pass are given alike.

    `turn`: cosines and sines `[rows, queries, size]` that turn a token's position into its heads. `columns`
    `[rows, queries]` of `slots` `[rows, 1]`: where keys and values go. `mask` bool `[rows, 1, queries, length]`: the
    columns that a token sees, the new ones among them.
    """

    def __init__(
        self, turn: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, columns: torch.Tensor, mask: torch.Tensor
    ) -> None:
        cosines, sines = (one.contiguous() for one in turn)
        self._kept = cosines, sines, slots, columns, mask = cosines, sines, slots, columns, mask.contiguous()
        rows, queries = columns.shape
        pointers = (one.data_ptr() for one in self._kept)
        self.described = _Pass(rows, queries, mask.shape[-1], *pointers)


class WholeBlock:
    """A block of these norms (weight and epsilon), heads and products, whose output is computed in one call."""

    def __init__(
        self,
        kernels: Kernels,
        norms: Sequence[tuple[torch.Tensor, float]],
        heads: Heads,
        products: Sequence[Product],
    ) -> None:
        self._function, self._heads, self._kept = kernels.block, heads, (*norms, *products)
        first, second = (_Norm(weight.data_ptr(), epsilon) for weight, epsilon in norms)
        self._given = _Block(first, second, *(one.given for one in products))
        self._keys = self._values = torch.empty(0)

    def __call__(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        given: Pass,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[rows, queries, hidden]` to the same; the cache `[slots, groups, columns, size]` takes keys and values.
        `shift` `[rows, 1, hidden]` is added to the output, rounded as that is."""
        if keys is not self._keys or values is not self._values:
            self._keys, self._values = keys, values
            self._given.attention = self._heads.described(keys, values)
        out = torch.empty_like(hidden)
        shift_at = None if shift is None else shift.data_ptr()
        self._function(self._given, given.described, hidden.data_ptr(), shift_at, out.data_ptr())
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """One block's attention: `heads` of queries share `groups` of keys and values, each of `size` numbers; the weights
    of the norms of single heads, where the model has them, and their epsilon."""

    heads: int
    groups: int
    size: int
    scaling: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0

    def described(self, keys: torch.Tensor, values: torch.Tensor) -> _Attention:
        """All that is known before a pass."""
        return _Attention(
            heads=self.heads,
            groups=self.groups,
            size=self.size,
            columns=keys.shape[2],
            scaling=self.scaling,
            epsilon=self.epsilon,
            query_norm=None if self.query_norm is None else self.query_norm.data_ptr(),
            key_norm=None if self.key_norm is None else self.key_norm.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
