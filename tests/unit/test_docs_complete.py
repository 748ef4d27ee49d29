"""What the guides list is what there is: commands and their options, nodes, workflows."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
COMMAND = re.compile(
    r"-m (hydit_core\.\w+)"
    r"(?: (quick|import|prepare|cache|export|report|inspect|convert|quantize|merge|combine|extract)\b)?(.*)"
)
"""A command of ours in a code block: module, subcommand, the rest. Chinese pages have the same ones."""


SIDE = r'--[a-z] ("[^"]*"|[^-]\S*)'


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def help_of(module: str, subcommand: str) -> str:
    """What ``--help`` prints."""
    command = importlib.import_module(f"{module}.__main__")
    with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit) as end:
        command.main([*([subcommand] if subcommand else []), "--help"])
    assert end.value.code in (0, None)
    return told.getvalue()


def options(told: str) -> set[str]:
    told = told.replace("python -m ", "")
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*[a-z]|-[a-z])(?![\w-])", told)) - {"--help", "-h"}


def commands() -> list[tuple[str, str, str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", text(page), re.M | re.S):
            for line in block.splitlines():
                if match := COMMAND.search(line.split(" #")[0]):
                    found.append((str(page.relative_to(ROOT)), match[1], match[2] or "", match[3]))
    return found


def test_commands_are_found():
    modules = {(module, subcommand) for _, module, subcommand, _ in commands()}
    assert len(modules) >= 11, modules


def test_options_in_commands_exist():
    for page, module, subcommand, rest in commands():
        if module == "hydit_core.compare":  # sides are options of another command
            sides = " ".join(re.findall(SIDE, rest)).replace("--peer-steps", "")
            _assert_known(page, "hydit_core.generate", "", f" {sides}")
            rest = re.sub(SIDE, "", rest)
        _assert_known(page, module, subcommand, rest)


def _assert_known(page: str, module: str, subcommand: str, rest: str) -> None:
    known = options(help_of(module, subcommand))
    for name in re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest):
        assert name in known, f"{page}: {module} {subcommand} has no {name}"


def test_table_has_every_option_of_generate():
    rows = re.findall(r"^\| (`--.*?) \|", text(ROOT / "docs" / "generate.md"), re.M)
    assert options(" ".join(rows).replace("`", " ")) == options(help_of("hydit_core.generate", ""))


def test_table_has_every_option_of_compare():
    rows = re.findall(r"^\| (`(?:--|-o).*?) \|", text(ROOT / "docs" / "compare.md"), re.M)
    listed = options(" ".join(rows).replace("`", " "))
    assert listed - {"-o"} | {"--out", "-o"} == options(help_of("hydit_core.compare", "")) - {"--peer-steps"}


@pytest.mark.parametrize(
    ("language", "prefix", "page"), [("en", "HunyuanDiT ", "nodes.md"), ("zh", "混元DiT ", "zh/nodes.md")]
)
def test_every_node_is_listed(language, prefix, page):
    nodes = json.loads(text(ROOT / "locales" / language / "nodeDefs.json"))
    table = re.findall(rf"^\| {prefix}(.+?) \|", text(ROOT / "docs" / page), re.M)
    listed = {name for row in table for name in re.split("[,、] ?", row)}
    assert listed == {node["display_name"].removeprefix(prefix) for node in nodes.values()}


@pytest.mark.parametrize("page", ["nodes.md", "zh/nodes.md"])
def test_every_workflow_is_listed(page):
    listed = re.findall(r"\| \*(hydit_[\w.]+)\* \|", text(ROOT / "docs" / page))
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
