"""Compiled grammars: made once, by few threads, for so many at a time, and not kept for ever."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.common.forked import ForkedCommand
from server.engines.errors import Overloaded, Unavailable
from server.engines.protocol import Constraint
from server.engines.torch.constraints import lark
from server.engines.torch.constraints import matching as grammars
from server.engines.torch.constraints.lark import attributes, special_tokens, stands_for
from server.engines.torch.constraints.matching import (
    CompiledGrammar,
    GrammarCompiler,
    Grammars,
    Matcher,
    allowed_tokens,
)
from steering_vectors.errors import RequestError
from tests.support.serving import demo_engine, live_server
from tests.support.tiny_tokenizers import tiny_tokenizer

HOSTILE = "((a{1,1000}){1,1000}){1,1000}"


class HeldCompiler(GrammarCompiler):
    """One that compiles nothing before it is let go, and counts."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer(), frozenset({1}))
        self.go = threading.Event()
        self.begun = 0
        self.threads: set[str] = set()

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        self.begun += 1
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(60)
        return super().compile(constraint)


@pytest.fixture
def compiler() -> Iterator[HeldCompiler]:
    compiler = HeldCompiler()
    yield compiler
    compiler.go.set()


@pytest.fixture
def kept(compiler: HeldCompiler) -> Iterator[Grammars]:
    kept = Grammars(compiler)
    yield kept
    kept.close()


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


async def begun(kept: Grammars, *constraints: Constraint) -> list[asyncio.Task[CompiledGrammar]]:
    """A task for each that has asked for it."""
    tasks = [asyncio.create_task(kept.get(one)) for one in constraints]
    await asyncio.sleep(0)
    return tasks


def test_the_same_constraint_is_compiled_once(compiler: HeldCompiler, kept: Grammars) -> None:
    async def main() -> None:
        tasks = await begun(kept, regex("a"), regex("a"))
        compiler.go.set()
        first, second = await asyncio.gather(*tasks)
        assert first is second is await kept.get(regex("a"))
        assert compiler.begun == 1

    asyncio.run(main())


def test_one_who_leaves_does_not_take_it_from_the_others(compiler: HeldCompiler, kept: Grammars) -> None:
    async def main() -> None:
        leaving, staying = await begun(kept, regex("a"), regex("a"))
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        compiler.go.set()
        assert isinstance(await staying, CompiledGrammar)

    asyncio.run(main())


def test_an_error_that_nobody_waits_for_is_not_logged(
    compiler: HeldCompiler, kept: Grammars, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        (leaving,) = await begun(kept, regex("("))
        leaving.cancel()
        compiler.go.set()
        with pytest.raises(RequestError, match="constraint cannot be compiled"):
            await kept.get(regex("("))
        await asyncio.wait([leaving])

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
        gc.collect()
    assert not caplog.records


def test_no_more_wait_than_may(compiler: HeldCompiler, kept: Grammars) -> None:
    """A flood occupies the threads of compiling, and no others."""

    async def main() -> None:
        tasks = await begun(kept, *(regex(f"a{{{n}}}") for n in range(grammars.MAX_UNFINISHED)))
        with pytest.raises(Overloaded, match="32 constraints are being compiled or wait for it: try again later"):
            await kept.get(regex("b"))
        assert await asyncio.to_thread(lambda: "others run") == "others run"
        assert compiler.begun <= grammars.THREADS
        (same,) = await begun(kept, regex("a{0}"))  # it waits with another
        compiler.go.set()
        assert await same is await tasks[0]
        await asyncio.gather(*tasks)
        assert isinstance(await kept.get(regex("b")), CompiledGrammar)
        assert len(compiler.threads) == grammars.THREADS

    asyncio.run(main())


def test_the_latest_are_kept(compiler: HeldCompiler, kept: Grammars) -> None:
    async def main() -> None:
        compiler.go.set()
        first = await kept.get(regex("a"))
        for number in range(grammars.MAX_CACHED_GRAMMARS - 1):
            await kept.get(regex(f"b{{{number}}}"))
        assert await kept.get(regex("a")) is first
        await kept.get(regex("c"))  # in the place of the first b
        assert await kept.get(regex("a")) is first
        before = compiler.begun
        await kept.get(regex("b{1}"))
        assert compiler.begun == before
        await kept.get(regex("b{0}"))
        assert compiler.begun == before + 1

    asyncio.run(main())


def test_what_was_used_often_or_has_failed_is_compiled_anew(compiler: HeldCompiler, kept: Grammars) -> None:
    async def main() -> None:
        compiler.go.set()
        worn = [await kept.get(regex("a")) for _ in range(grammars.MAX_USES + 1)]
        assert len({id(one) for one in worn}) == 2
        assert worn[-2] is worn[0] is not worn[-1]
        hostile = await kept.get(regex(HOSTILE))
        matcher, a = Matcher(hostile), tiny_tokenizer().convert_tokens_to_ids("a")
        while allowed_tokens([matcher], 400).any():
            matcher.advance(a)
        assert not allowed_tokens([Matcher(hostile)], 400).any()  # its lexer is used up for all
        anew = await kept.get(regex(HOSTILE))
        assert allowed_tokens([Matcher(anew)], 400).any()
        for _ in range(2):
            with pytest.raises(RequestError):
                await kept.get(regex("("))

    asyncio.run(main())


def test_what_waits_at_the_end_is_told(compiler: HeldCompiler, kept: Grammars) -> None:
    async def main() -> None:
        *_, last = await begun(kept, *(regex(f"a{{{n}}}") for n in range(5)))
        kept.close()
        with pytest.raises(Unavailable, match="the engine is shut down"):
            await last
        with pytest.raises(Unavailable, match="the engine is shut down"):
            await kept.get(regex("b"))

    asyncio.run(main())


def test_a_server_that_is_flooded_answers_429(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_UNFINISHED", 0)
    with demo_engine() as engine, live_server(engine, tmp_path) as client:
        body = {"model": "demo", "prompt": "Bread", "guided_regex": "a"}
        response = client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert response.headers["retry-after"] == "1"


# What a client's constraint must not do to others.


def chain(count: int, form: str = "{}") -> str:
    """A grammar whose rules lead from one to the next."""
    names = [f"r{place}" for place in range(count)]
    rules = [f"{name}: {form.format(later)}" for name, later in pairwise([*names, '"x"'])]
    return "\n".join([f"start: {names[0]}", *rules])


DEEP = [
    chain(3000),
    chain(4500),
    chain(5000).replace("r", "R").replace("staRt", "start"),
    chain(500, "(" * 25 + "{}" + ")" * 25),
]


@pytest.mark.parametrize("place", range(len(DEEP)))
def test_no_depth_overflows_the_stack_of_the_compiler(place: int) -> None:
    """Each ended the process before; so it is compiled in another one, by a thread as the engine has them."""
    code = """
import asyncio, sys
from server.engines.protocol import Constraint
from server.engines.torch.constraints.matching import GrammarCompiler, Grammars
from steering_vectors.errors import RequestError
from tests.support.tiny_tokenizers import tiny_tokenizer

async def main():
    kept = Grammars(GrammarCompiler(tiny_tokenizer(), frozenset({1})))
    try:
        await kept.get(Constraint("lark", sys.stdin.read()))
        print("compiled")
    except RequestError as error:
        print(error.message)

asyncio.run(main())
"""
    with ForkedCommand([], os.environ, code=code) as process:
        printed, errors = process.communicate(DEEP[place], timeout=60)
        assert process.returncode == 0, errors
    count = DEEP[place].count(":")
    expected = "compiled" if count <= grammars.MAX_RULES else f"constraint has {count} rules; at most 512 are taken"
    assert printed.strip() == expected


def nested(depth: int) -> str:
    return '{"a":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("json", nested(128)), "constraint cannot be compiled: recursion limit exceeded"),
        (Constraint("json", nested(199)), "constraint cannot be compiled: recursion limit exceeded"),
        (Constraint("json", nested(5000)), "constraint cannot be read: "),
        (Constraint("lark", f"start: %json {nested(5000)}"), "constraint cannot be read: "),
        (Constraint("lark", "start: %json {"), "constraint cannot be read: "),
        (Constraint("json", '{"x-guidance": {"lenient": true}}'), "constraint has x-guidance, which only the server"),
        (
            Constraint("lark", 'start: %json {"x\\u002dguidance": {}}'),
            "constraint has x-guidance, which only the server",
        ),
    ],
)
def test_what_the_compiler_cannot_read_is_an_error_of_the_request(constraint: Constraint, message: str) -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), frozenset({1}))
    with pytest.raises(RequestError) as failure:
        compiler.compile(constraint)
    assert failure.value.message.startswith(message)
    assert failure.value.param == "constraint"


def test_a_property_may_have_any_name() -> None:
    schema = Constraint("json", '{"properties": {"x-guidance": {"type": "null"}}}')
    assert isinstance(GrammarCompiler(tiny_tokenizer(), frozenset({1})).compile(schema), CompiledGrammar)


@pytest.mark.parametrize("text", ['"\\"' * 16000, "/\\" * 32000, "<a" * 32000, '"' * 65535, "/" * 65535, "[a," * 20000])
def test_any_text_is_scanned_in_linear_time(text: str) -> None:
    """Each match ends where the next begins, so that no character is looked at again and again."""
    assert not attributes(text)
    lexemes = lark._LEXEME
    place, looked = 0, 0
    while place < len(text):
        match = lexemes.match(text, place)
        assert match is not None
        looked += match.end() - place
        place = match.end()
    assert looked == len(text)


def test_one_that_takes_too_long_is_given_up_and_holds_up_no_other(
    compiler: HeldCompiler, kept: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        slow = await begun(kept, *(regex(f"a{{{n}}}") for n in range(grammars.THREADS)))
        monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.5)
        (waiting,) = await begun(kept, regex("b"))
        for outcome in await asyncio.gather(*slow, return_exceptions=True):
            assert isinstance(outcome, RequestError)
            assert outcome.message == "constraint takes longer than 0.5 s to compile: make it simpler"
        while len(compiler.threads) <= grammars.THREADS:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(grammars, "COMPILE_SECONDS", 60)
        compiler.go.set()
        assert isinstance(await waiting, CompiledGrammar)

    asyncio.run(main())


def test_no_more_are_held_than_may(compiler: HeldCompiler, kept: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_LIVE_GRAMMARS", 3)
    monkeypatch.setattr(grammars, "MAX_CACHED_GRAMMARS", 1)

    async def main() -> None:
        compiler.go.set()
        held = [await kept.get(regex(f"a{{{n}}}")) for n in range(4)]
        with pytest.raises(Overloaded, match="4 constraints are in use: try again later"):
            await kept.get(regex("b"))
        del held[:2]
        gc.collect()
        assert isinstance(await kept.get(regex("b")), CompiledGrammar)

    asyncio.run(main())


# What the rules of a grammar ask for.


@pytest.mark.parametrize(
    ("grammar", "names"),
    [
        ('start: "a"', set()),
        ('start[capture]: "a"', {"capture"}),
        ('start [ capture = "x" , temperature=0.5, max_tokens=3,] : /a/', {"capture", "temperature", "max_tokens"}),
        ('start: x "b"\nx[stop="]:", stop_capture="c"]: /[^b]*/', {"stop", "stop_capture"}),
        ('start: x\nx[lazy]: /[capture]:/\n// [stop="x"]:\n# y[stop="x"]:', {"lazy"}),
        ('start: [capture] [temperature | stop]\ncapture: "[stop=\\"a\\"]:"\ntemperature: "b"\nstop: "c"', set()),
        ('start: x\nx[suffix=END, temperature=1e-1]: /a*/\nEND: "b"', {"suffix", "temperature"}),
        ('start: %json {"enum": ["[stop]:"], "x": {"[capture]": 1}} y\ny[capture]: "a"', {"capture"}),
        ('%llguidance {"no_forcing": true}\nstart: <[384]> <x[capture]:> y\ny[lazy]: /a/', {"lazy"}),
        ('start: perm::0x0\nperm::_[capture]: "" %if is_ones([0:1])\n | "a" perm::set_bit(0)', {"capture"}),
    ],
)
def test_attributes_are_told_from_all_else(grammar: str, names: set[str]) -> None:
    assert attributes(grammar) == names


def test_special_tokens_are_told_from_all_else() -> None:
    grammar = 'start: </s> <[3-5,7]> x::1 "<a>" /<b>/ %json {"const": "<c>"} -> y // <d>\nx::_: <[^2]> <[*]>'
    assert special_tokens(grammar) == {"</s>", "<[3-5,7]>", "<[^2]>", "<[*]>"}


@pytest.mark.parametrize(
    ("special", "held"),
    [("</s>", {1}), ("<[1-2,5]>", {1, 2, 5}), ("<[^1-2,5]>", {0, 3, 4, 6}), ("<[*]>", set(range(7))), ("<[6]>", {6})],
)
def test_a_special_token_may_stand_for_many(special: str, held: set[int]) -> None:
    assert {one for one in range(7) if stands_for(special, one, "</s>" if one == 1 else "x")} == held
