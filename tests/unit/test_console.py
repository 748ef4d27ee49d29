"""The command ``hydit`` in front of the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import warm_commands

import hydit_core
from hydit_core import __main__ as console
from hydit_core import errors

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")

# As the script that pip installs calls it.
SCRIPT = "import sys; sys.argv[0] = '/usr/bin/hydit'; from hydit_core.__main__ import main; sys.exit(main())"


def hydit(*arguments: str, start: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def test_pip_installs_the_command():
    assert re.search(r'^\[project\.scripts\]\nhydit = "hydit_core\.__main__:main"$', PYPROJECT, re.MULTILINE)


def test_help_and_version_are_told_without_torch(monkeypatch, capsys):
    code = (
        "import sys; from hydit_core.__main__ import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0 and main(['lor']) == 2\n"
        "assert not {'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)"
    )
    done = hydit(start=code)
    assert done.returncode == 0
    assert all(re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE) for name in console.COMMANDS)
    assert f"hydit {hydit_core.__version__}\nPython " in done.stdout
    assert f"torch {metadata.version('torch')}" in done.stdout
    assert "no command 'lor', only: generate, train, weights, lora" in done.stderr


def test_every_module_with_a_command_line_is_a_command():
    folders = {path.parent.name for path in (ROOT / "hydit_core").glob("*/__main__.py")}
    assert folders == set(console.COMMANDS)


def test_nothing_at_all_is_answered_by_the_commands(capsys):
    assert console.main([]) == 2
    assert "usage: hydit COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("start", [SCRIPT, ""])
def test_the_command_gives_the_arguments_on_and_returns_the_code(start):
    name = "hydit weights" if start else "python -m hydit_core.weights"
    command = ["-c", start] if start else ["-m", "hydit_core"]
    done = warm_commands.start(*command, "weights", "--help", cwd=ROOT).wait()
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name} ")
    done = warm_commands.start(*command, "weights", "inspect", "no such.safetensors", cwd=ROOT).wait()
    assert done.returncode == 2 and done.stderr == "error: no such.safetensors does not exist\n"


@pytest.mark.parametrize("command", ["generate", "train", "train report", "weights", "lora"])
def test_usage_says_what_was_typed(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hydit", *command.split()])
    assert errors.program(command) == f"hydit {command}"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "hydit_core" / "train" / "__main__.py")])
    assert errors.program(command) == f"python -m hydit_core.{command}"


def test_a_package_that_is_missing_is_named_with_the_way_to_install_it():
    missing = "import sys; sys.modules['torch'] = None; " + SCRIPT
    done = hydit("lora", "--help", start=missing)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: hydit lora needs the package torch, which is not installed")
    assert 'pip install -e ".[headless]"' in done.stderr


def test_the_version_stands_in_one_place(tmp_path):
    (stated,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert hydit_core.__version__ == stated
    code = [*ROOT.glob("*.py"), *ROOT.glob("hydit_core/**/*.py"), *ROOT.glob("nodes/**/*.py")]
    assert len(code) > 50 and not [path for path in code if f'"{stated}"' in path.read_text("utf-8")]


def test_the_version_of_code_that_was_copied_is_told(tmp_path):
    """Of the folder that it lies in, whatever is installed; and no other project's."""
    package = tmp_path / "hydit_core"
    package.mkdir()
    package.joinpath("version.py").write_text((ROOT / "hydit_core" / "version.py").read_text("utf-8"))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace(hydit_core.__version__, "9.8.7"))
    show = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(package)!r}); import version; print(version.VERSION)",
    ]
    assert subprocess.check_output(show, text=True) == "9.8.7\n"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9.8.7"\n')
    assert subprocess.check_output(show, text=True) != "9.8.7\n"
    os.remove(tmp_path / "pyproject.toml")
    assert subprocess.check_output(show, text=True) != "9.8.7\n"


def test_a_gpu_that_is_too_small_is_told_in_one_line(capsys):
    import torch

    def run():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    assert errors.cli_main(run) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Use a smaller size")
    assert said.count("\n") == 1

    def other():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        errors.cli_main(other)
