"""`trimtab methods`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steering_vectors.cli.flags import AsJson

if TYPE_CHECKING:
    from steering_vectors.methods.registry import MethodDescription


def methods(as_json: AsJson = False) -> None:
    """List the methods of `trimtab fit`, with their options, defaults and papers."""
    from steering_vectors.methods import method_named, method_names

    found = [method_named(name).describe() for name in method_names()]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print_methods(found)


def print_methods(methods: Sequence[MethodDescription]) -> None:
    """Print a table of methods, and a table of their options."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("method", "direction", "paper", "blocks with --layers auto")
    options = Table("method", "option", "default", "meaning")
    for method in methods:
        table.add_row(method["name"], escape(method["direction"]), escape(method["paper"]), method["layers"])
        for number, option in enumerate(method["options"]):
            default = escape(str(option["default"])) or '""'
            options.add_row(method["name"] if number == 0 else "", option["name"], default, escape(option["help"]))
    console.print(table)
    console.print("h is a block's output, q a prompt, r a response; p⁺ and p⁻ are an instruction and its opposite.")
    console.print(options)
    console.print("Set an option with -o KEY=VALUE.")
