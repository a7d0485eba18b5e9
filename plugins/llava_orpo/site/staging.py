"""Lays out the pages of the documentation site: what Zensical builds from.

docs/ and README.md are written for a reader of the repository, so they link to files outside docs/, which a site does
not have. Here each of those becomes a page of its own, and the package's modules get the pages that mkdocstrings fills.
Needs the standard library alone, because the site's environment has neither torch nor LLaMA-Factory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from . import markdown

HOME = "index.md"
FILES = "files"
API = "api"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".toml": "toml"}
LONGEST = 100_000  # characters of a file that are shown
PACKAGE = "llava_orpo"
OWN_PAGE = ("", "The package itself: recipes, keys, errors and what is loaded first")


def stage(root: Path, out: Path) -> list[Path]:
    """Writes the pages of the checkout `root` into the folder `out`, replacing what it holds; returns their paths.

    A file that stays the same is not touched, so that a server that watches the folder sees only what changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder).resolve()
        _lay_out(root, new)
        names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        for name in names:
            content, target = (new / name).read_bytes(), out / name
            if not target.is_file() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    for old in [path for path in out.rglob("*") if path.is_file() and path.relative_to(out) not in names]:
        old.unlink()
    return [out / name for name in names]


def _lay_out(root: Path, out: Path) -> None:
    linked: set[Path] = set()
    for source in [root / "README.md", *sorted((root / "docs").rglob("*"))]:
        if source.is_dir():
            continue
        target = out / place(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            target.write_text(_relinked(text, source, target, root, out, linked), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    for source in sorted(linked):
        target = out / place(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_folder_page(source, root) if source.is_dir() else _file_page(source, root), encoding="utf-8")
    for name, text in api_pages(root).items():
        (out / API).mkdir(parents=True, exist_ok=True)
        (out / API / name).write_text(text, encoding="utf-8")


def place(source: Path, root: Path) -> Path:
    """Where a file or folder of the checkout has its page, relative to the site's folder of pages."""
    name = source.relative_to(root)
    if name == Path("README.md"):
        return Path(HOME)
    if name.parts[0] == "docs":
        return Path(*name.parts[1:])
    return Path(FILES) / name.with_name(f"{name.name.replace('.', '-')}.md")


def api_pages(root: Path) -> dict[str, str]:
    """{file name: text} of the API reference: a page per subpackage, with a `:::` block for each of its modules."""
    package = root / "plugins" / PACKAGE
    pages: dict[str, str] = {}
    for folder in [package, *sorted(path.parent for path in package.rglob("__init__.py") if path.parent != package)]:
        modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
        if modules:
            name = ".".join([PACKAGE, *folder.relative_to(package).parts])
            blocks = [f"## {module.stem}\n\n::: {name}.{module.stem}\n" for module in modules]
            pages[f"{name.replace('.', '-')}.md"] = "\n".join([f"# {name}\n", *blocks])
    return pages


def _relinked(text: str, source: Path, target: Path, root: Path, out: Path, linked: set[Path]) -> str:
    """The page with its links as the site has them; what it links to outside docs/ is added to `linked`."""

    def new(link: str) -> str:
        path, _, anchor = link.partition("#")
        if not path:
            return link
        file = (source.parent / path).resolve()
        there = place(file, root)
        if there.parts[0] == FILES:
            linked.add(file)
        elif file.is_dir():
            raise FileNotFoundError(f"{source}: a link to the folder {path}: name the page")
        return os.path.relpath(out / there, target.parent) + (f"#{anchor}" if anchor else "")

    return markdown.with_links(text, new)


def _file_page(source: Path, root: Path) -> str:
    text = source.read_text(encoding="utf-8")
    shown = text if len(text) <= LONGEST else text[:LONGEST].rpartition("\n")[0] + "\n…"
    fence = "````" if "```" in text else "```"
    head = f"# {source.relative_to(root)}\n\nA file of the repository, as it was when this site was built.\n\n"
    return f"{head}{fence}{LANGUAGES.get(source.suffix, 'text')}\n{shown.rstrip()}\n{fence}\n"


def _folder_page(source: Path, root: Path) -> str:
    names = [path.name + "/" * path.is_dir() for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    return f"# {source.relative_to(root)}/\n\nA folder of the repository:\n\n" + "".join(f"- `{n}`\n" for n in names)


def watch(root: Path, out: Path, seconds: float = 1.0) -> None:
    """Lays the pages out again whenever one of their sources changes, until the process is ended."""

    def state() -> dict[Path, int]:
        files = [root / "README.md", *(root / "docs").rglob("*"), *(root / "plugins").rglob("*.py")]
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = state()
    while True:
        time.sleep(seconds)
        if (now := state()) != before:
            before = now
            stage(root, out)
