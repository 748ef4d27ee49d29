"""What is prepared while others train: in order, the same as within the step, and hidden behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import line_trainer, names
from safetensors.torch import load_file
from tiny import bert_vocab, spiece_model
from train_setup import PICTURES, records, run_training, write_run

from hydit_core.data import workers
from hydit_core.data.config import CacheConfig, DataConfig
from hydit_core.text.encoders import TextEncoders
from hydit_core.train import conditioning, encoding
from hydit_core.train.batches import made_ahead
from hydit_core.train.conditioning import TextSource
from hydit_core.train.encoding import Encoding

CPU = torch.device("cpu")


def taken(made: list[str]) -> Iterator[Any]:
    for number in range(9):
        made.append(f"take {number}")
        yield number


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_so_many_are_made_ahead_and_no_more(depth: int) -> None:
    made: list[str] = []
    done = threading.Semaphore(0)

    def make(number: int, batch: Any) -> int:
        made.append(f"make {number}")
        done.release()
        return number + batch

    ahead = made_ahead(taken(made), range(9), make, depth)
    assert next(ahead) == 0
    for _ in range(1 + depth):
        assert done.acquire(timeout=10)
    assert not done.acquire(timeout=0.05)
    assert made == [f"{what} {number}" for number in range(1 + depth) for what in ("take", "make")]
    assert list(ahead) == [2, 4, 6, 8, 10, 12, 14, 16]


def test_an_error_comes_when_it_is_due_and_closing_ends_the_thread() -> None:
    source = taken([])

    def make(number: int, batch: Any) -> int:
        if number == 2:
            raise ValueError("the third")
        return number

    ahead = made_ahead(source, range(9), make, 4)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(ahead)
    other = made_ahead(taken([]), range(9), lambda number, batch: number, 3)
    next(other)
    other.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_a_run_is_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and records, bit for bit; interrupted within a step and continued, too."""
    config = write_run(tmp_path)
    sets = ["run.steps=3", "schedule.warmup_steps=1", "validation.every=2"]
    sets += ["objective.train_text_encoders=false"]
    whole = Encoding.__init__
    for name, ahead in (("within", False), ("ahead", True), ("stopped", True)):
        monkeypatch.setattr(
            encoding.Encoding, "__init__", lambda self, *a, ahead=ahead: whole(self, *a, ahead=ahead)
        )
        own = [*sets, f"run.output_dir={tmp_path / name}"]
        if name == "stopped":
            assert not run_training(config, *own, stop_after_micro=3)
            assert names(tmp_path / name) == ["step_00000001_micro_1"]
        assert run_training(config, *own, resume="auto" if name == "stopped" else None)
    for name in ("ahead", "stopped"):
        assert records(tmp_path / name) == records(tmp_path / "within")
        for part in ("weights", "optimizer", "ema"):
            file = f"checkpoints/step_00000003/{part}.safetensors"
            found, expected = load_file(tmp_path / name / file), load_file(tmp_path / "within" / file)
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_encoding_hides_behind_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding takes two thirds as long as a step: when a step asks for its batch, that is encoded, up to a
    tenth of the time. What the machine itself makes a step wait, busy with other programs, is not counted.
    """
    encode = 0.04

    def hidden(folder: Path) -> float:
        trainer = line_trainer(folder, steps=12, during=lambda number: time.sleep(1.5 * encode))
        inputs, take = trainer.objective.inputs, trainer._next
        asked: list[float] = []
        spans: list[tuple[float, float]] = []

        def slow(batch: Any, draws: Any) -> dict[str, Any]:
            begun = time.monotonic()
            time.sleep(encode)
            spans.append((begun, time.monotonic()))
            return inputs(batch, draws)

        def taking(batches: Any) -> Any:
            asked.append(time.monotonic())
            return take(batches)

        monkeypatch.setattr(trainer.objective, "inputs", slow)
        monkeypatch.setattr(trainer, "_next", taking)
        trainer.encoding.ahead = True
        assert trainer.run() and len(spans) == len(asked) == 12
        pairs = [*zip(spans, asked, strict=True)][1:]  # nothing is computed before the first
        seen = sum(max(0.0, end - max(begun, moment)) for (begun, end), moment in pairs)
        return 1 - seen / sum(end - begun for (begun, end), _ in pairs)

    assert any(hidden(tmp_path / str(number)) >= 0.9 for number in range(3))


def test_validation_and_samples_have_the_encoders_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = line_trainer(tmp_path, steps=4, validation={"every": 1})
    trainer.encoding.ahead = True
    inputs, using = trainer.objective.inputs, threading.Lock()

    def alone(batch: Any, draws: Any) -> dict[str, Any]:
        assert using.acquire(blocking=False), "two threads encode at a time"
        try:
            time.sleep(0.002)
            return inputs(batch, draws)
        finally:
            using.release()

    monkeypatch.setattr(trainer.objective, "inputs", alone)
    assert trainer.run()


# -- captions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return TextEncoders.build(bert, t5, bert_vocab(), spiece_model(), 12, 16).requires_grad_(False).eval()


@pytest.mark.parametrize("together", [1, 4])
def test_a_caption_is_the_same_in_any_company(encoders: TextEncoders, together: int) -> None:
    """In another batch, another group, after more or fewer others; and what the encoders give for it."""
    texts = [*PICTURES]
    one = TextSource(encoders, CPU, trained=False, together=together)(texts, texts)
    other = TextSource(encoders, CPU, trained=False, together=together)
    for text in reversed(texts):
        other([text], [""])
    backwards = other(texts[::-1], texts[::-1])
    for found, expected, whole in zip(one, backwards, encoders.encode(texts), strict=True):
        assert torch.equal(found, expected.flip(0))
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    mixed = other([texts[2]], [texts[5]])
    assert torch.equal(mixed.bert[0], one.bert[2]) and torch.equal(mixed.t5[0], one.t5[5])


def test_captions_are_encoded_in_groups_and_once(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    encode = encoders.encode
    monkeypatch.setattr(encoders, "encode", lambda texts: groups.append(texts) or encode(texts))
    source = TextSource(encoders, CPU, trained=False, together=3)
    texts = [*PICTURES][:5]
    source([*texts, texts[0]], [*texts[:5], ""])
    assert [len(group) for group in groups] == [3, 3] and {t for g in groups for t in g} == {*texts, ""}
    source(texts, texts)
    assert len(groups) == 2


def test_what_was_used_last_is_remembered_up_to_a_size(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(part.nbytes for part in encoders.encode("cat"))
    monkeypatch.setattr(conditioning, "CACHE_BYTES", 3 * size)
    seen: list[str] = []
    encode = encoders.encode
    monkeypatch.setattr(encoders, "encode", lambda texts: seen.extend(texts) or encode(texts))
    source = TextSource(encoders, CPU, trained=False)
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        source([text], [text])
    assert seen == ["a", "b", "c", "d", "b"]


# -- processes ---------------------------------------------------------------------------------------


def test_how_many_processes_prepare_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(on_gpu: bool, cores: int, here: int = 1, **options: Any) -> int:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
        monkeypatch.setattr(workers, "cores", lambda: cores)
        monkeypatch.setattr(workers.sys, "platform", "linux")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        return workers.chosen_workers(DataConfig(sources=[{"path": "x"}], **options))

    assert count(False, 64) == 0 and count(False, 64, workers=3) == 3 and count(True, 64, workers=0) == 0
    assert (count(True, 64), count(True, 4), count(True, 1), count(True, 32, 8), count(True, 2, 8)) == (
        8, 3, 0, 3, 0,
    )  # fmt: skip
    assert count(True, 64, cache=CacheConfig(latents=True)) == 2
