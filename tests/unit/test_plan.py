"""What a run needs of a device's memory: weights counted exactly, the rest by running shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import warm_commands
from diffusers import AutoencoderKL
from tiny import TINY
from tiny_models import encode, inputs, randomize, tiny
from torch import nn

import hydit_core
from hydit_core import ControlNet, loading, plan
from hydit_core.generate import memory
from hydit_core.generate.__main__ import main
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.offload.peak import peak_bytes
from hydit_core.plan import Pictures, Requirements, choose, for_pipeline, requirements, streamed_size
from hydit_core.vae import VAE


def test_the_peak_is_what_is_alive_at_once():
    """1000 floats are 4000 bytes; a view keeps all of what it is of, an update in place is nothing new."""
    for device in ("meta", "cpu"):
        x = torch.zeros(1000, device=device)

        def run(x=x):
            a = x + 1  # 4000
            b = a.view(10, 100)[0]
            del a
            c = b * 2  # and 400
            b.mul_(2)
            del b
            return c.double()  # 400 and 800

        assert peak_bytes(run) == 4400
        assert peak_bytes(lambda x=x: [x + i for i in range(3)]) == 12000
        assert peak_bytes(lambda x=x: x.view(2, 500).chunk(2)) == 0


def test_attention_counts_as_a_fused_kernel():
    q = torch.empty(1, 2, 1000, 8, device="meta")
    size = peak_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert size == 2 * 1000 * 8 * 4


def test_shapes_alone_give_the_peak_of_a_real_forward():
    real = DiT(tiny()).requires_grad_(False)
    randomize(real, 1)
    peaks = []
    for model, device in ((real, "cpu"), (DiT(tiny(), device="meta"), "meta")):
        values = {name: value.to(device) for name, value in inputs(tiny(), (16, 20)).items()}
        context = encode(model, values)
        peaks.append(peak_bytes(lambda m=model, v=values, c=context: m(v["x"], v["t"], c)))
    assert peaks[0] == peaks[1] > 2 * 80 * 64 * 4 * 3


def test_weights_are_exactly_those_that_are_loaded(tiny_model_file):
    for dtype in (torch.float32, torch.float16):
        loaded = hydit_core.load(tiny_model_file, device="cpu", dtype=dtype)
        outline = loading.outline(tiny_model_file, dtype)
        assert {
            p.device.type for net in (outline.dit, outline.text, outline.vae) for p in net.parameters()
        } == {"meta"}
        needed, found = (for_pipeline(pipe) for pipe in (outline, loaded))
        assert needed == found
        parts = {"DiT": loaded.dit, "BERT": loaded.text.bert, "mT5": loaded.text.t5, "VAE": loaded.vae}
        for name, net in parts.items():
            tensors = {
                t.data_ptr(): t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())
            }
            assert needed.weights[name] == sum(tensors.values())


def published():
    """DiT-g/2 v1.2 and SDXL's VAE in bfloat16, and encoders of the published sizes."""
    with torch.device("meta"):
        dit = DiT(DiTConfig(), dtype=torch.bfloat16)
        types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        kl = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **types)
        t5 = nn.Sequential(
            nn.Embedding(250112, 2048), nn.ModuleList(nn.Linear(2048, 23552) for _ in range(24))
        )
        bert = nn.Sequential(
            nn.Embedding(47020, 1024), nn.ModuleList(nn.Linear(1024, 12288) for _ in range(24))
        )
        encoders = {"BERT": bert.bfloat16(), "mT5": t5.bfloat16()}
        return dit, encoders, VAE(kl.bfloat16().eval())


def test_the_published_weights_fit_where_they_are_said_to(monkeypatch):
    """1024 x 1024 in bf16: below 6 GB with encoders that leave, below 3 GB block by block."""
    for layer in (nn.Linear, nn.Conv2d, nn.Embedding):  # drawing nothing takes long, too
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    dit, encoders, vae = published()
    needed = requirements(dit, encoders, vae, size=(1024, 1024), rows=2)
    assert needed.weights["DiT"] == 2 * sum(p.numel() for p in dit.parameters()) == 2_999_904_064
    assert needed.weights["mT5"] / 1e9 == pytest.approx(3.3, abs=0.1)
    assert needed.of("off") > 8e9
    assert needed.of("encoders") + plan._SPARE < 6e9
    assert needed.of("blocks") + plan._SPARE < 3e9
    assert needed.of("blocks", tiles=True) < needed.of("blocks")
    # More pictures, larger ones and ControlNets need more.
    with torch.device("meta"):
        net = ControlNet(DiTConfig(), dtype=torch.bfloat16)
    for more in ({"rows": 4}, {"size": (1280, 1280)}, {"controlnets": [net]}):
        larger = requirements(dit, encoders, vae, **{"size": (1024, 1024), "rows": 2, **more})
        assert larger.sampling > needed.sampling
        assert larger.of("blocks", tiles=True) > needed.of("blocks", tiles=True)
    assert larger.weights["ControlNet 1"] > 1.4e9


def test_image_prompts_need_their_networks_before_the_first_step(tiny_model_file):
    """With "off" both stay, else one follows the other; each picture is seen in every step."""
    pipe = loading.outline(tiny_model_file, torch.float32)
    with torch.device("meta"):
        adapter = IPAdapter(IPAdapterConfig.for_dit(TINY, 4096, 400))
        encoder = nn.Linear(30_000, 1000, bias=False)
    plain = for_pipeline(pipe)
    one, two = (for_pipeline(pipe, pictures=Pictures(adapter, encoder, count)) for count in (1, 2))
    sizes = {"IP-Adapter": 4 * sum(p.numel() for p in adapter.parameters()), "image encoder": 4 * 30_000_000}
    assert one.weights == {**plain.weights, **sizes}
    values = 4 * 2 * 400 * 2 * 64 * TINY.depth  # keys and values for each block, of both rows
    assert two.sampling - one.sampling >= values and one.sampling - plain.sampling >= values
    for needed in (one, two):
        peak = max(plan._ENCODING, needed.sampling, needed.decoding)
        assert needed.of("off") == sum(needed.weights.values()) + peak
    largest = max(sizes.values())
    for mode in ("encoders", "blocks"):
        assert plain.of(mode) < largest
        assert one.of(mode) == max(largest + plan._ENCODING, one.sampling + one.weights["DiT"])


def test_what_streams_has_three_layers_and_no_tables():
    net = nn.ModuleDict({
        "table": nn.Embedding(100, 10), "first": nn.Linear(10, 10, bias=False),
        "layers": nn.ModuleList(nn.Linear(10, 10 + i, bias=False) for i in range(6)),
    })  # fmt: skip
    assert streamed_size(net) == 4 * (100 + 10 * (15 + 14 + 13))
    assert streamed_size(nn.Linear(10, 10)) == 440


def test_the_choice_offloads_as_little_as_fits():
    needed = Requirements(
        weights={"DiT": 3000, "BERT": 700, "mT5": 3300, "VAE": 100},
        streamed={"DiT": 300, "BERT": 100, "mT5": 300},
        sampling=700, decoding=1600, in_tiles=400,
    )  # fmt: skip
    mega = plan._ENCODING
    assert needed.of("off") == 7100 + mega and needed.of("encoders") == 4000 + mega
    assert needed.of("blocks") == 400 + mega  # encoding, for networks as small as these
    big = Requirements(
        {name: size * 10**6 for name, size in needed.weights.items()},
        {name: size * 10**6 for name, size in needed.streamed.items()},
        700 * 10**6, 1600 * 10**6, 400 * 10**6,
    )  # fmt: skip
    spare = plan._SPARE
    assert big.of("off") == 8_700_000_000
    for free, mode, tile, fits in (
        (9.2e9, "off", None, True),
        (9.0e9, "encoders", None, True),
        (4.6e9, "encoders", None, True),
        (4.4e9, "blocks", None, True),
        (2.0e9, "blocks", 64, True),
        (1.0e9, "blocks", 64, False),
    ):
        chosen = choose(big, int(free))
        assert (chosen.mode, chosen.tile, chosen.fits) == (mode, tile, fits), free
        assert chosen.need == big.of(mode, tiles=tile is not None) + spare
    placement = choose(big, int(2e9)).placement(torch.device("cpu"))
    assert placement.tile == 64 and placement.mode == "blocks"
    assert choose(big, int(1e10)).placement(torch.device("cpu")).device is None


def test_auto_looks_at_the_free_memory(tiny_model_file, monkeypatch, tmp_path, capsys):
    assert hydit_core.load(tiny_model_file, device="cpu", offload="auto").placement.device is None
    monkeypatch.setattr(plan, "_SPARE", 0)
    monkeypatch.setattr(plan, "_ENCODING", 0)
    for module in (loading, memory):
        monkeypatch.setattr(module, "free_memory", lambda device: 2 * 10**6)
    assert hydit_core.load(tiny_model_file, device="cpu", offload="auto").placement.device.type == "cpu"
    command = ["--prompt", "a red apple", "--model", str(tiny_model_file), "--device", "cpu", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "offload: " in capsys.readouterr().err
    for module in (loading, memory):
        monkeypatch.setattr(module, "free_memory", lambda device: 10)
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "that may be more than fits; try a smaller --size" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_plan_prints_and_draws_nothing(tiny_model_file, tmp_path, capsys):
    net = ControlNet(TINY)
    randomize(net, 1)
    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "net.safetensors")
    edges = Path(__file__).resolve().parents[2] / "docs/images/embedded_grid.png"
    options = ["--controlnet", str(tmp_path / "net.safetensors"), "--control-image", str(edges)]
    assert (
        main(["--plan", "--model", str(tiny_model_file), "--size", "96x64", "--device", "cpu", *options]) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("96x64, batch 1, bf16\n") and "  ControlNet 1: " in out
    assert "  --offload blocks: " in out and "  a GPU of 4 GB: off, which needs 0." in out
    assert not list(tmp_path.glob("*.png"))
    assert main(["--plan", "--model", str(tmp_path / "missing.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_command_offloads(tiny_model_file, tmp_path):
    command = ["--prompt", "red", "--model", tiny_model_file, "--steps", "1", "--device", "cpu"]
    command += ["--out", tmp_path, "--offload", "some"]
    done = warm_commands.start("-m", "hydit_core.generate", *command).wait()
    assert done.returncode == 2 and "invalid choice: 'some'" in done.stderr
