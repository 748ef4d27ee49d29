"""What the ComfyUI registry gets, without comfy-cli; `make pack` asks comfy-cli itself."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
import registry

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")

PUBLISHED = {
    "CHANGELOG.md", "LICENSE", "NOTICE", "README.md", "README.zh-CN.md", "SECURITY.md",
    "__init__.py", "constraints.txt", "hydit_core", "locales", "nodes", "pyproject.toml",
    "requirements.txt", "subgraphs", "web", "workflows",
}  # fmt: skip


def toml(text: str) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if not names:
        pytest.skip("no git, or not a clone")
    return names


def ignored(name: str) -> bool:
    """By .comfyignore, of which only patterns for names at the top are used."""
    lines = (ROOT / ".comfyignore").read_text("utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"/[\w.-]+/?", pattern) for pattern in patterns)
    return any(
        fnmatch.fnmatch(name, pattern[1:] + "*") if pattern.endswith("/") else name == pattern[1:]
        for pattern in patterns
    )


def test_what_is_published_is_named_here():
    """A new file at the top is either listed in .comfyignore or for users of the nodes."""
    assert {name.split("/")[0] for name in tracked() if not ignored(name)} <= PUBLISHED


def test_the_archive_has_what_the_nodes_need_and_no_tests():
    names = [name for name in tracked() if not ignored(name)]
    assert registry.faults(names) == []
    assert not [name for name in names if "test" in name.lower()]
    assert [name for name in tracked() if name.startswith("web/docs/")] == [
        name for name in names if name.startswith("web/docs/")
    ]


def test_faults_of_an_archive_are_told():
    wrong = registry.faults([*registry.NEEDED[1:], "tests/conftest.py", "web/docs/a.md"])
    assert wrong == ["__init__.py is missing", "tests/ does not belong in it: see .comfyignore"]


def test_nothing_is_installed_for_comfyui():
    project = toml(PYPROJECT)["project"]
    assert project["dependencies"] == [] and "dynamic" not in project
    assert not [
        line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line[:1] != "#"
    ]


def test_every_extra_for_the_command_line_brings_torch():
    extras = toml(PYPROJECT)["project"]["optional-dependencies"]
    assert "torch>=2.7" in extras["library"]
    for name, below in (("headless", "library"), ("train", "headless"), ("test", "train")):
        assert f"hydit[{below}]" in extras[name]


def test_the_registry_is_told_the_page_and_the_icon():
    content = toml(registry.description(PYPROJECT))
    number = content["project"]["version"]
    assert content["project"]["dependencies"] == ["comfyui-frontend-package>=1.27.10"]
    assert content["project"]["optional-dependencies"] == toml(PYPROJECT)["project"]["optional-dependencies"]
    assert content["project"]["urls"] == {"Repository": "https://github.com/OWNER/hydit"}
    assert content["tool"]["comfy"]["Icon"] == (
        f"https://raw.githubusercontent.com/OWNER/hydit/v{number}/web/icon.svg"
    )
    with pytest.raises(SystemExit, match="expected one line dependencies"):
        registry.description(PYPROJECT.replace("dependencies = []", 'dependencies = ["torch"]'))


def test_the_address_is_a_placeholder_in_one_place():
    texts = [ROOT / name for name in tracked() if not name.startswith("tests/")]
    named = [p.name for p in texts if p.suffix != ".safetensors" and b"github.com/OWNER" in p.read_bytes()]
    assert named in (["pyproject.toml"], [])


def test_a_version_is_published_under_its_tag_with_its_changes_and_an_address(monkeypatch):
    monkeypatch.delenv("COMFY_REGISTRY_TOKEN", raising=False)
    number = registry.version(PYPROJECT)
    wrong = registry.unready("v9.9.9", registry.description(PYPROJECT), "# Changelog\n")
    assert [fault.split(",")[0].split(":")[0] for fault in wrong] == [
        "the tag is v9.9.9",
        f"CHANGELOG.md says nothing of {number}",
        "Repository in pyproject.toml is still the placeholder",
        "COMFY_REGISTRY_TOKEN is not set",
    ]
    monkeypatch.setenv("COMFY_REGISTRY_TOKEN", "a token")
    ready = PYPROJECT.replace("https://github.com/OWNER/", "https://github.com/somebody/")
    assert registry.unready(f"v{number}", ready, f"## {number} - 2026-12-01\n\n* New.\n") == []


def test_the_changes_of_a_version_are_its_section():
    text = "# Changelog\n\n## 1.10.0 - today\n\n### Added\n\n* b\n\n## 1.1.0 - before\n\n* a\n"
    assert registry.changes_of(text, "1.10.0") == "### Added\n\n* b"
    assert registry.changes_of(text, "1.1.0") == "* a"
    assert registry.changes_of(text, "1.1") == registry.changes_of(text, "1.2.0") == ""
    assert registry.changes_of((ROOT / "CHANGELOG.md").read_text("utf-8"), registry.version(PYPROJECT))
