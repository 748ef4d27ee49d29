"""README and guides in English and Chinese: the same sections, commands, options and keys; no dead links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hydit_core.untrusted import read_toml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENGLISH_ONLY = {"architecture.md", "benchmarks.md"}
"""For those who work on the code; the Chinese README says that they are in English."""

PAIRS = {
    "README.md": (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    **{
        path.name: (path, DOCS / "zh" / path.name)
        for path in sorted(DOCS.glob("*.md"))
        if path.name not in ENGLISH_ONLY
    },
}
PAGES = [
    *(path for pair in PAIRS.values() for path in pair),
    *(DOCS / name for name in sorted(ENGLISH_ONLY)),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "hydit_core" / "assets" / "MODEL_CARD.md",
]
pairs = pytest.mark.parametrize(("english", "chinese"), PAIRS.values(), ids=PAIRS)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", text(path))


def headings(path: Path) -> list[tuple[int, str]]:
    return [(len(level), title) for level, title in re.findall(r"^(#+) (.+)$", prose(path), re.M)]


def shape(path: Path) -> list[str]:
    """Level of each heading, and under it the number of table rows and list items."""
    found, rows, items = [], 0, 0
    for line in [*prose(path).splitlines(), "# "]:
        if heading := re.match(r"(#+) ", line):
            found += [f"{rows} rows, {items} items", heading[1]]
            rows = items = 0
        rows += line.startswith("|")
        items += bool(re.match(r" *(\*|-|\d+\.) ", line))
    return found[1:-1]


def commands(path: Path) -> list[tuple[str, str]]:
    """Code blocks without comments: language and text."""
    blocks = []
    for language, code in FENCE.findall(text(path)):
        lines = (re.sub(r"(^|\s)#.*$", "", line).rstrip() for line in code.splitlines())
        blocks.append((language, "\n".join(line for line in lines if line)))
    return blocks


def option_names(path: Path) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose(path)))


KEYS = {
    name
    for group in ("tables", "keys")
    for dotted in read_toml(DOCS / "configuration.toml")[group]
    for name in (dotted, dotted.rpartition(".")[2])
}
"""Dotted and bare; test_docs_configuration says that none is missing."""


def keys(path: Path) -> set[str]:
    """The keys and tables of the training configuration that a page names."""
    spans = re.findall(r"`([^`\n]+)`", prose(path))
    words = {span.strip("[]").split(" = ")[0] for span in spans}
    return words & KEYS


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = set()
    for _, title in headings(path):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower())
        found.add(slug.replace(" ", "-"))
    return found


def links(path: Path) -> list[str]:
    return [first or second for first, second in LINK.findall(prose(path))]


def test_there_are_guides_in_both_languages():
    assert {path.name for path in (DOCS / "zh").glob("*.md")} == set(PAIRS) - {"README.md"}


@pairs
def test_same_sections(english, chinese):
    assert shape(english) == shape(chinese)


@pairs
def test_same_commands(english, chinese):
    ours, theirs = commands(english), commands(chinese)
    assert [language for language, _ in ours] == [language for language, _ in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one == other


@pairs
def test_same_options_and_keys(english, chinese):
    assert option_names(english) == option_names(chinese)
    assert keys(english) == keys(chinese)


@pairs
def test_each_leads_to_the_other(english, chinese):
    for here, there in ((english, chinese), (chinese, english)):
        targets = [(here.parent / link).resolve() for link in links(here)[:2] if "://" not in link]
        assert there in targets, f"{here.name} does not begin with a link to its other edition"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: there is {sorted(anchors(target))}"


@pairs
def test_chinese_pages_lead_to_chinese_pages(english, chinese):
    translated = dict(PAIRS.values())
    for link in links(chinese):
        target = (chinese.parent / link.partition("#")[0]).resolve()
        if target != english:
            assert target not in translated, f"{chinese.name}: {link} has a Chinese edition"


@pairs
def test_chinese_pages_are_chinese(english, chinese):
    """Every section and row has Chinese words, unless it has no words in English either."""
    for level, title in headings(chinese):
        if level > 1 and not re.search("[一-鿿]", title):
            assert title in [words for _, words in headings(english)], (
                f"{title}: not Chinese, not the English one"
            )
    share = len(re.findall("[一-鿿]", prose(chinese))) / max(1, len(prose(english).split()))
    assert share > 0.5, "shorter than the English page can be"


@pytest.mark.parametrize(
    ("command", "same"), [("make demo  # 注释", "make demo"), ('x = "a#b"', 'x = "a#b"'), ("# all", "")]
)
def test_comments_are_left_out(tmp_path, command, same):
    page = tmp_path / "a.md"
    page.write_text(f"```sh\n{command}\n```\n", encoding="utf-8")
    assert commands(page) == [("sh", same)]
