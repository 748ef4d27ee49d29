"""A judge of pictures that the user names: a function in a Python file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ..errors import ConfigError
from .figures import Judge


def load_judge(text: str) -> Judge:
    """Import ``FILE.py:FUNCTION``; modules beside the file can be imported by it.

    Raises :class:`ConfigError` if there is no such file or function, or the file cannot be imported.
    """
    name, colon, function = text.rpartition(":")
    path = Path(name).expanduser()
    if not colon or not function.isidentifier():
        raise ConfigError(f"--judge {text}: write FILE.py:FUNCTION")
    if not path.is_file():
        raise ConfigError(f"--judge {text}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"hydit_judge_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--judge {text}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[spec.name] = module  # dataclasses look for theirs there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[spec.name]
        raise ConfigError(f"--judge {text}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"--judge {text}: {path} has no function {function}")
    judge: Judge = found
    return judge
