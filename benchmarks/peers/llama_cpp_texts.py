"""llama.cpp's most likely tokens: at every place of given continuations, and in greedy continuations of its own.

One JSON object from stdin to stdout. Like the peers, it runs in an environment without the project.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from commands import Setup
from llama_cpp_peer import Llama


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints
    asked = json.load(sys.stdin)
    llama = Llama(Setup(**asked["setup"]))
    found = {
        "version": llama.version,
        "after": {
            name: [llama.after(prompt, written) for prompt, written in texts] for name, texts in asked["texts"].items()
        },
        "greedy": [llama.greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]],
    }
    print(json.dumps(found), file=answers, flush=True)
    os._exit(0)  # as in `commands.serve`


if __name__ == "__main__":
    main()
