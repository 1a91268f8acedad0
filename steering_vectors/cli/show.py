"""`trimtab show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.reports.terminal import print_profile


def show(
    profile: flags.ProfileNames,
    profiles: flags.Profiles = Path("profiles"),
    html: Annotated[
        Path | None, flags.in_output(help="Write an HTML page with plots to this file instead of printing.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Print everything that profiles hold except their vectors, or draw it as a page."""
    paths = [flags.find_profile(one, profiles) for one in profile]
    stored = [steering_vectors.load_profile(path) for path in paths]
    if html is not None:
        from steering_vectors.reports.profiles import render_portraits

        flags.write_text(html, render_portraits(stored))
    if as_json:
        found = [
            {"path": str(path), **steering_vectors.profile_summary(one)}
            for path, one in zip(paths, stored, strict=True)
        ]
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
    elif html is not None:
        print(f"page: {html}")
    else:
        for number, (path, one) in enumerate(zip(paths, stored, strict=True)):
            if number:
                print()
            print_profile(one, path)
