"""Weights that are on the device only while they compute: the same pictures, in order and within bounds."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, write_tiny_model
from tiny_models import encode, inputs, randomize, tiny
from torch import nn

import hydit_core
from hydit_core import ConfigError, ControlNet, HyditError
from hydit_core.control import ControlInput
from hydit_core.lora.adapter import Adapter
from hydit_core.lora.kinds import LoRA
from hydit_core.model.dit import DiT
from hydit_core.offload import copier as copiers
from hydit_core.offload.copier import Copier, CudaCopier, copier_for
from hydit_core.offload.guests import Guest, Streamed, Whole, layers_of, network_size, size_of
from hydit_core.offload.placement import Offload
from hydit_core.weights import frozen


class Late(Copier):
    """A device that lags behind, as a GPU may.

    Copies hold nothing until what computes waits for them, and what it was given to compute is done only when
    the host waits.
    """

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.log = []
        self.given = self.passed = 0
        self.alive = self.peak = 0

    def start(self, tensors):
        copies = [torch.full_like(tensor, 99) for tensor in tensors]
        self.log.append(("start", len(self.log)))
        size = sum(map(size_of, copies))
        self.alive += size
        self.peak = max(self.peak, self.alive)
        for copy, part in zip(copies, map(size_of, copies), strict=True):
            weakref.finalize(copy.untyped_storage(), self._freed, part)
        return copies, [(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True)]

    def _freed(self, size):
        self.alive -= size
        assert self.passed == self.given or self.alive > 0

    def use(self, mark):
        for copy, tensor in mark:
            copy.data.copy_(tensor.data)
        mark.clear()

    def mark(self):
        self.given += 1
        return self.given

    def wait(self, mark):
        self.passed = max(self.passed, mark)


@pytest.fixture(scope="module")
def usual(tiny_model_file):
    return hydit_core.load(tiny_model_file, device="cpu")


def offloaded(path, mode):
    pipe = hydit_core.load(path, device="cpu", offload=mode)
    pipe.placement = Offload(torch.device("cpu"), mode, copier=Late())
    return pipe


def everything(pipe):
    """Two prompts, two pictures each, from a picture, with two ControlNets and a LoRA."""
    for name, net in (("dit", pipe.dit), ("t5", pipe.text.t5)):
        linear = next(key for key, value in net.named_modules() if isinstance(value, nn.Linear))
        weight = net.get_submodule(linear).weight
        down, up = torch.ones(2, weight.shape[1]) / 50, torch.ones(weight.shape[0], 2) / 50
        pipe.load_lora(Adapter({f"{name}.{linear}": [LoRA({"down": down, "up": up})]}))
    controls = []
    for seed in (1, 2):
        net = ControlNet(TINY).requires_grad_(False)
        randomize(net, seed)
        controls.append(ControlInput(net, Image.linear_gradient("L").convert("RGB"), start=0.2 * seed))
    start = Image.radial_gradient("L").convert("RGB")
    return pipe(
        ["a red apple", "红苹果"],
        seed=2,
        batch=2,
        sampler="ddpm",
        steps=4,
        init_image=start,
        strength=0.8,
        controls=controls,
    )


@pytest.fixture(scope="module")
def expected(tiny_model_file):
    return everything(hydit_core.load(tiny_model_file, device="cpu"))


@pytest.mark.parametrize("mode", ["encoders", "blocks"])
def test_pictures_are_the_same_bit_for_bit(tiny_model_file, mode, expected):
    pipe = offloaded(tiny_model_file, mode)
    before = {name: id(p) for name, p in pipe.dit.named_parameters()}
    found = everything(pipe)
    for one, other in zip(expected, found, strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
    # The originals are back, and no copy is left.
    assert {name: id(p) for name, p in pipe.dit.named_parameters()} == before
    copier = pipe.placement._copier
    assert copier.alive == 0 and copier.passed == copier.given


def streamed(depth=8):
    model = DiT(tiny(depth)).requires_grad_(False)
    randomize(model, 3)
    copier = Late()
    return model, copier, Streamed(model, layers_of(model), copier)


def test_the_next_block_is_on_its_way_before_one_computes_and_three_are_there_at_most():
    model, copier, stream = streamed()
    events = []
    for index, guest in enumerate(stream._layers):
        start, forget = guest.start, guest.forget

        def started(index=index, guest=guest, start=start):
            if not guest.here:
                events.append(("copy", index))
            start()

        def forgotten(index=index, forget=forget):
            events.append(("forget", index))
            forget()

        guest.start, guest.forget = started, forgotten
        model.blocks[index].mlp.register_forward_hook(lambda *_, index=index: events.append(("run", index)))
    values = inputs(model.config, (8, 8))
    stream.enter()
    for _ in range(2):
        model(values["x"], values["t"], encode(model, values))
    there, most = set(), 0
    for what, index in events:
        if what == "copy":
            there.add(index)
        elif what == "forget":
            there.discard(index)
        else:
            assert index in there and (index + 1) % 8 in there  # the first, too, for the next step
        most = max(most, len(there))
    assert most == 3
    assert [index for what, index in events if what == "run"] == [*range(8)] * 2
    assert [index for what, index in events if what == "copy"] == [*range(8), *range(8), 0]
    block, rest = size_of_blocks(model)
    assert copier.peak <= rest + 3 * block
    stream.leave()
    assert copier.alive == 0


def size_of_blocks(model):
    blocks = [network_size(block) for block in model.blocks]
    return max(blocks), network_size(model) - sum(blocks)


def test_few_blocks_stay(monkeypatch):
    """Two blocks are always among the three."""
    model, copier, stream = streamed(depth=2)
    values = inputs(model.config, (8, 8))
    expected = model(values["x"], values["t"], encode(model, values))
    stream.enter()
    for _ in range(3):
        assert torch.equal(model(values["x"], values["t"], encode(model, values)), expected)
    assert len([entry for entry in copier.log if entry[0] == "start"]) == 3  # the rest, and two blocks
    stream.leave()


def test_all_texts_are_encoded_before_sampling_and_then_the_encoders_are_gone(tiny_model_file):
    pipe = offloaded(tiny_model_file, "encoders")
    copier, events = pipe.placement._copier, []
    for name, net in (("text", pipe.text), ("dit", pipe.dit), ("decoder", pipe.vae.model.decoder)):
        net.register_forward_hook(lambda *_, name=name: events.append((name, copier.alive)))
    pipe(["a red apple", "red", "apple"], "green", steps=2)
    assert [name for name, _ in events] == ["text"] * 4 + ["dit", "dit", "decoder"] * 3
    sizes = {"dit": pipe.dit, "decoder": pipe.vae, "text": pipe.text}
    assert all(alive == network_size(sizes[name]) for name, alive in events)


def test_each_picture_is_ready_before_the_next_is_drawn(tiny_model_file):
    pipe = offloaded(tiny_model_file, "blocks")
    steps = []
    settings = pipe.settings(steps=2)
    drawn = pipe.pictures(["red", "apple"], settings, callback=lambda i, *_: steps.append(i))
    next(drawn)
    assert steps == [1, 2]
    drawn.close()  # given up between two pictures
    assert pipe.placement._copier.alive == 0


@pytest.mark.parametrize("mode", ["encoders", "blocks"])
def test_after_an_error_everything_is_back_and_the_next_run_succeeds(tiny_model_file, usual, mode):
    pipe = offloaded(tiny_model_file, mode)
    bias = pipe.dit.blocks[2].mlp.fc2.bias
    value = bias.data.clone()
    bias.data[0] = torch.inf
    with pytest.raises(HyditError, match=r"first in blocks\.2\.mlp\.fc2"):
        pipe("a red apple", seed=1)
    assert pipe.dit.blocks[2].mlp.fc2.bias is bias and pipe.placement._copier.alive == 0
    bias.data.copy_(value)
    assert not pipe.dit.blocks[0]._forward_hooks and not pipe.dit.blocks[0]._forward_pre_hooks
    assert (np.asarray(pipe("a red apple", seed=1)[0]) == np.asarray(usual("a red apple", seed=1)[0])).all()


def test_tensors_of_other_classes_go_along():
    """An int8 base, whose weights are objects of torchao."""
    model = DiT(tiny(4), operations=frozen.OPERATIONS).requires_grad_(False)
    randomize(model, 3)
    frozen.store(model, "int8")
    kinds = {type(p.data) for p in model.parameters()}
    assert len(kinds) == 2  # and plain ones
    values = inputs(model.config, (8, 8))
    expected = model(values["x"], values["t"], encode(model, values))
    for visit in (Whole(model, Copier(torch.device("cpu"))), Streamed(model, model.blocks, Moved())):
        visit.enter()
        assert torch.equal(model(values["x"], values["t"], encode(model, values)), expected)
        visit.leave()
    assert {type(p.data) for p in model.parameters()} == kinds
    linear = model.blocks[0].mlp.fc1.weight
    assert linear.numel() <= size_of(linear) < 2 * linear.numel()


class Moved(Copier):
    """Copies of every class of tensors, by its own method."""

    def __init__(self):
        super().__init__(torch.device("cpu"))

    def start(self, tensors):
        return [tensor.clone() for tensor in tensors], None


def test_a_tensor_in_two_places_is_copied_once_and_stays_one():
    table = nn.Embedding(10, 4)
    both = nn.ModuleList([table, nn.Linear(4, 10, bias=False)])
    both[1].weight = table.weight
    guest = Guest(both.modules(), Moved())
    assert guest.size == network_size(both) == 160
    guest.enter()
    assert both[1].weight is both[0].weight is not table.register_parameter
    assert both[1].weight.data_ptr() != guest._originals[0].data_ptr()
    guest.leave()
    assert both[1].weight is table.weight


def test_a_vae_that_had_to_turn_float32_stays_so(tiny_model_file):
    pipe = hydit_core.load(tiny_model_file, device="cpu", dtype="float16", offload="encoders")
    pipe.placement = Offload(torch.device("cpu"), "encoders", copier=Moved())
    with pipe.placement.visiting(pipe.vae):
        pipe.vae.model.float()
    assert pipe.vae.dtype == torch.float32
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}


def test_pinning_is_bounded_by_what_the_host_has_left(monkeypatch):
    copier = CudaCopier.__new__(CudaCopier)
    monkeypatch.setattr(copiers, "available_memory", lambda: 1000)
    assert copier.pins(500) and not copier.pins(501)
    monkeypatch.setattr(copiers, "available_memory", lambda: None)  # not on Linux
    assert not copier.pins(1)
    assert not copier_for(torch.device("cpu")).pins(1)


def test_available_memory_is_that_of_the_process(monkeypatch, tmp_path):
    meminfo = "MemTotal: 2000 kB\nMemAvailable: 900 kB\n"
    files = {"/proc/meminfo": meminfo, "memory.max": "max", "memory.current": "700000"}

    class Fake:
        def __init__(self, name):
            self.name = name

        def __truediv__(self, name):
            return Fake(name)

        def read_text(self, encoding):
            if self.name not in files:
                raise FileNotFoundError
            return files[self.name]

    monkeypatch.setattr(copiers, "Path", Fake)
    assert copiers.available_memory() == 900 * 1024
    files["memory.max"] = "1000000"
    assert copiers.available_memory() == 300000
    files["/proc/meminfo"] = "nothing"
    assert copiers.available_memory() is None


def test_unknown_modes_are_refused(tiny_model_file):
    with pytest.raises(ConfigError, match="unknown offload 'some': use one of off, encoders, blocks"):
        hydit_core.load(tiny_model_file, device="cpu", offload="some")


def test_old_models_with_sizes_and_styles(tmp_path):
    """An embedding outside the blocks stays on the host."""
    from tiny import TINY_V11

    path = write_tiny_model(tmp_path / "old.safetensors", TINY_V11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hydit_core.load(path, device="cpu")("a red apple", seed=4)[0]
        assert (np.asarray(offloaded(path, "blocks")("a red apple", seed=4)[0]) == np.asarray(expected)).all()
