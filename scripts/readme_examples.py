"""Write the README's example replies and their receipt; with --check, fail if they are out of date.

    python scripts/readme_examples.py [--check]

The script serves SmolLM2 with the shipped profile `cheerful` as `make serve` does, and sends the README's curl command
at three strengths. The temperature is 0, but sums are rounded differently by other instruction sets and other versions
of torch, and one different token changes the rest of a reply. Therefore the block names its machine. On an equal
machine the check compares everything. On another machine it compares only what does not depend on rounding: the
table's strengths, and the receipt without the number of steered tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import torch
import typer

from server.app import create_app
from server.settings import Settings

Answer = dict[str, Any]

README = Path(__file__).resolve().parents[1] / "README.md"
STRENGTHS = (-1, 0, 1)
VERSION_LENGTH = 8  # shown characters
MODEL, PROFILE = "smollm2", "cheerful"
ROUNDED = ("steered_tokens",)  # fields of a receipt that depend on rounding
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
PATIENCE_S = 120
STALE = "README.md: run `make examples`"


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the README differs.")] = False,
) -> None:
    readme = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as empty:
        answers = asyncio.run(ask(Settings(model=MODEL, profiles=Path(empty), threads=1), readme))
    wrong = [*faults(answers), *(differences(readme, answers, machine()) if check else ())]
    if wrong:
        sys.exit("\n".join([*wrong, STALE] if check else wrong))
    if not check:
        README.write_text(written(readme, blocks(answers, machine())), encoding="utf-8")


async def ask(settings: Settings, readme: str) -> dict[int, Answer]:
    """The responses of a server with these settings to the README's curl command, by strength."""
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client,
    ):
        await asyncio.wait_for(_until_ready(client), PATIENCE_S)
        found = {}
        for strength in STRENGTHS:
            response = await client.post("/generate", json={**request_of(readme), "strength": strength})
            response.raise_for_status()
            found[strength] = response.json()
    return found


async def _until_ready(client: httpx.AsyncClient) -> None:
    while (await client.get("/ready")).status_code != 200:
        await asyncio.sleep(0.1)


def request_of(readme: str) -> dict[str, Any]:
    """The body of the README's curl command."""
    found = re.search(r"^curl [^\n]*/generate[^\n]* -d '(\{.*?\})'$", readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit(f"{README.name}: no curl command for /generate found")
    body: dict[str, Any] = json.loads(found[1])
    return body


def faults(answers: Mapping[int, Answer]) -> list[str]:
    """The requirements, on any machine, that an example does not meet."""
    found = []
    for strength, answer in answers.items():
        (receipt,) = answer["steering"]
        tokens = answer["usage"]["completion_tokens"]
        if receipt["strength"] != strength or receipt["name"] != PROFILE:
            found.append(f"strength {strength}: the receipt says {receipt['name']}@{receipt['strength']}")
        if receipt["steered_tokens"] != (tokens if strength else 0):
            found.append(f"strength {strength}: {receipt['steered_tokens']} of {tokens} tokens were steered")
    if len({answer["text"] for answer in answers.values()}) < len(answers):
        found.append("two strengths give the same reply")
    return found


def differences(readme: str, answers: Mapping[int, Answer], here: str) -> list[str]:
    """The differences between the README and these responses, which were made `here` (see `machine`)."""
    same = made_on(block_of(readme, "replies")) == here
    shown = {name: comparable(name, block_of(readme, name), rounding=same) for name in ("replies", "receipt")}
    fresh = {name: comparable(name, block, rounding=same) for name, block in blocks(answers, here).items()}
    changed = [name for name in fresh if shown[name] != fresh[name]]
    return [f"{name}: it says\n{shown[name]}\nand would say\n{fresh[name]}" for name in changed]


def blocks(answers: Mapping[int, Answer], here: str) -> dict[str, str]:
    """The README's two blocks: the table of replies, and the receipt of the last one."""
    rows = [f"| {_signed(strength)} | {_cell(answer)} |" for strength, answer in answers.items()]
    receipt = dict(answers[STRENGTHS[-1]]["steering"][0])
    receipt["version"] = f"{receipt['version'][:VERSION_LENGTH]}…"
    return {
        "replies": "\n".join([f"<!-- Made on: {here} -->", "", "| strength | reply |", "|---|---|", *rows]),
        "receipt": f'```json\n"steering": [{json.dumps(receipt, ensure_ascii=False)}]\n```',
    }


def receipt_of(block: str) -> dict[str, Any]:
    """The receipt in a block of the README."""
    (receipt,) = json.loads("{" + block.removeprefix("```json\n").removesuffix("\n```") + "}")["steering"]
    found: dict[str, Any] = receipt
    return found


def comparable(name: str, block: str, *, rounding: bool) -> str:
    """A block, unless `rounding` without what depends on it."""
    if name == "receipt":
        left_out = () if rounding else ROUNDED
        receipt = receipt_of(block).items()
        return json.dumps({key: type(value).__name__ if key in left_out else value for key, value in receipt})
    if rounding:
        return block
    return re.sub(r"^(\| [−\d]+ \|) \S.* \|$", r"\1 … |", re.sub(r"<!--.*-->", "", block), flags=re.MULTILINE)


def made_on(block: str) -> str:
    found = re.search(r"<!-- Made on: (.*) -->", block)
    return found[1] if found else ""


def block_of(readme: str, name: str) -> str:
    """The text between a block's two markers."""
    found = _pattern(name).search(readme)
    if found is None:
        raise SystemExit(f"{README.name}: no markers <!-- {name} --> and <!-- end of {name} -->")
    return found[2]


def written(readme: str, fresh: Mapping[str, str]) -> str:
    """The README with these blocks in place of the old ones."""
    for name, block in fresh.items():
        block_of(readme, name)
        readme = _pattern(name).sub(lambda found, block=block: found[1] + block + found[3], readme)
    return readme


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- end of {name} -->)", re.DOTALL)


def _signed(strength: int) -> str:
    return str(strength).replace("-", "−")


def _cell(answer: Answer) -> str:
    """The reply in one line, with an ellipsis if the request's limit cut it."""
    text = " ".join(answer["text"].split()).replace("|", "\\|")
    return f"{text} …" if answer["finish_reason"] == "length" else text


def machine() -> str:
    """The facts that determine rounding: the processor's vendor and instruction sets, and torch's version."""
    maker, flags = "unknown", ""
    if (file := Path("/proc/cpuinfo")).exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", file.read_text(), re.MULTILINE))
        maker = fields.get("vendor_id", fields.get("CPU implementer", "unknown"))
        flags = fields.get("flags", fields.get("Features", ""))
    known = [feature for feature in FEATURES if feature in flags.split()]
    return ", ".join([maker, *known, f"torch {torch.__version__.partition('+')[0]}"])


if __name__ == "__main__":
    typer.run(main)
