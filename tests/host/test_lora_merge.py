"""LoRAs merged into one and written: against chained loaders, ComfyUI's own nodes, and every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph, Link, Node, text_to_image
from lora_files import OUT, forms
from lora_nodes import load, written
from model_runs import error, ksampler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling_models import our_model, weights
from test_lora import lora_name, off, patched

FORMS = forms()
BERT_LAYER = "encoder.layer.0.attention.self.query"
T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.fixture(scope="module", autouse=True)
def loras(host):
    names = ("peft", "kohya", "comfy", "diffusers", "loha", "diff", "dora-0")
    with written(host, {lora_name(name): FORMS[name] for name in names}) as folder:
        yield folder
    shutil.rmtree(host.output_dir / "loras", ignore_errors=True)
    host.refresh()


@pytest.fixture(scope="module")
def ours(host, tmp_path_factory):
    return our_model(host, tmp_path_factory.mktemp("dit"))


def merged(g: Graph, *files: tuple[str, float], **last: Any) -> Node:
    """A chain of merge nodes; ``last`` are more inputs of its end."""
    node = None
    for i, (name, strength) in enumerate(files):
        more = last if i == len(files) - 1 else {}
        before = {} if node is None else {"lora": node.out(0)}
        node = g.add(
            "HyDiTLoraMerge", _defaults=True, lora_name=lora_name(name), strength=strength, **before, **more
        )
    assert node is not None
    return node


def saved(host: Any, g: Graph, lora: Link, **widgets: Any) -> tuple[Path, list[str]]:
    """The file or folder that the save node wrote, and what it says besides."""
    node = g.add("HyDiTLoraSave", _defaults=True, lora=lora, **widgets)
    name, *notes = host.run(g).check().outputs[node.id]["hydit_saved"]
    host.refresh()
    return host.output_dir / name, notes


def total(*files: tuple[str, float]) -> dict[str, torch.Tensor]:
    """The weights with all of them."""
    found = weights()
    for name, strength in files:
        found |= FORMS[name].expected(found, strength)
    return found


def test_a_chain_is_the_sum(host, ours):
    """On MODEL at once, through ComfyUI's own node for LORA_MODELs, and as loaders one after another."""
    for files in (
        [("peft", 0.5)],
        [("peft", 0.5), ("kohya", -1.0)],
        [("kohya", 1.0), ("diffusers", 0.5), ("loha", 2.0), ("diff", 0.5)],
    ):
        g = Graph()
        model = host.give(g, ours)
        node = merged(g, *files, model=model)
        stock = g.add("LoraModelLoader", _defaults=True, model=model, lora=node.out(0), strength_model=1.0)
        value, direct, through = host.values(g, node.out(0), node.out(1), stock)
        assert isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
        assert off(patched(direct), total(*files)) <= 1e-6, files
        assert off(patched(through), total(*files)) <= 1e-6, files
    assert direct.patches and not ours.patches


def test_block_weights_are_worked_in(host, ours):
    g = Graph()
    node = merged(g, ("comfy", 2.0), block_weights="0, 0.5, 0, 0", model=host.give(g, ours))
    expected = FORMS["comfy"].expected(weights(), 1.0)
    expected |= {k: v for k, v in FORMS["comfy"].expected(weights(), 2.0).items() if k.startswith("pooler")}
    assert off(patched(host.values(g, node.out(1))[0]), expected) <= 1e-6
    for block_weights, said in (("only-early(1)", "connect model"), ("1", ""), ("1, 2", ""), ("1, x", "'x'")):
        g = Graph()
        node = merged(g, ("comfy", 1.0), block_weights=block_weights)
        result = host.run(_captured(g, node))
        assert result.ok == (not said), result.error
        assert said in str(result.error)


def _captured(g: Graph, node: Node) -> Graph:
    g.add("HyDiTTestCapture", value=node.out(0))
    return g


def test_what_is_said(host, ours):
    g = Graph()
    node = merged(g, ("kohya", 0.5), ("comfy", 1.0))
    (text,) = host.run(_captured(g, node)).check().outputs[node.id]["hydit_lora"]
    assert "comfy LoRA of rank 4" in text and text.endswith("merged: kohya at 0.5, comfy at 1")
    for files, strength in (
        ((("kohya", 1.0), ("dora-0", 1.0)), "one LoRA with others"),
        ((("dora-0", 0.5),), "strength"),
    ):
        g = Graph()
        assert strength in str(host.run(_captured(g, merged(g, *files))).error)


@pytest.mark.parametrize("format", ["comfy", "kohya", "peft"])
def test_what_is_written_says_the_same(host, ours, format):
    """In our loader and, files, in ComfyUI's own; the picture as well."""
    files = [("peft", 0.5), ("kohya", -1.0)]
    g = Graph()
    path, notes = saved(host, g, merged(g, *files).out(0), format=format)
    assert notes == [] and path.name.startswith("hydit_0000") and path.is_dir() == (format == "peft")
    name = path.name + ("/" if format == "peft" else "")
    found = load(host, ours, name)[0]
    assert off(patched(found), total(*files)) <= 1e-6
    if format == "peft":
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["r"] == 8 and config["use_dora"] is False
        return
    g = Graph()
    node = g.add("LoraLoaderModelOnly", model=host.give(g, ours), lora_name=name, strength_model=1.0)
    stock = host.values(g, node)[0]
    assert off(patched(stock), total(*files)) <= 1e-6
    picture = ksampler(host, found, steps=2)
    assert (
        error(picture, ksampler(host, stock, steps=2)) < 1e-5 < error(picture, ksampler(host, ours, steps=2))
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert [entry["strength"] for entry in json.loads(metadata["hydit.combined"])] == [0.5, -1.0]
    assert metadata["modelspec.trigger_phrase"] == "pixel icon" and "HyDiTLoraMerge" in metadata["prompt"]


def test_a_smaller_rank_and_what_it_keeps(host, ours):
    files = [("peft", 1.0), ("comfy", 1.0)]  # the same factors, so rank 4 is all
    g = Graph()
    path, notes = saved(host, g, merged(g, *files).out(0), rank=4)
    assert notes == ["rank 4: 100.00% of the change is kept"]
    assert {v.shape[0] for k, v in load_file(path).items() if "lora_down" in k} == {4}
    assert off(patched(load(host, ours, path.name)[0]), total(*files)) <= 1e-5
    g = Graph()
    path, (note,) = saved(host, g, merged(g, *files).out(0), rank=2)
    whole = total(*files)
    change = {key: whole[key].double() - value for key, value in weights().items()}
    values = [
        torch.linalg.svdvals(c).square() for c in change.values() if c.ndim == 2 and c.abs().max() > 1e-6
    ]
    kept = sum(float(v[:2].sum()) for v in values) / sum(float(v.sum()) for v in values)
    assert note == f"rank 2: {kept:.2%} of the change is kept" and kept < 0.99


def test_comfyuis_own_save_node_and_foreign_values(host, ours):
    g = Graph()
    name = "SaveLoRA" if "SaveLoRA" in host.nodes.NODE_CLASS_MAPPINGS else "SaveLoRANode"
    g.add(name, lora=merged(g, ("peft", 0.5)).out(0), prefix="loras/stock")
    host.run(g).check()
    (path,) = (host.output_dir / "loras").glob("stock*.safetensors")
    host.refresh()
    assert off(patched(load(host, ours, path.name)[0]), total(("peft", 0.5))) <= 1e-6
    g = Graph()
    trained = host.give(g, dict(FORMS["comfy"].tensors))  # a plain dictionary, as ComfyUI's training gives
    found, _ = saved(host, g, trained.out(0))
    assert off(patched(load(host, ours, found.name)[0]), total(("comfy", 1.0))) <= 1e-6
    g = Graph()
    bad = host.give(g, {"lora_unet_input_blocks_1.lora_up.weight": torch.ones(4, 4)})
    g.add("HyDiTLoraSave", _defaults=True, lora=bad)
    assert not host.run(g).ok
    g = Graph()
    g.add(
        "HyDiTLoraSave",
        _defaults=True,
        lora=host.give(g, dict(FORMS["comfy"].tensors)),
        filename_prefix="../x",
    )
    assert "leads out" in str(host.run(g).error)


def test_text_encoders(host, loras):
    """BERT and mT5 of the embedded model, at a strength of their own; kept through merge and save."""
    r = torch.Generator().manual_seed(2)
    loader = text_to_image().prompt["1"]["inputs"]["ckpt_name"]
    g = Graph()
    whole = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=loader)
    model, clip = host.values(g, whole.out(0), whole.out(1))
    state = {k: v.clone() for k, v in clip.cond_stage_model.state_dict().items()}
    keys = {
        f"hydit_clip.transformer.bert.{BERT_LAYER}.weight": "lora_te1_" + BERT_LAYER.replace(".", "_"),
        f"mt5xl.transformer.{T5_LAYER}.weight": f"text_encoders.mt5xl.transformer.{T5_LAYER}",
    }
    tensors, expected = {}, {}
    for key, name in keys.items():
        out, width = state[key].shape
        up, down = 0.1 * torch.randn(out, 2, generator=r), torch.randn(2, width, generator=r)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        expected[key] = state[key].double() + 0.5 * (up @ down).double()
    network = model.model.state_dict()[f"diffusion_model.{OUT}.weight"]
    tensors |= {f"diffusion_model.{OUT}.diff": torch.ones_like(network)}
    save_file(tensors, loras / "texts.safetensors")
    host.refresh()

    def check(lora: str, **widgets: Any) -> None:
        g = Graph()
        given = {"model": host.give(g, model), "clip": host.give(g, clip), "lora_name": lora, **widgets}
        changed = host.values(g, g.add("HyDiTLoraLoader", _defaults=True, **given).out(1))[0]
        changed.load_model()
        after = {k: v.clone() for k, v in changed.cond_stage_model.state_dict().items()}
        host.comfy_module("comfy.model_management").unload_all_models()
        for key, value in expected.items():
            assert (after[key].double() - value).abs().max() <= 1e-3 * value.abs().max()
        assert all(torch.equal(value, state[key]) for key, value in after.items() if key not in expected)

    check("texts.safetensors", strength_clip=0.5)
    g = Graph()
    node = g.add("HyDiTLoraLoader", _defaults=True, model=host.give(g, model), lora_name="texts.safetensors")
    (text,) = host.run(_captured(g, node)).check().outputs[node.id]["hydit_lora"]
    assert "BERT: 1 modules left out; connect clip" in text and "mT5: 1 modules left out" in text
    g = Graph()
    node = g.add("HyDiTLoraMerge", _defaults=True, lora_name="texts.safetensors", strength=0.5)
    path, _ = saved(host, g, node.out(0))
    check(path.name)
