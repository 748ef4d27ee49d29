"""Processes that hold parts of a model read those parts alone, and hold what a whole one would give them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lora_setup import write_lora_run
from safetensors.torch import load_file, save_file
from test_train_control import write_control_run
from test_train_distill import DISTILL, without_lora_table
from test_train_ip_adapter import write_ip_run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from train_setup import write_run

from hydit_core.train.config import load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parallel.choice import make
from hydit_core.train.parallel.copies import is_part, own
from hydit_core.train.parts import build
from hydit_core.train.sections import RunSection
from hydit_core.weights.bundle import bundle
from hydit_core.weights.frozen import dense
from hydit_core.weights.layouts import from_tencent
from hydit_core.weights.load import load_dit
from hydit_core.weights.mapped import MappedSource
from hydit_core.weights.quantise import quantise
from hydit_core.weights.source import MemorySource

RANK, WORLD = 1, 3  # which divides no number of rows here
CPU = torch.device("cpu")
needs_parts = pytest.mark.skipif(
    not dist.is_available() or not hasattr(torch.optim, "Muon"), reason="needs torch 2.9"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> dict[str, Path]:
    """The tiny model in other forms."""
    folder = tmp_path_factory.mktemp("files")
    found = {"tencent": tiny_model_file}
    dit = {
        key.removeprefix("model.diffusion_model."): tensor
        for key, tensor in load_file(tiny_model_file).items()
        if key.startswith("model.diffusion_model.")
    }
    assert dit
    theirs = from_tencent(MemorySource(dit), "diffusers")
    found["diffusers"] = folder / "diffusers.safetensors"
    save_file({key: theirs.get(key).clone() for key in theirs}, found["diffusers"])
    found["torch"] = folder / "torch.pt"
    torch.save({key: tensor.half() for key, tensor in dit.items()}, found["torch"])
    for form in ("int8_convrot", "fp8_scaled"):
        found[form] = folder / f"{form}.safetensors"
        quantise(tiny_model_file, found[form], format=form)
    return found


@pytest.mark.parametrize("name", ["tencent", "diffusers", "torch", "int8_convrot", "fp8_scaled"])
def test_rows_are_those_of_the_whole(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what is put together from others, turned and unpacked; each byte is read once."""
    view = bundle(files[name], only=("dit",)).dit
    assert view is not None
    wholes = {key: view.get(key, torch.float32).clone() for key in view}
    stored = sum(view.nbytes(key) for key in view)
    read = 0
    rows = MappedSource.rows

    def counting(self: MappedSource, key: str, start: int, stop: int, *dtype: Any) -> torch.Tensor:
        nonlocal read
        found = rows(self, key, start, stop, *dtype)
        read += found.numel() * self.dtype(key).itemsize
        return found

    monkeypatch.setattr(MappedSource, "rows", counting)
    if "_" not in name:
        monkeypatch.setattr(MappedSource, "get", lambda *_: pytest.fail("read as a whole"))
    for key, whole in wholes.items():
        third = -(-len(whole) // WORLD)
        parts = [view.rows(key, at, at + third, torch.float32) for at in range(0, 3 * third, third)]
        assert torch.equal(torch.cat(parts), whole), key
        assert torch.equal(view.rows(key, 1, 3, torch.float32), whole[1:3]), key
        read -= whole[1:3].numel() * view.dtype(key).itemsize
    assert read == stored or "_" in name


OBJECTIVES = {
    "full": ("full", []),
    "full-file": ("full-file", ["objective.train_text_encoders=true"]),
    "lora": ("lora", ["run.precision=bf16", "lora.train_t5=true"]),
    "dora": ("lora", ["lora.dora=true"]),
    "lokr": ("lora", ["lora.kind=lokr", "lora.factor=4"]),
    "fp8": ("lora", ["lora.base_precision=fp8"]),
    "control": ("control", ["run.precision=bf16"]),
    "prompts": ("prompts", []),
    "turbo": ("lora", DISTILL),
    "weights": ("weights", [*DISTILL, "distill.train=all"]),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reading")
    found = {
        "full": write_run(folder / "full"),
        "lora": write_lora_run(folder / "lora", tiny_model_file),
        "control": write_control_run(folder / "control", tiny_model_file),
        "prompts": write_ip_run(folder / "prompts", tiny_model_file),
        "weights": without_lora_table(write_lora_run(folder / "weights", tiny_model_file)),
    }
    full = without_lora_table(write_lora_run(folder / "file", tiny_model_file))
    full.write_text(full.read_text().replace('kind = "lora"', 'kind = "full"'))
    return {**found, "full-file": full}


@pytest.fixture
def group() -> Iterator[None]:
    """This process as one of several that exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def split(config: Any) -> Any:
    """The objective as the process has it, read in parts."""
    parts = build(config, deferred=True)
    assert all(p.is_meta for p in parts.dit.parameters())
    parts.split = True
    objective = make_objective(config, parts, CPU)
    make(config.run, "fsdp", Processes(RANK, WORLD, CPU)).wrap(objective.module)
    return objective


def same(config: Any) -> None:
    """What is held in parts is, bit for bit, what a process by itself would have there."""
    held, whole = split(config), make_objective(config, build(config), CPU)
    wholes = dict(whole.module.named_parameters())
    parts = dict(held.module.named_parameters())
    assert parts.keys() == wholes.keys() and held.parameters().keys() == whole.parameters().keys()
    assert not any(t.is_meta for t in (*parts.values(), *held.module.buffers()))
    assert any(is_part(part) for part in parts.values())
    for name, part in parts.items():
        expected = wholes[name].detach()
        assert part.requires_grad == wholes[name].requires_grad and part.dtype == expected.dtype, name
        if is_part(part):
            rows = -(-len(expected) // WORLD)
            assert torch.equal(own(part), expected[RANK * rows : (RANK + 1) * rows]), name
        else:
            assert torch.equal(dense(part, torch.float32), dense(expected, torch.float32)), name


@needs_parts
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_part_is_that_of_the_whole(configs: dict[str, Path], group: None, name: str) -> None:
    base, sets = OBJECTIVES[name]
    same(load_config(configs[base], sets))


@needs_parts
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("form", ["diffusers", "torch", "int8_convrot", "fp8_scaled"])
def test_of_other_files_too(
    configs: dict[str, Path], files: dict[str, Path], group: None, form: str, precision: str | None
) -> None:
    """What is quantised stays so in every process, or is unpacked and split."""
    tiny = files["tencent"]
    sets = [f"model.init_from={files[form]}", f"model.text_encoders={tiny}", f"model.vae={tiny}"]
    sets += [] if precision is None else [f"lora.base_precision={precision}"]
    same(load_config(configs["lora"], sets))


@needs_parts
@pytest.mark.parametrize("name", ["full", "full-file", "control", "prompts", "turbo", "int8"])
def test_all_can_still_be_read(configs: dict[str, Path], files: dict[str, Path], name: str) -> None:
    """Where run.parallel = "auto" finds that a whole copy fits."""
    tiny = files["tencent"]
    packed = [f"model.{key}={tiny}" for key in ("text_encoders", "vae")]
    base, sets = OBJECTIVES.get(name, ("lora", [f"model.init_from={files['int8_convrot']}", *packed]))
    config = load_config(configs[base], sets)
    late = build(config, deferred=True)
    late.read()
    held, whole = (make_objective(config, parts, CPU).module for parts in (late, build(config)))
    names = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in held.named_parameters(remove_duplicate=False)] == names
    for name, parameter in whole.named_parameters():
        found, expected = (dense(p, torch.float32) for p in (held.get_parameter(name), parameter))
        assert torch.equal(found, expected) and not held.get_parameter(name).is_meta, name


def local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor._local_tensor if is_part(tensor) else tensor
    return found


class Live(TorchDispatchMode):
    """The most bytes of memory that was made by operations and in use at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {local(t).untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
        for tensor in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = local(tensor).untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return found


@needs_parts
def test_a_whole_model_is_never_there(files: dict[str, Path], group: None) -> None:
    """At most its part, and one tensor."""
    run = RunSection.model_construct(precision="fp32")

    def most(deferred: bool) -> tuple[int, int, int]:
        with Live() as live:
            dit, _ = load_dit(files["torch"], dtype=torch.float32, deferred=deferred)
            sizes = [4 * p.numel() for p in dit.parameters()]
            make(run, "fsdp", Processes(RANK, WORLD, CPU)).wrap(dit)
        return live.most, sum(sizes), max(sizes)

    found, whole, largest = most(True)
    part = -(-whole // WORLD)
    assert part <= found <= 1.05 * part + 1.5 * largest < 0.6 * whole
    assert most(False)[0] >= whole  # what this counts, it would see
