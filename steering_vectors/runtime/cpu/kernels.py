"""The compiled kernels of this package: which of them this processor can run, and calls into C with tensors.

They are compiled when the package is installed, if there is a compiler. Everything works without them.
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

from steering_vectors.models.gguf_codes import GROUP, OUTPUTS, Codes
from steering_vectors.runtime.cpu.quantization import Quantized

logger = logging.getLogger(__name__)

NAMES = ("avx512_bf16", "avx2")  # fastest first
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"}
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
KINDS = {"int8": 1, "int4": 2}  # as in products.hpp
CODE_KINDS = {"Q8_0": 0, "Q4_0": 1, "Q4_1": 2}  # as in grouped.cpp
FLOATS = 3
MAX_HEAD_SIZE = 512
LANES = 16  # outputs in a block of weights; the last block is padded with zeros


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


class _GroupedProduct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "added", "out")),
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "kind")),
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
    """The fastest kernels that this processor can run, loaded once; None if there are none."""
    for path in compiled():
        try:
            return Kernels(path)
        except OSError as error:  # compiled against another OpenMP than torch's
            logger.warning("the kernels in %s cannot be loaded: %s", path.name, error)
    return None


def compiled() -> list[Path]:
    """The compiled libraries that this processor can run, fastest first."""
    paths = (Path(__file__).with_name(name + end) for name in NAMES if _runs(name) for end in EXTENSION_SUFFIXES)
    return [path for path in paths if path.exists()]


def _runs(name: str) -> bool:
    """Whether the processor has the instructions, by /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    needed = {"avx2", "fma"} if name == "avx2" else AVX512
    return needed <= flags


class Kernels:
    """Functions of contiguous CPU tensors of one dtype, bfloat16 or float32."""

    def __init__(self, path: Path) -> None:
        library = ctypes.PyDLL(str(path))  # keeps the GIL: most calls take microseconds
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
        self._grouped_product = unlocked.grouped_product
        self._grouped_product.argtypes, self._grouped_product.restype = [POINTER(_GroupedProduct)], None
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
        """silu(g) · u for `[…, 2n]`, where g is the first half of the last dimension and u the second."""
        size = both.shape[-1] // 2
        out = both.new_empty((*both.shape[:-1], size))
        self._gated[both.dtype](both.data_ptr(), out.data_ptr(), out.numel() // size, size)
        return out

    def attend(
        self, heads: Heads, joined: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, given: PassInputs
    ) -> torch.Tensor:
        """Attention of new tokens over their row's slot, `[rows, queries, heads · size]`.

        `joined` `[rows, queries, (heads + 2 · groups) · size]` are queries, keys and values before the rotary
        embedding. Keys and values are written to the pass's columns of the cache `[slots, groups, columns, size]`. More
        than one query a row needs `takes_prompts`.
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
        """x Wᵀ + b for a bfloat16 weight `[outputs, inputs]`, which is copied. The number of inputs must be even."""
        outputs, inputs = weight.shape
        return Product(self._product, packed_weight(weight), inputs, outputs, bias)

    def quantized(self, weight: Quantized, bias: torch.Tensor | None = None) -> Product:
        """x Wᵀ + b for a weight of 8 or 4 bits, which is copied. The number of inputs must be even."""
        outputs, inputs = weight.codes.shape
        codes, scales = packed_codes(weight), packed_scales(weight)
        return Product(self._product, codes, inputs, outputs, bias, KINDS[weight.kind], scales)

    def grouped(self, weight: Codes | torch.Tensor, bias: torch.Tensor | None = None) -> GroupedProduct:
        """x Wᵀ + b for a weight in the codes of a GGUF file, or in float32 with whole groups of inputs."""
        return GroupedProduct(self._grouped_product, weight, bias)


class Product:
    """x Wᵀ + b over a packed weight. One call at a time."""

    def __init__(
        self,
        function: Any,
        packed: torch.Tensor,
        inputs: int,
        outputs: int,
        bias: torch.Tensor | None,
        kind: int = 0,
        scales: torch.Tensor | None = None,
    ) -> None:
        self._function, self._kept = function, (packed, None if bias is None else bias.contiguous(), scales)
        packed, bias, scales = self._kept
        self.given = _Product(
            weight=packed.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            inputs=inputs,
            outputs=outputs,
            kind=kind,
            scales=None if scales is None else scales.data_ptr(),
        )

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        given, x = self.given, x.contiguous()
        out = x.new_empty((*x.shape[:-1], given.outputs))
        given.x, given.out, given.rows = x.data_ptr(), out.data_ptr(), x.numel() // given.inputs
        given.added = None if added is None else added.data_ptr()
        self._function(given)
        return out

    def weight(self) -> torch.Tensor:
        """The weight that was packed, `[outputs, inputs]`, if it was not quantised."""
        assert self.given.kind == 0
        return unpacked_weight(self._kept[0])[: self.given.outputs]


class GroupedProduct:
    """x Wᵀ + b in float32 over a weight in the codes of a GGUF file, or in float32. One call at a time.

    The weight is copied. A bfloat16 input is converted, and the result rounded. A row's result does not depend on the
    number of rows.
    """

    def __init__(self, function: Any, weight: Codes | torch.Tensor, bias: torch.Tensor | None) -> None:
        if isinstance(weight, Codes):
            packed, kind, shape = packed_groups(weight), CODE_KINDS[weight.kind], (weight.outputs, weight.inputs)
        else:
            packed, kind, shape = packed_floats(weight), FLOATS, (weight.shape[0], weight.shape[1])
        self._function, self._kept = function, (packed, None if bias is None else bias.float())
        self.given = _GroupedProduct(
            weight=packed.data_ptr(),
            bias=None if self._kept[1] is None else self._kept[1].data_ptr(),
            outputs=shape[0],
            inputs=shape[1],
            kind=kind,
        )

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        if x.dtype != torch.float32:
            found = self(x.float()).to(x.dtype)
            return found if added is None else found.add_(added)
        given, x = self.given, x.contiguous()
        out = x.new_empty((*x.shape[:-1], given.outputs))
        given.x, given.out, given.rows = x.data_ptr(), out.data_ptr(), x.numel() // given.inputs
        added = None if added is None else added.contiguous()
        given.added = None if added is None else added.data_ptr()
        self._function(given)
        return out

    def weight(self) -> torch.Tensor:
        """The weight that was packed, `[outputs, inputs]`, if it was in float32."""
        assert self.given.kind == FLOATS
        return unpacked_floats(self._kept[0])[: self.given.outputs]

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of such a weight, `[…, inputs]`, as of an embedding."""
        assert self.given.kind == FLOATS
        return self._kept[0][indices // LANES, :, indices % LANES]


class PassInputs:
    """The inputs that all blocks of one forward pass share.

    `rotary` are the cosines and sines `[rows, queries, size]` of the rotary embedding. Keys and values are written to
    `columns` `[rows, queries]` of `slots` `[rows, 1]`. `mask`, bool `[rows, 1, queries, length]`, is True at the
    columns that a token attends to, the new ones included.
    """

    def __init__(
        self, rotary: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, columns: torch.Tensor, mask: torch.Tensor
    ) -> None:
        cosines, sines = (one.contiguous() for one in rotary)
        self._kept = cosines, sines, slots, columns, mask = cosines, sines, slots, columns, mask.contiguous()
        rows, queries = columns.shape
        pointers = (one.data_ptr() for one in self._kept)
        self.described = _Pass(rows, queries, mask.shape[-1], *pointers)


class WholeBlock:
    """A whole decoder block in one call, made of its norms (weight and epsilon), heads and products."""

    def __init__(
        self, kernels: Kernels, norms: Sequence[tuple[torch.Tensor, float]], heads: Heads, products: Sequence[Product]
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
        given: PassInputs,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block's output, `[rows, queries, hidden]` as its input.

        Keys and values are written to the cache `[slots, groups, columns, size]`. `shift` `[rows, 1, hidden]` is added
        to the rounded output.
        """
        if keys is not self._keys or values is not self._values:
            self._keys, self._values = keys, values
            self._given.attention = self._heads.described(keys, values)
        out = torch.empty_like(hidden)
        shift_at = None if shift is None else shift.data_ptr()
        self._function(self._given, given.described, hidden.data_ptr(), shift_at, out.data_ptr())
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """One block's attention: `heads` query heads share `groups` key and value heads, each of `size` numbers.

    `query_norm` and `key_norm` are the weights of norms over single heads, if the model has them.
    """

    heads: int
    groups: int
    size: int
    scaling: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0

    def described(self, keys: torch.Tensor, values: torch.Tensor) -> _Attention:
        """The attention's part that is known before a pass."""
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


# The layouts in which the kernels read weights, as defined in `tiles.hpp`, `quantized.hpp` and `grouped.cpp`.


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight `[outputs, inputs]` as `[blocks, inputs / 2, 16, 2]`."""
    whole = _whole(weight)
    return whole.view(-1, LANES, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def unpacked_weight(packed: torch.Tensor) -> torch.Tensor:
    """The bfloat16 weight of `packed_weight`, with the zeros that fill its last block."""
    return packed.transpose(1, 2).reshape(-1, 2 * packed.shape[1])


def packed_codes(weight: Quantized) -> torch.Tensor:
    """8-bit codes as bytes `[blocks, vectors, 64]`, or 4-bit codes as 16-bit words `[blocks, vectors, 32]`.

    A vector holds two pairs of inputs in 8 bits, four in 4 bits.
    """
    if weight.kind == "int8":
        return _bytes(_pairs(weight.codes, 2))
    return _words(_pairs(weight.codes, 4))


def packed_scales(weight: Quantized) -> torch.Tensor:
    """The scales of a quantised weight as `[blocks, groups, 16]`."""
    return _whole(weight.scales).view(-1, LANES, weight.scales.shape[1]).transpose(1, 2).contiguous()


def packed_groups(weight: Codes) -> torch.Tensor:
    """Codes of a GGUF file as bytes `[blocks, groups, bytes]`."""
    blocks, groups = -(-weight.outputs // LANES), weight.inputs // GROUP
    packed = torch.empty(blocks, groups, LANES * weight.type.size, dtype=torch.uint8)
    for part, to in zip(weight.split(), torch.split(packed, OUTPUTS // LANES), strict=True):
        scales, least, codes = part.parts()
        if part.type.bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        words = codes.reshape(*codes.shape[:2], -1, 4)  # [outputs, groups, words, bytes]
        halves = [one[..., None, None].view(torch.uint8) for one in (scales, least) if one is not None]
        fields = [*halves, words]
        torch.cat([_interleaved(field) for field in fields], dim=-1, out=to)
    return packed


def packed_floats(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight `[outputs, inputs]` as `[blocks, inputs, 16]`; missing outputs are zeros."""
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % LANES))
    return whole.view(-1, LANES, weight.shape[1]).transpose(1, 2).contiguous()


def unpacked_floats(packed: torch.Tensor) -> torch.Tensor:
    """The weight of `packed_floats`, with the zeros that fill its last block."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])


def _interleaved(fields: torch.Tensor) -> torch.Tensor:
    """Fields `[outputs, groups, count, bytes]` as `[blocks, groups, count · 16 · bytes]`; missing outputs are zeros."""
    missing = -len(fields) % LANES
    whole = torch.nn.functional.pad(fields, (0, 0, 0, 0, 0, 0, 0, missing))
    return whole.view(-1, LANES, *fields.shape[1:]).permute(0, 2, 3, 1, 4).flatten(2)


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """The rows in bfloat16, with zeros appended to fill the last block."""
    count = -(-len(rows) // LANES) * LANES
    whole = torch.zeros(count, rows.shape[1], dtype=torch.bfloat16)
    whole[: len(rows)] = rows
    return whole


def _pairs(codes: torch.Tensor, steps: int) -> torch.Tensor:
    """Codes as `[blocks, vectors, steps, 32]`: a step is one pair of inputs of sixteen outputs."""
    outputs, inputs = codes.shape
    blocks, vectors = -(-outputs // LANES), -(-inputs // (2 * steps))
    whole = torch.zeros(blocks * LANES, vectors * 2 * steps, dtype=torch.int8)
    whole[:outputs, :inputs] = codes
    return whole.view(blocks, LANES, vectors, steps, 2).permute(0, 2, 3, 1, 4).reshape(blocks, vectors, steps, 32)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """Sign and magnitude, eight codes of one pair beside eight of the other."""
    signed = codes.abs() | (codes < 0).to(torch.int8) * -128
    return signed.view(*codes.shape[:3], 4, 8).transpose(2, 3).contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Words of four nibbles, one of each pair."""
    nibbles = (codes & 15).to(torch.int32)
    words = sum(nibbles[:, :, pair] << 4 * pair for pair in range(4))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.uint16).contiguous()
