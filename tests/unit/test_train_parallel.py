"""Processes that hold parts of a model train what one process trains with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_setup import write_lora_run
from parallel_runs import run_together
from safetensors.torch import load_file
from test_train_control import write_control_run
from test_train_distill import DISTILL, without_lora_table
from test_train_distributed import several_processes
from test_train_ip_adapter import write_ip_run
from train_setup import needs_muon, records, run_training, write_run

from hydit_core.errors import ConfigError, HyditError
from hydit_core.train import checkpoint as checkpoints
from hydit_core.train.config import load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.export import export
from hydit_core.train.parallel.choice import copies_of, make

SPLIT = "run.parallel=fsdp"
OFFLOAD = "run.parallel_offload=true"
FULL = [
    "run.steps=4",
    "schedule.warmup_steps=2",
    "checkpoint.every=2",
    "validation.every=2",
    "run.gradient_checkpointing=0.5",
    "checkpoint.keep_last=9",
]
SHORT = ["run.steps=3", "schedule.warmup_steps=1", "validation.every=3"]
MUON = [
    "run.grad_accumulation=1",
    "run.steps=3",
    "schedule.warmup_steps=1",
    "optimizer.name=muon",
    "objective.train_text_encoders=false",
]
EIGHT = [*SHORT, "checkpoint.every=2", "optimizer.name=adamw_8bit", "run.grad_accumulation=1"]
WHOLE = "run.parallel=ddp"
KINDS = {
    "loha": [*SHORT, WHOLE, "checkpoint.every=2", "lora.kind=loha", "lora.rank_dropout=0.3"],
    "lokr": [*SHORT, WHOLE, "checkpoint.every=2", "lora.kind=lokr", "lora.factor=4"],
}
SAMPLES = ["samples.every=2", 'samples.prompts=["cat"]', "samples.steps=2"]
OLDER = not hasattr(
    torch.optim, "Muon"
)  # torch 2.9 brought both it and checkpoints of parts that are read here

pytestmark = [pytest.mark.slow, several_processes, pytest.mark.skipif(OLDER, reason="needs torch 2.9")]


class Place:
    """A folder with the configurations, and what was trained there."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.full = write_run(folder / "full")
        self.lora = write_lora_run(folder / "lora", model)
        self.control = write_control_run(folder / "control", model)
        self.prompts = write_ip_run(folder / "prompts", model)
        self.weights = without_lora_table(write_lora_run(folder / "weights", model))
        self.told: dict[str, list[str]] = {}

    def sets(self, name: str, batch: int, *more: str) -> list[str]:
        return [f"run.output_dir={self.folder / name}", f"run.batch_size={batch}", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Place:
    """One process with batches of 4; two and four with a half and a quarter of that each."""
    place = Place(tmp_path_factory.mktemp("parallel"), tiny_model_file)
    kinds: dict[str, tuple[Path, list[str]]] = {
        "full": (place.full, [*FULL, *SAMPLES]),
        "lora": (place.lora, SHORT),
        "control": (place.control, SHORT),
        "muon": (place.full, MUON),
        "prompts": (place.prompts, SHORT),
        "turbo": (place.lora, [*SHORT, *DISTILL]),
        "weights": (place.weights, [*SHORT, *DISTILL, "distill.train=all"]),
    }
    for name, (config, sets) in kinds.items():
        assert run_training(config, *place.sets(f"{name}1", 4, *sets))
    half = place.folder / "full2/checkpoints/step_00000002"
    two = {
        f"{name}2": (config, place.sets(f"{name}2", 2, SPLIT, *sets), None)
        for name, (config, sets) in kinds.items()
    }
    for name, sets in KINDS.items():
        middle = place.folder / f"{name}2/checkpoints/step_00000002"
        two[f"{name}2"] = (place.lora, place.sets(f"{name}2", 2, *sets), None)
        two[f"{name}-again2"] = (place.lora, place.sets(f"{name}-again2", 2, *sets), str(middle))
    # The host's memory is where everything is here, too; tests/gpu has it on a GPU.
    two["offload2"] = (place.full, place.sets("offload2", 2, SPLIT, OFFLOAD, *FULL, *SAMPLES), None)
    two["offload-again2"] = (place.full, place.sets("offload-again2", 2, SPLIT, OFFLOAD, *FULL), str(half))
    middle = place.folder / "eight2/checkpoints/step_00000002"
    for name, start in (("eight2", None), ("eight-again2", str(middle))):
        two[name] = (place.full, place.sets(name, 2, SPLIT, *EIGHT), start)
    two["whole2"] = (place.full, place.sets("whole2", 2, WHOLE, *FULL), str(half))
    four = {
        "full4": (place.full, place.sets("full4", 1, SPLIT, *FULL), str(half)),
        "hsdp4": (
            place.full,
            place.sets("hsdp4", 1, "run.parallel=hsdp", "run.parallel_replicas=2", *FULL),
            str(place.folder / "full1/checkpoints/step_00000002"),
        ),
    }
    four["eight4"] = (place.full, place.sets("eight4", 1, SPLIT, *EIGHT), str(middle))
    for world, runs in ((2, two), (4, four)):
        place.told |= dict(zip(runs, run_together(world, list(runs.values())), strict=True))
    assert run_training(place.full, *place.sets("back1", 4, *FULL), resume=str(half))
    assert run_training(place.full, *place.sets("eight1", 4, *EIGHT), resume=str(middle))
    return place


def of_steps(folder: Path, first: int = 0) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for record in records(folder):
        if record["step"] > first:
            found.setdefault(record["step"], {}).update(record)
    return found


@pytest.mark.parametrize(
    "name", ["full", "lora", "control", needs_muon("muon"), "prompts", "turbo", "weights"]
)
def test_parts_train_as_the_whole_does(place: Place, name: str) -> None:
    assert place.told[f"{name}2"] == ["", ""]
    one, two = of_steps(place.folder / f"{name}1"), of_steps(place.folder / f"{name}2")
    assert len({record["loss"] for record in one.values()}) == len(one)
    close = 1e-3 if name == "muon" else 1e-5
    digits = max(5 * close, 1.1e-4)  # of norms, four are recorded
    for step, record in one.items():
        losses = {name: value for name, value in record.items() if "loss" in name or "norm" in name}
        assert {name: two[step][name] for name in losses} == pytest.approx(losses, rel=close, abs=digits)
        assert two[step]["loss"] == pytest.approx(record["loss"], abs=close)
    files = [next((place.folder / f"{name}{n}").glob("*.safetensors")) for n in (1, 2)]
    mine, theirs = map(load_file, files)
    assert mine.keys() == theirs.keys()
    # A step of AdamW is as large as its learning rate, also where a gradient is next to nothing.
    atol = {"muon": 1e-2, "prompts": 1e-3, "turbo": 1e-3, "weights": 1e-3}.get(name, 3e-4)
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", ["back1", "whole2", "full4", "hsdp4"])
def test_other_numbers_and_kinds_of_processes_go_on(place: Place, name: str) -> None:
    """A checkpoint of halves: as a whole, two wholes, quarters; one of a whole: as twice two halves."""
    assert set(place.told.get(name, [""])) == {""}
    one, other = of_steps(place.folder / "full1", 2), of_steps(place.folder / name, 2)
    assert other.keys() == one.keys()
    for step, record in one.items():
        assert other[step]["loss"] == pytest.approx(record["loss"], abs=1e-5)
        assert other[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-3)


def test_states_in_8_bits_go_on_in_parts(place: Place) -> None:
    """Bit for bit in as many processes; with more, parts are smaller than what is packed."""
    assert {*place.told["eight2"], *place.told["eight-again2"], *place.told["eight4"]} == {""}
    names = ("eight2", "eight-again2", "eight4", "eight1")
    whole, again, four, one = (load_file(place.folder / run / "model.safetensors") for run in names)
    assert whole.keys() == again.keys() == four.keys() == one.keys()
    for key, tensor in whole.items():
        assert torch.equal(again[key], tensor), key
        torch.testing.assert_close(four[key], tensor, rtol=0, atol=1e-5)  # a step is 5e-4
        torch.testing.assert_close(one[key], tensor, rtol=0, atol=2e-4)  # packs what no half could
    content = checkpoints.load(place.folder / "eight2/checkpoints/step_00000002").tensors["optimizer"]
    assert any(name.endswith("|exp_avg.codes") for name in content)


def test_parts_in_the_hosts_memory_are_the_same_parts(place: Place) -> None:
    """Losses, samples and exports, and after a checkpoint that was read into that memory."""
    assert place.told["offload2"] == place.told["offload-again2"] == ["", ""]
    runs = [place.folder / name for name in ("full2", "offload2", "offload-again2")]
    here, there, again = (of_steps(run, 2) for run in runs)
    assert here == there == again
    exports = {(run / "model.safetensors").read_bytes() for run in runs}
    assert len(exports) == 1
    sheets = [sorted(file.read_bytes() for file in (run / "samples").iterdir()) for run in runs[:2]]
    assert sheets[0] == sheets[1]


def test_offloading_is_for_gpus(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"run.parallel_offload needs run.parallel = 'fsdp' or 'hsdp'"):
        load_config(place.full, [OFFLOAD])
    run = load_config(place.full, [SPLIT, OFFLOAD]).run
    with pytest.raises(ConfigError, match=r"from GPUs into the host's memory, and here .*: leave it out"):
        make(run, "fsdp", Processes(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"several processes, each with a GPU.*run.weights = 'bf16'"):
        make(run, "fsdp", Processes(0, 1, torch.device("cuda")))


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_adapters_go_on_bit_for_bit(place: Place, name: str) -> None:
    assert place.told[f"{name}2"] == place.told[f"{name}-again2"] == ["", ""]
    whole, again = (
        load_file(place.folder / run / "lora.safetensors") for run in (f"{name}2", f"{name}-again2")
    )
    assert whole.keys() == again.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
    assert of_steps(place.folder / f"{name}-again2") == of_steps(place.folder / f"{name}2", 2)


def test_a_checkpoint_of_parts_holds_what_one_of_a_whole_does(place: Place) -> None:
    one, two = (checkpoints.load(place.folder / f"full{n}/checkpoints/step_00000004") for n in (1, 2))
    assert one.tensors.keys() == two.tensors.keys()
    for part, tensors in one.tensors.items():
        assert tensors.keys() == two.tensors[part].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(two.tensors[part][name], tensor, rtol=1e-3, atol=3e-5)


def test_each_process_wrote_its_parts(place: Place) -> None:
    path = place.folder / "full2/checkpoints/step_00000004"
    sizes = [file.stat().st_size for file in (path / "shards").iterdir()]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    assert set(json.loads((path / "manifest.json").read_text())) == {
        "state.json",
        "pictures.safetensors",
        *(f"shards/{file.name}" for file in (path / "shards").iterdir()),
    }


def test_an_export_from_parts_is_the_file_that_training_wrote(place: Place, tmp_path: Path) -> None:
    export(place.folder / "full2", out=tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        place.folder / "full2/model.safetensors"
    ).read_bytes()


def test_pictures_are_drawn_by_all_and_written_by_one(place: Place) -> None:
    one, two = (sorted((place.folder / f"full{n}/samples").iterdir()) for n in (1, 2))
    assert [path.name for path in one] == [path.name for path in two]
    assert one[0].read_bytes() == two[0].read_bytes()  # later weights differ in their last bits


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_part_is_found(place: Place, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    older, newer = folder / "step_00000002", folder / "step_00000004"
    for path in (older, newer):
        for file in (place.folder / "full2/checkpoints" / path.name).rglob("*.*"):
            copy = path / file.relative_to(place.folder / "full2/checkpoints" / path.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    file = max((newer / "shards").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "changed" else content[:-9])
    told: list[str] = []
    found = checkpoints.load_latest(folder, told.append)
    assert found is not None and found.path == older and file.name in told[0]


def test_what_cannot_be_split_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prodigy", "came", "adafactor"):
        with pytest.raises(ConfigError, match=rf"'{name}' looks at whole tensors.*use one of adamw, muon"):
            load_config(place.full, [SPLIT, f"optimizer.name={name}", "ema.enabled=false"])
    with pytest.raises(ConfigError, match=r"parallel_replicas needs run.parallel = 'hsdp'"):
        load_config(place.full, [SPLIT, "run.parallel_replicas=2"])
    run = load_config(place.full, ["run.parallel=hsdp"]).run
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert copies_of(run, 8) == 2  # one on each machine
    with pytest.raises(HyditError, match="parallel_replicas = 3 does not divide 8 processes"):
        copies_of(run.model_copy(update={"parallel_replicas": 3}), 8)
