"""What the documentation's Markdown holds: headings with their anchors, links, and links that lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^ *(```+|~~~+)")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
HEADING = re.compile(r"^(#{1,6}) +(.+?) *#* *$")
# [text](target), ![text](target) and [![text](image)](target); a target in brackets or with a title is not used here
LINK = re.compile(r"(?<=\])\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
OUTSIDE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """A relative link: the line it stands in (counted from 1), the file's path and the anchor, either maybe ""."""

    line: int
    path: str
    anchor: str


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading: lower case, blanks to hyphens, punctuation left out."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[`*]|<[^>]*>", "", text)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings. The second heading of one name gets -1 behind it, the third -2."""
    seen: dict[str, int] = {}
    found = set()
    for _, line in _prose(text):
        if match := HEADING.match(line):
            name = slug(match[2])
            number = seen.get(name, 0)
            seen[name] = number + 1
            found.add(f"{name}-{number}" if number else name)
    return found


def title(text: str) -> str:
    """The first heading of a page, "" if it has none."""
    return next((match[2] for _, line in _prose(text) if (match := HEADING.match(line))), "")


def links(text: str) -> list[Link]:
    """The relative links of a page, those to images too. What stands in code is no link."""
    found = []
    for number, line in _prose(text):
        for match in LINK.finditer(CODE.sub(lambda code: " " * len(code[0]), line)):
            if not OUTSIDE.match(match[1]):
                path, _, anchor = match[1].partition("#")
                found.append(Link(number, path, anchor))
    return found


def with_links(text: str, new: Callable[[str], str]) -> str:
    """The page with every relative link's target replaced by `new(target)`."""
    lines = text.split("\n")
    for number, line in _prose(text):
        codes = [match.span() for match in CODE.finditer(line)]

        def target(match: re.Match, codes=codes) -> str:
            in_code = any(start <= match.start() < stop for start, stop in codes)
            return match[0] if in_code or OUTSIDE.match(match[1]) else f"({new(match[1])})"

        lines[number - 1] = LINK.sub(target, line)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """The text with `<` as `&lt;` where Markdown would read HTML: not in code, which it shows as it is."""
    lines = text.split("\n")
    before, in_block = "", False
    for number, line in _prose(text):
        # An indented block of code begins behind an empty line; what follows `Args:` is indented too, but text.
        in_block = line.startswith("    ") and (in_block or not before.strip())
        before = line
        if not in_block:
            kept, end = [], 0
            for code in CODE.finditer(line):
                kept += [line[end : code.start()].replace("<", "&lt;"), code[0]]
                end = code.end()
            lines[number - 1] = "".join([*kept, line[end:].replace("<", "&lt;")])
    return "\n".join(lines)


def problems(root: Path, pages: list[Path]) -> list[str]:
    """One sentence for each relative link of `pages` whose file or anchor does not exist below the folder `root`."""
    known: dict[Path, set[str]] = {}
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in links(text):
            where = f"{page.relative_to(root)}:{link.line}"
            target = (page.parent / link.path).resolve() if link.path else page
            if not target.exists() or not target.is_relative_to(root):
                found.append(f"{where}: there is no {link.path}")
            elif link.anchor and target.suffix == ".md":
                if target not in known:
                    known[target] = anchors(target.read_text(encoding="utf-8"))
                if link.anchor not in known[target]:
                    found.append(f"{where}: {target.relative_to(root)} has no heading #{link.anchor}")
    return found


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not in a fenced block of code."""
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        mark = FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]) else fence
        elif mark:
            fence = mark[1]
        else:
            yield number, line
