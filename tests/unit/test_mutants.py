"""The tool that puts wrong formulas into the library: what it changes, and that its draw holds still."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "mutants"))

from cover import Recorder
from sites import find, sample

SOURCE = b'''"""A text: a - b."""
LIMIT = 3

def scaled(x, y, *, factor=2.0, clip=True):
    """Not this: 1 + 1."""
    z = x[: y] * factor - "\xc3\xa9" .count(x)
    if x < y and not clip:
        print(x, y)
        raise ValueError(f"{x + y} is too much")
    return min(x, z) if clip else z
'''


def changed() -> dict[str, list[str]]:
    """Changes by kind."""
    found: dict[str, list[str]] = {}
    for site in find("a.py", SOURCE):
        compile(site.apply(SOURCE), "a.py", "exec")
        found.setdefault(site.kind, []).append(f"{site.old} -> {site.new}")
    return found


def test_every_kind_of_change_is_found_and_gives_valid_code() -> None:
    assert changed() == {
        "constant": ["3 -> 4"],
        "default": ["2.0 -> 4.0", "True -> False"],
        "arithmetic": [
            "x[: y] * factor - \"é\" .count(x) -> (x[:y] * factor + 'é'.count(x))",
            "x[: y] * factor -> (x[:y] / factor)",
        ],
        "slice": ["y -> (y + 1)"],
        "boolean": ["x < y and not clip -> (x < y or not clip)", "not clip -> (clip)"],
        "comparison": ["x < y -> (x <= y)"],
        "removal": ["print(x, y) -> pass", 'raise ValueError(f"{x + y} is too much") -> pass'],
        "arguments": ["print(x, y) -> (print(y, x))", "min(x, z) -> (min(z, x))"],
        "branches": ["min(x, z) if clip else z -> (z if clip else min(x, z))"],
    }


def test_a_change_knows_the_lines_that_run_it() -> None:
    lines = {site.old: site.lines for site in find("a.py", SOURCE)}
    assert lines["3"] is None  # run on import
    assert lines["2.0"] == (5, 10)  # whoever calls the function
    assert lines["x < y"] == (7, 7) and lines["min(x, z)"] == (10, 10)


def test_code_elsewhere_does_not_change_the_draw() -> None:
    before = sample(find("a.py", SOURCE), 6, seed=1)
    longer = SOURCE.replace(b"LIMIT = 3", b"LIMIT = 3\nOTHER = LIMIT")
    after = sample(find("a.py", longer), 6, seed=1)
    assert [site.id for site in before] == [site.id for site in after]
    assert [site.start for site in before] != [site.start for site in after]
    assert {site.id for site in sample(find("a.py", SOURCE), 6, seed=2)} != {site.id for site in before}


def test_equal_changes_of_one_function_are_told_apart() -> None:
    sites = find("a.py", b"def f(x):\n    return x + 1, x + 1\n")
    assert len({site.id for site in sites}) == len(sites) == 4


def test_recorded_lines_are_those_that_ran(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n")
    recorder = Recorder(f"{tmp_path}/")
    code = compile((tmp_path / "module.py").read_text(), f"{tmp_path}/module.py", "exec")
    names: dict = {}
    exec(code, names)
    sys.settrace(recorder._call)
    try:
        names["f"](0)
    finally:
        sys.settrace(None)
    assert {line for _, line in recorder._stack[0]} == {2, 4}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs the qualified names of Python 3.11")
def test_what_is_imported_gets_the_changed_code_of_functions_alone(tmp_path: Path) -> None:
    warm = pytest.importorskip("warm")  # needs a system that can fork
    source = (
        b"LIMIT = 3\n\ndef f(x, more=1):\n    def inner(y):\n        return y + more\n    return inner(x)\n"
    )
    path = str(tmp_path / "a.py")
    names: dict = {}
    exec(compile(source, path, "exec"), names)
    changes = {site.old: site.apply(source) for site in find("a.py", source)}
    assert warm.replacements(path, source, changes["1"]) is None  # a default
    assert warm.replacements(path, source, changes["3"]) is None  # a constant
    function = names["f"]
    assert function(5) == 6
    warm.put_in(warm.replacements(path, source, changes["y + more"]))
    assert function(5) == 4 and function is names["f"]
