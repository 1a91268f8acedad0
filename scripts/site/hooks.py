"""Hooks of mkdocs: pages from outside docs/, a local copy of mermaid, and no requests to other hosts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MERMAID = ROOT / "scripts/site/node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js"
PAGES = {  # files outside docs/ and their pages
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "SECURITY.md": "security.md",
    ROOT / "benchmarks/README.md": "benchmarks.md",
}
SCRIPTS = "assets/javascripts"
LOCAL = {  # scripts that the theme would load from another host
    '"https://unpkg.com/mermaid@11/dist/mermaid.min.js"': f'new URL("{SCRIPTS}/{MERMAID.name}",__md_scope).href',
    '"https://unpkg.com/resize-observer-polyfill"': '""',  # every browser has ResizeObserver
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
FOREIGN = {
    ".html": re.compile(r"""<(?:script|link|img|iframe|source|object)\b[^>]*\b(?:src|href|data)=["']?(?:https?:)?//"""),
    ".css": re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//"""),
    ".js": re.compile(r"""["'`]https?://unpkg\.com"""),
}


def on_config(config: MkDocsConfig) -> None:
    """Without a local mermaid, show diagrams as source."""
    if not MERMAID.is_file():
        config.mdx_configs["pymdownx.superfences"]["custom_fences"] = []


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=source.read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert links between files to links between pages."""
    sources = {name: source for source, name in PAGES.items()}
    folder = sources.get(page.file.src_uri, DOCS / page.file.src_uri).parent

    def page_of(link: re.Match[str]) -> str:
        target = (folder / link[0]).resolve()
        if target in PAGES:
            return PAGES[target]
        return target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else link[0]

    return LINK.sub(page_of, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    scripts = site / SCRIPTS
    (bundle,) = scripts.glob("bundle.*.min.js")
    code = bundle.read_text(encoding="utf-8")
    for foreign, local in LOCAL.items():
        if foreign not in code:
            raise PluginError(f"{bundle.name} does not contain {foreign}: the theme has changed, so change LOCAL here")
        code = code.replace(foreign, local)
    bundle.write_text(code, encoding="utf-8")
    if MERMAID.is_file():
        shutil.copy(MERMAID, scripts)
    for path in site.rglob("*"):
        pattern = FOREIGN.get(path.suffix)
        if pattern and (found := pattern.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path.relative_to(site)} loads something from another host: {found[0]}")
