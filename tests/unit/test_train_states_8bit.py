"""AdamW's states in 8 bits where processes hold parts of parameters: as in one process, and from there on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydit_core.train.optim import parameter_groups
from hydit_core.train.optimizer_kinds import packs, state_bytes
from hydit_core.train.optimizers import Optimizers
from hydit_core.train.parallel.copies import is_part, own
from hydit_core.train.sections import OptimizerSection

pytest.importorskip("torchao")
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not hasattr(torch.optim, "Muon"), reason="needs torch 2.9"
)
SHAPES = {"square": (128, 128), "uneven": (33, 256), "small": (32, 16), "bias": (128,)}
CONFIG = OptimizerSection(name="adamw_8bit", lr=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Any]:
    """This process as the last of so many."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = request.param
    dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
    yield init_device_mesh("cpu", (world,))
    dist.destroy_process_group()


def part(whole: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    rows = math.ceil(len(whole) / mesh.size())
    mine = whole[mesh.get_local_rank() * rows :].clone()
    how: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
    return DTensor.from_local(mine, mesh, [Shard(0)], **how)


class Run:
    """An optimizer over parameters, or over this process's parts of them, and steps with set gradients."""

    def __init__(self, values: dict[str, Tensor], mesh: Any = None) -> None:
        self.mesh = mesh
        self.named = {
            name: nn.Parameter(value.clone() if mesh is None else part(value, mesh))
            for name, value in values.items()
        }
        self.optimizer = Optimizers(parameter_groups(self.named, CONFIG), self.named, CONFIG)

    def train(self, steps: range) -> Run:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for name, parameter in self.named.items():
                gradient = torch.randn(SHAPES[name], generator=generator)
                parameter.grad = gradient if self.mesh is None else part(gradient, self.mesh)
            self.optimizer.step(1.0)
        return self

    def held(self) -> dict[str, Tensor]:
        return {name: own(p).clone() for name, p in self.named.items()}


def fresh() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def as_read(state: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    """As a checkpoint is read: what has the shape of its parameter is split as that is."""
    return {
        key: part(value, mesh) if tuple(value.shape) == SHAPES[key.partition("|")[0]] else value
        for key, value in state.items()
        if not key.startswith("group:")
    } | {key: value for key, value in state.items() if key.startswith("group:")}


@pytest.mark.parametrize("mesh", [2, 4], indirect=True)
def test_parts_step_and_go_on_as_the_whole_does(mesh: Any) -> None:
    """What both have in 8 bits, bit for bit, from a checkpoint of the whole as well."""
    whole, parts = Run(fresh()).train(range(4)), Run(fresh(), mesh).train(range(4))
    same = [name for name, shape in SHAPES.items() if packs(shape) == packs(shape, mesh.size())]
    assert same == ["square", "small", "bias"]
    state = {key: value.clone() for key, value in whole.optimizer.state().items()}  # as a file has it
    later = Run({name: p.detach() for name, p in whole.named.items()}, mesh)
    later.optimizer.load(as_read(state, mesh))
    assert later.optimizer.state().keys() == parts.optimizer.state().keys()
    for run in (whole, parts, later):
        run.train(range(4, 8))
    ends = {name: own(part(p.detach(), mesh)) for name, p in whole.named.items()}
    for name in same:
        assert torch.equal(parts.held()[name], ends[name]), name
        assert torch.equal(later.held()[name], ends[name]), name
    # Of an uneven one, the parts have states in float32; 8 steps of 1e-2 are at most 0.08.
    torch.testing.assert_close(parts.held()["uneven"], ends["uneven"], rtol=0, atol=0.02)
    torch.testing.assert_close(later.held()["uneven"], ends["uneven"], rtol=0, atol=0.02)


@pytest.mark.parametrize("mesh", [2], indirect=True)
def test_a_whole_goes_on_from_parts(mesh: Any) -> None:
    """The states of the parts, put side by side, are those of the whole; what was in float32 is packed."""
    whole, parts = Run(fresh()).train(range(4)).optimizer.state(), Run(fresh(), mesh).train(range(4))
    found = parts.optimizer.state()
    for key in ("codes", "scale", "qmap", "signed"):
        for moment in ("exp_avg", "exp_avg_sq"):
            mine, theirs = found[f"square|{moment}.{key}"], whole[f"square|{moment}.{key}"]
            assert mine.shape == theirs.shape and is_part(mine) == (key in ("codes", "scale"))
            assert torch.equal(own(mine), theirs[-len(own(mine)) :] if theirs.ndim else theirs)
    assert found["uneven|exp_avg"].dtype == torch.float32 and "uneven|exp_avg.codes" in whole
    plain = {"uneven|exp_avg", "uneven|exp_avg_sq"}
    exact = Run(fresh()).train(range(4)).optimizer
    moments = {key: torch.randn(SHAPES["uneven"]).abs() for key in plain}
    kept = {key: value for key, value in whole.items() if not key.startswith("uneven|exp")} | moments
    exact.load(kept)
    again = exact.state()
    for key in plain:
        codes, scale, qmap = (again[f"{key}.{name}"] for name in ("codes", "scale", "qmap"))
        values = qmap[codes.int()] * scale.repeat_interleave(256).view(codes.shape)
        limits = scale.repeat_interleave(256).view(codes.shape)
        assert ((values - moments[key]).abs() <= 0.02 * limits).all()


@pytest.mark.parametrize("mesh", [2, 4], indirect=True)
def test_what_is_kept_is_what_is_estimated(mesh: Any) -> None:
    state = Run(fresh(), mesh).train(range(1)).optimizer.state()
    for name, shape in SHAPES.items():
        kept = [v for k, v in state.items() if k.startswith(f"{name}|exp") and "qmap" not in k and v.ndim]
        held = part(torch.empty(shape), mesh)
        expected = state_bytes("adamw_8bit", shape, mesh.size(), own(held).numel())
        assert sum(own(v).nbytes for v in kept) == pytest.approx(expected, abs=1), name
