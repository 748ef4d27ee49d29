"""Compiled blocks, and steps in which the host never waits for the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encode, inputs, randomize, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import hydit_core
from hydit_core import HyditError, finite, pipeline
from hydit_core.control import Controls, PreparedControl
from hydit_core.diffusion.guidance import GuidedDenoiser
from hydit_core.diffusion.samplers import SAMPLERS, noise_sampler_from
from hydit_core.diffusion.schedule import Schedule
from hydit_core.facts import DiffusionConfig
from hydit_core.finite import FiniteWatch
from hydit_core.model import compiled
from hydit_core.model.attention import ImageContext, training_attention
from hydit_core.model.compiled import compile_blocks, compile_networks
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import Context, DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.model.trunk import Trunk
from hydit_core.offload.copier import Copier
from hydit_core.offload.guests import Streamed
from hydit_core.vae import VAE
from hydit_core.weights import kitchen
from hydit_core.weights.packed import INT8, Scheme, group_for, pack


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


def made(cls, seed=3, depth=8, **options):
    model = cls(tiny(depth), **options).requires_grad_(False)
    randomize(model, seed)
    return model


class Moved(Copier):
    """Copies that are other tensors, though on the CPU as well."""

    def __init__(self):
        super().__init__(torch.device("cpu"))

    def start(self, tensors):
        return [tensor.clone() for tensor in tensors], None


class Counting:
    """A backend that runs graphs as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_one_graph_for_each_kind_of_block_whatever_runs_them():
    """Any number of tokens, DiT and ControlNet, other weights, blocks that stream."""
    model, net, backend = made(DiT), made(ControlNet, 4), Counting()

    def run(size):
        values = inputs(model.config, size)
        control = net(values["x"], values["t"], encode(net, values), values["hint"])
        return model(values["x"], values["t"], encode(model, values), control)

    with torch.no_grad():
        sizes = [(10, 12), (11, 14), (16, 8)]
        expected = [run(size) for size in sizes]
        for network in (model, net, model):
            compile_blocks(network, backend=backend)
        for size, one in zip(sizes, expected, strict=True):
            close(run(size), one)
        stream = Streamed(model, model.blocks, Moved())
        stream.enter()
        close(run(sizes[1]), expected[1])
        stream.leave()
        model.blocks[1].mlp.fc1.weight.data *= 1.5  # as a LoRA does
        assert (run(sizes[0]) - expected[0]).abs().max() > 1e-3
    assert backend.graphs == 2


def test_compiled_int8_weights_are_as_far_from_dense_ones_as_uncompiled_ones():
    """Activations are rounded to 8 bits as well, so a last bit moves the result; to where is compared."""
    pytest.importorskip("comfy_kitchen")
    model, dense = made(DiT, depth=2), made(DiT, depth=2)
    for layer, twin in zip(model.blocks.modules(), dense.blocks.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear):
            packed = pack(layer.weight, Scheme(INT8, rows=True, group=group_for(layer.in_features)))
            layer.weight = torch.nn.Parameter(kitchen.keep(packed, torch.float32, "cpu"), requires_grad=False)
            twin.weight.data = packed.dense()
    values = inputs(model.config, (16, 16))

    def run(network):
        return network(values["x"], values["t"], encode(network, values))

    with torch.no_grad():
        expected, eager = run(dense), run(model)
        compile_blocks(model, backend="aot_eager")
        found = run(model)

    def distance(result):
        return (result - expected).square().mean().sqrt() / expected.std()

    assert 1e-4 < distance(eager) < 0.1
    assert distance(found) < 1.3 * distance(eager)


def test_graphs_for_image_prompts():
    """One more for each number of them, whatever their weights; blocks that see none need none."""
    model, backend = made(DiT, depth=2), Counting()
    adapter = IPAdapter(IPAdapterConfig.for_dit(model.config, 12, 3)).requires_grad_(False)
    randomize(adapter, 5)
    values = inputs(model.config, (10, 12))

    def seen(*blocks):
        attended = adapter(torch.randn(len(values["x"]), 12, generator=torch.Generator().manual_seed(1)))
        return [ImageContext([one] * count) for one, count in zip(attended, blocks, strict=True)]

    def run(images):
        return model(values["x"], values["t"], encode(model, values), images=images)

    with torch.no_grad():
        cases = [None, seen(0, 0), seen(1, 0), seen(1, 1), seen(2, 0)]
        expected = [run(case) for case in cases]
        assert torch.equal(expected[0], expected[1]) and (expected[0] - expected[2]).abs().max() > 1e-3
        compile_blocks(model, backend=backend)
        found = [run(case) for case in cases]
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert backend.graphs == 3
    assert torch._dynamo.config.recompile_limit >= 64


def test_gradients_of_compiled_blocks():
    """As in training, with recomputation in the backward pass."""

    def gradients(whether):
        model = made(DiT, depth=2, attention=training_attention).requires_grad_(True)
        model.gradient_checkpointing = 1.0
        if whether:
            compile_blocks(model, backend="eager")
        values = inputs(model.config, (8, 8))
        model(values["x"], values["t"], encode(model, values)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    close(gradients(True), gradients(False))


def test_pictures_and_the_name_of_a_layer_that_overflows(tiny_model_file, monkeypatch):
    monkeypatch.setattr(pipeline, "compile_blocks", partial(compile_blocks, backend="eager"))
    pipe = hydit_core.load(tiny_model_file, device="cpu", compile=True)
    plain = hydit_core.load(tiny_model_file, device="cpu")
    one, other = (np.asarray(each("a red apple", seed=1)[0]).astype(int) for each in (pipe, plain))
    assert np.abs(one - other).max() <= 1
    pipe.dit.blocks[2].mlp.fc2.bias.data[0] = torch.inf
    with pytest.raises(HyditError, match=r"step 1: .* first in blocks\.2\.mlp\.fc2"):
        pipe("a red apple")


def test_a_compiler_that_fails_is_told_in_one_line():
    def backend(graph, example_inputs):
        raise RuntimeError("no compiler\nmore")

    model, values = made(DiT, depth=2), inputs(tiny(2), (8, 8))
    compile_blocks(model, backend=backend)
    with torch.no_grad(), pytest.raises(HyditError, match="torch cannot compile the blocks here") as caught:
        model(values["x"], values["t"], encode(model, values))
    assert "\n" not in str(caught.value) and "no compiler" in str(caught.value)


def test_training_compiles_blocks_with_their_adapters(tmp_path, tiny_model_file, monkeypatch):
    from test_train_lora import write_lora_run
    from train_setup import records, run_training

    from hydit_core.train import launch

    backend, losses = Counting(), []
    monkeypatch.setattr(launch, "compile_networks", partial(compile_networks, backend=backend))
    for name, value in (("plain", "false"), ("compiled", "true")):
        (tmp_path / name).mkdir()
        config = write_lora_run(tmp_path / name, tiny_model_file)
        assert run_training(config, "run.steps=1", f"run.compile={value}")
        losses.append([record["loss"] for record in records(tmp_path / name / "run") if "loss" in record])
    # For each kind of block, with gradients and without: adapters split none.
    assert 2 <= backend.graphs <= 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0]


# A device that fake tensors can be on without its library. What fake tensors hold is unknown, so that
# whatever would make the host wait for the device raises an error; so does mixing it with the CPU.
DEVICE = torch.device("lazy:0")


def fake_inputs(size=(11, 14)):
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
        for name, value in inputs(tiny(4), size).items()
    }


def context_of(net: Trunk, values: dict[str, Any]) -> Context:
    names = ("bert", "bert_mask", "t5", "t5_mask")
    return net.encode_context(*(values[name] for name in names), image_meta_size=values["sizes"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_waits_for_the_device(sampler):
    schedule = Schedule(DiffusionConfig())
    sigmas = schedule.sigmas_for("leading", 3)
    times = schedule.sigma_to_t(sigmas[:-1]).tolist()
    seen = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, net = (cls(tiny(4), device=DEVICE) for cls in (DiT, ControlNet))
        values = fake_inputs()
        control = PreparedControl(net, values["hint"][:1], context_of(net, values), [0.5], 999, 300)
        controls, context = Controls([control]), context_of(model, values)

        def predict(x_t, t):
            residuals = controls(x_t, t, times[len(seen)])
            seen.append(residuals is not None)
            return model(x_t, t, context, residuals)

        x = values["x"][:1]
        guided = GuidedDenoiser(predict, schedule, 5.0, 0.7)
        generator = [torch.Generator()]
        out = SAMPLERS[sampler](
            guided, x, sigmas, noise_sampler=noise_sampler_from(x, generator), disable=True
        )
        assert out.device == DEVICE
        with pytest.raises(
            Exception, match=r"local_scalar_dense|data-dependent|DataDependent|nonzero|is_nonzero"
        ):
            float(out.sum())  # such a wait would be noticed
    assert seen == [True, True, False]


@pytest.mark.parametrize("old", [False, True])
def test_what_callers_leave_on_the_cpu(old):
    """Timesteps, masks and sizes may; networks may be streamed; pictures on another device raise."""
    with FakeTensorMode(), torch.no_grad():
        values = fake_inputs()
        mixed = values | {
            name: torch.empty(values[name].shape, dtype=values[name].dtype)
            for name in ("t", "bert_mask", "t5_mask", "sizes")
        }
        for cls, more in ((DiT, ()), (ControlNet, (torch.empty(1, 4, 11, 14),))):
            model = cls(tiny(4, old=old), device="cpu")
            stream = Streamed(model, model.blocks, Copier(DEVICE))
            stream.enter()
            out = model(values["x"], mixed["t"], context_of(model, mixed), *more)
            assert {part.device for part in (out if isinstance(out, list) else [out])} == {DEVICE}
            stream.leave()
            assert {p.device.type for p in model.parameters()} == {"cpu"}
            with pytest.raises(RuntimeError, match="device"):
                model(values["x"], values["t"], context_of(model, values), *more)


def test_the_vae_takes_latents_and_pictures_to_its_device():
    from diffusers import AutoencoderKL

    with FakeTensorMode(), torch.no_grad(), DEVICE:
        model = AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        )  # fmt: skip
        vae = VAE(model.eval())
        latents = vae.encode_mode(torch.empty(1, 3, 32, 64, device="cpu"))
        assert latents.device == DEVICE and latents.shape == (1, 4, 16, 32)
        for tile in (None, 8):
            assert vae.decode(torch.empty(1, 4, 16, 32, device="cpu"), tile=tile).shape == (1, 3, 32, 64)


class Event:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def synchronize(self):
        self.log.append(f"wait for {self.name}")


def test_the_answer_about_a_step_is_awaited_while_the_next_is_queued(monkeypatch):
    log = []
    monkeypatch.setattr(finite, "_fetched", lambda answer: (answer, Event(log, len(log))))

    class OnCuda(torch.Tensor):
        """Values that say to be on a GPU."""

        @property
        def device(self):
            return torch.device("cuda")

    watch = FiniteWatch(lambda about: HyditError(f"step {about} is not finite"))
    good, bad = torch.zeros(2).as_subclass(OnCuda), torch.full((2,), torch.nan).as_subclass(OnCuda)
    watch.look(good, 1)
    assert log == []
    watch.look(bad, 2)  # nothing is known of it yet
    assert log == ["wait for 0"]
    with pytest.raises(HyditError, match="step 2 is not finite"):
        watch.look(good, 3)
    watch.look(bad, 4)
    with pytest.raises(HyditError, match="step 4 is not finite"):
        watch.settle()
    watch.settle()  # told once
    with pytest.raises(HyditError, match="step 5"):
        watch.look(torch.tensor(torch.inf), 5)  # at once on a CPU
