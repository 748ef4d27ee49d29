"""Published kinds of files in the graph, and files that belong elsewhere: what the loaders say of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import FAMILIES
from graphs import Graph, text_to_image
from key_lists import sparse_safetensors
from published_files import KINDS, is_old, kinds
from published_parts import Written

CHECKPOINT, DIT, TEXT = "HyDiTCheckpointLoader", "HyDiTDiTLoader", "HyDiTTextEncoderLoader"
CONTROL, LORA, MERGE, IP = (
    "HyDiTControlNetLoader",
    "HyDiTLoraLoader",
    "HyDiTLoraMerge",
    "HyDiTIPAdapterLoader",
)
WIDGET = {
    CHECKPOINT: "ckpt_name",
    DIT: "model_name",
    TEXT: "bert_name",
    CONTROL: "control_net_name",
    LORA: "lora_name",
    MERGE: "lora_name",
    IP: "ip_adapter_name",
}
MODELS, CONTROLNETS, LORAS = kinds("model"), kinds("controlnet"), kinds("lora")
COMPLETE = "Tencent's folder"
"""A model of v1.2 with text encoders and VAE; the one of v1.1 is :data:`COMPLETE_OLD`."""
COMPLETE_OLD = "diffusers' distilled folder"


class Published:
    """What was written of each kind, and its name in ComfyUI's lists."""

    def __init__(self, models: Path) -> None:
        self.written: dict[str, Written] = {}
        self.names: dict[str, str] = {}
        self.roots: list[Path] = []
        roles = {
            "model": "checkpoints",
            "controlnet": "controlnet",
            "lora": "loras",
            "ip_adapter": "ipadapter",
            "vision": "clip_vision",
        }
        for number, (name, kind) in enumerate(KINDS.items()):
            folder = models / roles[kind.role]
            if name.startswith("diffusers'"):
                folder = models / "diffusers"
            root = folder / f"published{number}"
            root.mkdir(parents=True)
            self.roots.append(root)
            one = self.written[name] = kind.write(root)
            self.names[name] = f"{root.name}/{one.place.name}{'/' if one.place.is_dir() else ''}"


@pytest.fixture(scope="module")
def published(host: Any) -> Any:
    found = Published(host.models_dir)
    host.refresh()
    yield found
    for root in found.roots:
        shutil.rmtree(root)
    host.refresh()


def options(host: Any, kind: str) -> list[str]:
    return [
        name.replace("\\", "/") for name in host.input_types(kind)["required"][WIDGET[kind]][1]["options"]
    ]


def loader(kind: str, name: str, **widgets: Any) -> Graph:
    graph = Graph()
    node = graph.add(kind, _defaults=True, **{WIDGET[kind]: name}, **widgets)
    graph.add("HyDiTTestCapture", value=node.out(0))
    return graph


def loaded(host: Any, kind: str, name: str, **widgets: Any) -> tuple[Any, str]:
    """What a loader gives, and what it shows."""
    result = host.run(loader(kind, name, **widgets)).check()
    (value,) = host.values(loader(kind, name, **widgets), ("1", 0))
    return value, result.outputs["1"]["hydit_version"][0]


def same(found: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(state[key].to(value), value)]


def graph_of(published: Published, name: str = COMPLETE) -> Graph:
    return text_to_image(ckpt=published.names[name], width=64, height=64, steps=1, save=False)


def drawn(host: Any, graph: Graph) -> torch.Tensor:
    picture = host.values(graph, ("6", 0))[0]
    assert torch.isfinite(picture).all()
    return picture


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models_are_listed_loaded_and_drawn(host, published, name):
    one, listed = published.written[name], published.names[name]
    assert listed in options(host, DIT)
    model, said = loaded(host, DIT, listed)
    same(model.model.diffusion_model, one.tensors)
    assert said.startswith(f"HunyuanDiT-64x4 {'v1.1 or v1.0' if is_old(name) else 'v1.2'}, ")
    assert model.model.hydit_info.diffusion.beta_end == (0.03 if is_old(name) else 0.018)
    whole = name if one.complete else COMPLETE_OLD if is_old(name) else COMPLETE
    graph = graph_of(published, whole)
    if not one.complete:
        graph.set("5", model=graph.add(DIT, _defaults=True, model_name=listed).out(0))
    assert drawn(host, graph).std() > 0


def test_either_set_of_a_file_can_be_chosen(host, published):
    listed, ema = published.names["Laxhar's"], published.written["Laxhar's"].tensors
    module = published.written["Tencent's v1.1"].tensors
    for key, tensors, shown in (
        ("auto", ema, "ema (not module)"),
        ("", ema, "ema (not module)"),
        ("ema", ema, "ema (not module)"),
        (" module ", module, "module (not ema)"),
    ):
        model, said = loaded(host, DIT, listed, load_key=key)
        same(model.model.diffusion_model, tensors)
        assert f", {shown}, " in said
        again, arguments = model.cached_patcher_init if hasattr(model, "cached_patcher_init") else (None, ())
        if again:
            same(again(*arguments).model.diffusion_model, tensors)
    for name, key, expected in (
        ("Laxhar's", "distill", "no weights under 'distill'; it has module, ema"),
        ("Freeway Animation", "module", "no weights under 'module': it holds one set"),
        ("diffusers' folder", "module", "no weights under 'module': it holds one set"),
    ):
        assert expected in refused(host, loader(DIT, published.names[name], load_key=key), "1")
    older, _ = loaded(host, CONTROL, published.names["TTPlanet's older inpainting"], load_key="module")
    same(older.control_model, published.written["TTPlanet's older inpainting"].tensors)


def test_a_folder_of_several_sets_too(host, published):
    module = {key: value + 1 for key, value in published.written[COMPLETE].tensors.items()}
    for kind in (DIT, CHECKPOINT):
        model, said = loaded(host, kind, published.names[COMPLETE], load_key="module")
        same(model.model.diffusion_model, module)
        assert "module" in said and "ema" not in said


# -- ControlNets and LoRAs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_are_listed_loaded_and_steer(host, published, name):
    one, listed = published.written[name], published.names[name]
    assert listed in options(host, CONTROL)
    control, said = loaded(host, CONTROL, listed)
    same(control.control_model, one.tensors)
    assert said.startswith(f"HunyuanDiT-64x4 {'v1.1 or v1.0' if is_old(name) else 'v1.2'} ControlNet")
    graph = graph_of(published, COMPLETE_OLD if is_old(name) else COMPLETE)
    before = drawn(host, graph)
    net = graph.add(CONTROL, _defaults=True, control_net_name=listed)
    picture = host.give(graph, torch.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3))
    applied = graph.add(
        "HyDiTControlNetApply",
        _defaults=True,
        positive=["2", 0],
        negative=["3", 0],
        control_net=net,
        image=picture,
        vae=["1", 2],
    )
    graph.set("5", positive=applied.out(0), negative=applied.out(1))
    assert not torch.equal(drawn(host, graph), before)


@pytest.mark.parametrize("name", LORAS)
def test_loras_are_listed_applied_and_drawn(host, published, name):
    one, listed = published.written[name], published.names[name]
    assert {listed} <= {*options(host, LORA)} & {*options(host, MERGE)}
    graph = graph_of(published)
    before = drawn(host, graph)
    links = {"model": ["1", 0], "clip": ["1", 1]}
    node = graph.add(LORA, _defaults=True, lora_name=listed, partial=False, **links)
    graph.set("5", model=node.out(0)).set("2", clip=node.out(1)).set("3", clip=node.out(1))
    assert not torch.equal(drawn(host, graph), before)
    (model, report) = host.values(graph, node.out(0), node.out(2))
    assert " has no " not in report
    dit = {key.removeprefix("dit.") for key in one.changes if key.startswith("dit.")}
    assert {key.removeprefix("diffusion_model.") for key in model.patches} == dit


# -- files that belong elsewhere -----------------------------------------------------------------------------

# What is said of each file at every node that does not take it.
ELSEWHERE = {
    COMPLETE: "a HunyuanDiT-64x4 v1.2",
    "TTPlanet's tile": "a HunyuanDiT-64x4 v1.2 ControlNet",
    "T2ITrainer's DoRA": "a HunyuanDiT LoRA (diffusers names)",
    "IP-Adapter": "a HunyuanDiT-64x4 IP-Adapter",
    "image encoder": "a CLIP image encoder",
}
TAKES = {
    CHECKPOINT: "model",
    DIT: "model",
    TEXT: "model",
    CONTROL: "controlnet",
    LORA: "lora",
    MERGE: "lora",
    IP: "ip_adapter",
}
FOLDERS = {
    CHECKPOINT: "checkpoints",
    DIT: "diffusion_models",
    TEXT: "text_encoders",
    CONTROL: "controlnet",
    LORA: "loras",
    MERGE: "loras",
    IP: "ipadapter",
}


def refused(host: Any, graph: Graph, node: str) -> str:
    """The one line on a node."""
    result = host.run(graph)
    assert not result.ok and result.error.node_id == node, result.error
    said = result.error.exception_message
    assert "\n" not in said and result.error.exception_type.endswith(
        ("WeightsError", "LoraError", "WrongFile")
    )
    return said


def at(host: Any, published: Published, kind: str, name: str) -> str:
    """What a node says of a file."""
    graph = Graph()
    links = {}
    if kind == LORA:
        links["model"] = graph.add(DIT, _defaults=True, model_name=published.names[COMPLETE]).out(0)
    node = graph.add(kind, _defaults=True, **{WIDGET[kind]: name}, **links)
    graph.add("HyDiTTestCapture", value=node.out(0))
    return refused(host, graph, node.id)


@pytest.fixture(scope="module")
def everywhere(host, published) -> Any:
    """The same files in all of ComfyUI's folders, where any of them may be put by mistake."""
    made = []

    def put(path: Path) -> str:
        for folder in {*FOLDERS.values()}:
            place = host.models_dir / folder / path.name
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(path)
                made.append(place)
        return path.name

    yield put
    for place in made:
        place.unlink()
    host.refresh()


@pytest.mark.parametrize("kind", TAKES)
def test_what_is_wrong_at_a_node_is_named_with_where_it_belongs(host, published, everywhere, kind):
    advice = ("load it with", "give it", "choose it as", "choose another")
    for name, what in ELSEWHERE.items():
        if KINDS[name].role != TAKES[kind] and not published.written[name].place.is_dir():
            listed = everywhere(published.written[name].place)
            host.refresh()
            said = at(host, published, kind, listed)
            assert what in said and any(words in said for words in advice), said


@pytest.fixture(scope="module")
def strangers(tmp_path_factory, everywhere, host) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("strangers")
    found = {
        what: everywhere(sparse_safetensors(folder / f"stranger{number}.safetensors", shapes))
        for number, (what, (_, make)) in enumerate(FAMILIES.items())
        if (shapes := make())
    }
    host.refresh()
    assert len(found) > 10
    return found


@pytest.mark.parametrize("kind", TAKES)
def test_files_of_other_models_are_named_at_every_node(host, published, strangers, kind):
    for what, listed in strangers.items():
        said = at(host, published, kind, listed)
        assert FAMILIES[what][0] in said and listed in said, (what, said)
