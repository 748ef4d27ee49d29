"""Our commands print our lines alone, whatever torchao there is."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from hydit_core.quiet import quiet_imports

ROOT = Path(__file__).resolve().parents[2]


def test_generate_prints_the_picture_and_nothing_else(tmp_path):
    """With the torchao of the test environment, which reports what it cannot load."""
    command = [sys.executable, "-m", "hydit_core.generate", "--prompt", "a red apple", "--steps", "1"]
    done = subprocess.run(
        [*command, "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "a.png")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a.png'}\n", "")


def test_what_trains_a_lora_is_imported_without_a_word():
    code = "import hydit_core.train.loop, hydit_core.train.adapters as a; from hydit_core.quiet import *\n"
    code += "from hydit_core.weights.frozen import quantizer; quantizer('nf4')\n"
    code += "with quiet_imports(): import peft, diffusers.models"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NAMES = ("torchao.kernel.intmm", "torch.utils._pytree", "transformers", "anybody")


def test_only_warnings_of_torchao_are_held_back_and_only_meanwhile():
    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.name)

    # One for each: torch 2.7 hands nothing on to the root.
    listener, heard = Listener(), []
    loggers = [logging.getLogger(name) for name in NAMES]

    def warn_all(level: int) -> list[str]:
        heard.clear()
        for logger in loggers:
            logger.log(level, "heard")
        return list(heard)

    for logger in loggers:
        logger.addHandler(listener)
    try:
        with quiet_imports():
            during, failing = warn_all(logging.WARNING), warn_all(logging.ERROR)
        after = warn_all(logging.WARNING)
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
    assert "anybody" in during and not {"torchao.kernel.intmm", "torch.utils._pytree"} & set(during)
    assert {"torchao.kernel.intmm", "torch.utils._pytree"} <= set(failing) & set(after)


def test_a_level_that_the_user_has_set_stays(caplog):
    logger = logging.getLogger("torchao")
    logger.setLevel(logging.DEBUG)
    try:
        with quiet_imports():
            logger.debug("asked for")
        assert logger.level == logging.DEBUG and "asked for" in caplog.text
    finally:
        logger.setLevel(logging.NOTSET)
    with quiet_imports():
        pass
    assert logger.level == logging.NOTSET
