"""ComfyUI's chunks in pictures: the graph that draws them again. ComfyUI's own word: tests/host."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from workflow_files import backward, linked, overlaps

import hydit_core
from hydit_core.embedded import embedded_controlnets, embedded_model
from hydit_core.generate.__main__ import main
from hydit_core.images import Geometry, load_picture
from hydit_core.pictures.png import read_parameters
from hydit_core.pictures.redraw import list_name, redraw
from hydit_core.pictures.workflow import KINDS, PACK, Graph, Kind, literal

FACTS = {
    "prompt": "红 apple", "negative": "", "seed": 7, "steps": 4, "sampler": "euler", "spacing": "trailing",
    "cfg": 3.5, "guidance_rescale": 0.25, "width": 64, "height": 96, "dtype": "bfloat16",
}  # fmt: skip


def chunks(path: Path) -> dict[str, tuple[str, bytes]]:
    """Keyword -> (chunk type, content) of a PNG's text chunks."""
    data, found, at = path.read_bytes(), {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8].decode(), data[at + 8 : at + 8 + length]
        if kind in ("tEXt", "iTXt", "zTXt"):
            keyword, content = content.split(b"\0", 1)
            found[keyword.decode()] = kind, content
        at += 12 + length
    return found


def page_text(text: str) -> str:
    """What ComfyUI's page makes of a prompt; its choices fall on the first."""
    text, out, at = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S), "", 0
    while at < len(text):
        if text[at] == "\\":
            out += text[at : at + 2] if at + 1 < len(text) else "\\undefined"
            at += 2
        elif text[at] == "{":
            end, depth, first = at + 1, 0, None
            while end < len(text) and (text[end] != "}" or depth):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                first = end if text[end] == "|" and not depth and first is None else first
                end += 2 if text[end] == "\\" else 1
            out += page_text(text[at + 1 : end if first is None else first])
            at = end + 1
        else:
            out += text[at]
            at += 1
    return re.sub(r"\\([{}|])", r"\1", out)


def test_the_picture_carries_what_comfyui_looks_for(tiny_model_file, tmp_path, monkeypatch, capsys):
    text = "红苹果 {red|green} // apple"
    options = ["--model", str(tiny_model_file), "--device", "cpu", "--steps", "2", "--seed", "11"]
    assert main([*options, "--prompt", text, "cat", "--out", str(tmp_path / "a.png"), "--batch", "2"]) == 0
    found = chunks(tmp_path / "a-2.png")
    for name in ("workflow", "prompt"):
        kind, content = found[name]
        assert kind == "tEXt" and content.isascii()
    workflow, prompt = (json.loads(found[name][1]) for name in ("workflow", "prompt"))
    types = {node["class_type"]: node["inputs"] for node in prompt.values()}
    own = {"ckpt_name": tiny_model_file.name, "weight_dtype": "fp32", "load_key": "auto"}
    assert types["HyDiTCheckpointLoader"] == own
    sampler = types["HyDiTKSampler"]
    texts = [prompt[sampler[name][0]]["inputs"]["text"] for name in ("positive", "negative")]
    assert texts == [text, ""]
    assert {name: value for name, value in sampler.items() if not isinstance(value, list)} == {
        "seed": 12, "preset": "model's own", "sampler": "dpmpp_2m", "spacing": "linspace", "steps": 2,
        "cfg": 2.0, "guidance_rescale": 0.0, "denoise": 1.0, "cfg_end": 1.0,
    }  # fmt: skip
    # The other form says the same.
    links = linked(workflow)
    for number, node in prompt.items():
        inputs = node["inputs"]
        assert links[number]["class_type"] == node["class_type"]
        assert links[number]["inputs"] == {k: v for k, v in inputs.items() if isinstance(v, list)}
        shown = [v for v in workflow["nodes"][int(number) - 1]["widgets_values"] if v != "fixed"]
        sent = [page_text(v) if isinstance(v, str) else v for v in shown]
        assert sent == [v for v in inputs.values() if not isinstance(v, list)]
    # Hydit's own chunks are as they were.
    assert read_parameters(tmp_path / "a-2.png")["prompt"] == text
    assert found["parameters"][0] == "iTXt"


def test_the_version_is_the_packs():
    project = (Path(hydit_core.__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert PACK["ver"] == hydit_core.__version__
    assert f'version = "{PACK["ver"]}"' in project and f'name = "{PACK["cnr_id"]}"' in project


def test_nodes_say_which_pack_they_are_from_and_do_not_overlap(tmp_path):
    Image.new("RGBA", (70, 50)).save(tmp_path / "start.png")
    for graph in (redraw(FACTS), redraw(FACTS, init_image=tmp_path / "start.png")):
        nodes = graph.workflow()["nodes"]
        for node in nodes:
            ours = node["type"].startswith("HyDiT")
            assert node["properties"]["cnr_id"] == ("hydit" if ours else "comfy-core")
            assert node["properties"]["ver"]
        assert overlaps(graph.workflow()) == []
        assert backward(graph.workflow()) == []


CONTROL = {"scale": 0.5, "weights": "ease(1)", "start": 0.0, "end": 0.75, "picture": "a-control-01234567.png"}


def test_controlnets_stand_one_after_the_other(tmp_path):
    facts = {**FACTS, "controls": [CONTROL, {**CONTROL, "scale": 2.0, "picture": "b.png"}]}
    folder = tmp_path / "HunyuanDiT-ControlNet"
    (folder / "controlnet").mkdir(parents=True)
    (embedded,) = embedded_controlnets()
    for files, names in (
        ((embedded, tmp_path / "net.pt"), [f"[embedded] {embedded.stem}", "net.pt"]),
        ((folder, folder / "controlnet"), ["HunyuanDiT-ControlNet/"] * 2),
    ):
        graph = redraw(facts, controlnets=files)
        assert overlaps(graph.workflow()) == [] == backward(graph.workflow())
        prompt = graph.prompt()
        (sampler,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "HyDiTKSampler")
        # From the sampler back to the texts
        positive, negative, found, pictures = sampler["positive"], sampler["negative"], [], []
        for strength in (2.0, 0.5):
            assert (positive[0], positive[1], negative[1]) == (negative[0], 0, 1)
            apply = prompt[positive[0]]["inputs"]
            assert apply["strength"] == strength and apply["end_percent"] == 0.75
            found.append(prompt[apply["control_net"][0]]["inputs"])
            pictures.append(prompt[apply["image"][0]]["inputs"]["image"])
            positive, negative = apply["positive"], apply["negative"]
        assert [prompt[link[0]]["inputs"]["text"] for link in (positive, negative)] == ["红 apple", ""]
        assert [loader["control_net_name"] for loader in found] == names[::-1]
        assert {loader["weight_dtype"] for loader in found} == {"bf16"}
        assert pictures == ["b.png", "a-control-01234567.png"]


IMAGE_PROMPT = {"image": "a.png", "weight": 0.5, "blocks": "ease(1)", "start": 0.0, "end": 0.75}


def test_image_prompts_stand_one_after_the_other(tmp_path):
    masked = {**IMAGE_PROMPT, "weight": -2.0, "picture": "a-prompt-0.png", "mask_picture": "m-mask-1.png"}
    (tmp_path / "eyes").mkdir()
    (tmp_path / "eyes" / "model.safetensors").touch()
    more = {"upscale": {"factor": 2, "tile": [64, 64], "width": 32, "height": 48}, "forecast": 0.1}
    facts = {**FACTS, "image_prompts": [IMAGE_PROMPT, masked], "controls": [CONTROL], **more}
    for encoder, name in (
        ("clip_img_encoder.pt", "automatic"),
        ("ipa.pt", "automatic"),
        ("eyes.pt", "eyes.pt"),
        ("eyes", "eyes/model.safetensors"),
    ):
        networks = {"ip_adapter": tmp_path / "ipa.pt", "image_encoder": tmp_path / encoder}
        graph = redraw(facts, controlnets=[tmp_path / "net.pt"], **networks)
        assert overlaps(graph.workflow()) == [] == backward(graph.workflow())
        prompt = graph.prompt()
        samplers = [n["inputs"] for n in prompt.values() if n["class_type"] == "HyDiTKSampler"]
        # Both runs see them: the second in tiles
        tiles = prompt[samplers[1]["model"][0]]
        assert tiles["class_type"] == "HyDiTTiles" and tiles["inputs"]["model"] == samplers[0]["model"]
        last = prompt[prompt[samplers[0]["model"][0]]["inputs"]["model"][0]]["inputs"]
        first = prompt[last["model"][0]]["inputs"]
        assert prompt[first["model"][0]]["class_type"] == "HyDiTCheckpointLoader"
        settings = {"start_percent": 0.0, "end_percent": 0.75, "block_weights": "ease(1)"}
        for apply, weight, picture in ((first, 0.5, "a.png"), (last, -2.0, "a-prompt-0.png")):
            assert {k: v for k, v in apply.items() if not isinstance(v, list)} == {
                "weight": weight,
                **settings,
            }
            assert prompt[apply["image"][0]]["inputs"] == {"image": picture}
            loader = prompt[apply["ip_adapter"][0]]["inputs"]
            assert loader == {"ip_adapter_name": "ipa.pt", "clip_vision_name": name}
        assert "mask" not in first
        assert prompt[last["mask"][0]]["inputs"] == {"image": "m-mask-1.png", "channel": "red"}


@pytest.mark.parametrize("kind", [name for name in KINDS if name.startswith("HyDiT")])
def test_our_nodes_have_these_sockets(kind):
    """As the texts of the nodes have them, which are compared with the nodes' schemas elsewhere."""
    nodes = json.loads((Path(hydit_core.__file__).parents[1] / "locales/en/nodeDefs.json").read_text("utf-8"))
    found = list(nodes[kind]["inputs"])
    sockets = [name for name, _ in KINDS[kind].inputs if name in found]
    assert sockets == [name for name in found if name in sockets] and len(sockets) == len(KINDS[kind].inputs)


def test_every_input_of_our_nodes_is_written():
    """By the names and in the order of the nodes: the page reads widgets by their places."""
    nodes = json.loads((Path(hydit_core.__file__).parents[1] / "locales/en/nodeDefs.json").read_text("utf-8"))
    facts = {**FACTS, "image_prompts": [IMAGE_PROMPT], "controls": [CONTROL]}
    places = {"controlnets": [Path("net.pt")], "ip_adapter": Path("i.pt"), "image_encoder": Path("e.pt")}
    seen = set()
    for node in redraw(facts, **places).prompt().values():
        if (kind := node["class_type"]) in nodes:
            seen.add(kind)
            wanted = [
                name for name in nodes[kind]["inputs"] if name not in ("mask", "control_after_generate")
            ]
            widgets = [name for name, value in node["inputs"].items() if not isinstance(value, list)]
            assert sorted(node["inputs"]) == sorted(wanted), kind
            assert widgets == [name for name in wanted if name in widgets], kind
    assert len(seen) == 8, seen


def test_a_linked_widget_is_a_socket_too():
    kinds = {
        "Int": Kind((), (("INT", "INT"),), (100, 50)),
        "Seeded": Kind((("seed", "INT"),), (), (100, 50)),
    }
    graph = Graph(kinds)
    (number,) = graph.add("Int", (0, 0), widgets={"value": 3})
    graph.add("Seeded", (200, 0), {"seed": number}, {"seed": 7})
    assert graph.prompt()["2"]["inputs"] == {"seed": ["1", 0]}
    node = graph.workflow()["nodes"][1]
    assert node["inputs"] == [{"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": 1}]
    assert node["widgets_values"] == [7]


def loaders(graph) -> dict[str, dict[str, object]]:
    nodes = graph.prompt().values()
    return {node["class_type"]: node["inputs"] for node in nodes if "Loader" in node["class_type"]}


def sources(graph) -> list[str]:
    """Where the MODEL, the CLIP and the VAE come from."""
    prompt = graph.prompt()
    by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
    wanted = (("HyDiTKSampler", "model"), ("HyDiTTextEncode", "clip"), ("VAEDecode", "vae"))
    links = [by_type[type][name] for type, name in wanted]
    return [f"{prompt[node]['class_type']} {slot}" for node, slot in links]


def test_loaders_follow_what_was_given(tiny_model_file, tmp_path):
    dtype = {"weight_dtype": "bf16"}
    assert loaders(redraw(FACTS)) == {
        "HyDiTCheckpointLoader": {"ckpt_name": "[embedded] hydit-icons-128", **dtype, "load_key": "auto"}
    }
    assert list_name(embedded_model()) == "[embedded] hydit-icons-128"
    whole = Path(shutil.copy(tiny_model_file, tmp_path / "whole.safetensors"))
    dit = Path(shutil.copy(tiny_model_file, tmp_path / "dit.safetensors"))
    vae = tmp_path / "vae.safetensors"
    tensors = load_file(tiny_model_file)
    save_file({k.removeprefix("vae."): v for k, v in tensors.items() if k.startswith("vae.")}, vae)
    pipeline = tmp_path / "Pipeline"
    for part in ("transformer", "text_encoder", "vae"):
        (pipeline / part).mkdir(parents=True)
    (tmp_path / "t2i").mkdir()

    assert sources(redraw(FACTS, model=whole)) == [f"HyDiTCheckpointLoader {slot}" for slot in range(3)]
    for folder in (pipeline, pipeline / "transformer"):
        assert loaders(redraw(FACTS, model=folder))["HyDiTCheckpointLoader"]["ckpt_name"] == "Pipeline/"

    split = redraw(FACTS, model=dit, text_encoders=pipeline, vae=vae)
    assert loaders(split) == {
        "HyDiTDiTLoader": {"model_name": "dit.safetensors", **dtype, "load_key": "auto"},
        "HyDiTTextEncoderLoader": {"bert_name": "Pipeline/", "mt5_name": "same as bert_name", **dtype},
        "VAELoader": {"vae_name": "vae.safetensors"},
    }
    assert sources(split) == ["HyDiTDiTLoader 0", "HyDiTTextEncoderLoader 0", "VAELoader 0"]

    chosen = {**FACTS, "load_key": "module"}
    for graph in (redraw(chosen, model=whole), redraw(chosen, model=dit, text_encoders=pipeline, vae=vae)):
        assert [found["load_key"] for found in loaders(graph).values() if "load_key" in found] == ["module"]
    both = redraw(chosen, model=dit, text_encoders=pipeline, vae=pipeline)
    assert loaders(both)["HyDiTDiTLoader"]["load_key"] == "module"
    assert loaders(both)["HyDiTCheckpointLoader"]["load_key"] == "auto"  # it gives no DiT
    assert sources(both) == ["HyDiTDiTLoader 0", "HyDiTCheckpointLoader 1", "HyDiTCheckpointLoader 2"]
    assert loaders(both)["HyDiTCheckpointLoader"]["ckpt_name"] == "Pipeline/"

    other = redraw(FACTS, model=whole, text_encoders=pipeline)
    assert sources(other) == [
        "HyDiTCheckpointLoader 0",
        "HyDiTTextEncoderLoader 0",
        "HyDiTCheckpointLoader 2",
    ]
    other = redraw(FACTS, model=whole, vae=vae)
    assert sources(other) == ["HyDiTCheckpointLoader 0", "HyDiTCheckpointLoader 1", "VAELoader 0"]
    # A whole model that only gives its VAE is no file for VAELoader.
    other = redraw(FACTS, model=dit, vae=whole)
    assert sources(other)[2] == "HyDiTCheckpointLoader 2"
    names = [n["inputs"]["ckpt_name"] for n in other.prompt().values() if "Checkpoint" in n["class_type"]]
    assert sorted(names) == ["dit.safetensors", "whole.safetensors"]


def test_a_folder_of_a_vae_is_named_by_its_file(tmp_path):
    folder = tmp_path / "sdxl-vae-fp16-fix"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").touch()
    name = loaders(redraw(FACTS, model=tmp_path / "m.safetensors", vae=folder))["VAELoader"]["vae_name"]
    assert name == "sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "size, kind",
    [((64, 96), "HyDiTEmptyLatent"), ((72, 64), "EmptyLatentImage"), ((16, 16400), "EmptyLatentImage")],
)
def test_sizes_that_our_latent_node_has_no_steps_for(size, kind):
    graph = redraw({**FACTS, "width": size[0], "height": size[1]}).prompt()
    latents = [node for node in graph.values() if "EmptyLatent" in node["class_type"]]
    assert [node["class_type"] for node in latents] == [kind]
    assert (latents[0]["inputs"]["width"], latents[0]["inputs"]["height"]) == size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("original", [(64, 96), (400, 100), (101, 37), (200, 300)])
def test_a_start_picture_is_fitted_as_the_pipeline_does(tmp_path, original, mode):
    """The nodes' values, applied with Pillow, give the pipeline's pixels."""
    picture = Image.effect_noise(original, 80).convert("RGB")
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(original))
    elif mode == "P":
        picture = picture.quantize(16)
        picture.info["transparency"] = 3
    picture.save(tmp_path / "start.png")
    wanted = Geometry.cover(original, (64, 96)).apply(load_picture(tmp_path / "start.png"))

    graph = redraw({**FACTS, "strength": 0.6}, init_image=tmp_path / "start.png").prompt()
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert nodes["LoadImage"]["image"] == "start.png"
    assert nodes["HyDiTKSampler"]["denoise"] == 0.6
    assert graph[nodes["HyDiTKSampler"]["latent_image"][0]]["class_type"] == "VAEEncode"
    with Image.open(tmp_path / "start.png") as loaded:
        pixels = loaded.convert("RGB")
        if "ImageCompositeMasked" in nodes:
            color = nodes["EmptyImage"]["color"].to_bytes(3, "big")
            white = Image.new(
                "RGB", (nodes["EmptyImage"]["width"], nodes["EmptyImage"]["height"]), tuple(color)
            )
            pixels = Image.composite(pixels, white, loaded.convert("RGBA").getchannel("A"))
    scale = nodes["ImageScale"]
    assert (scale["upscale_method"], scale["crop"]) == ("lanczos", "disabled")
    pixels = pixels.resize((scale["width"], scale["height"]), Image.Resampling.LANCZOS)
    if crop := nodes.get("ImageCrop"):
        x, y = crop["x"], crop["y"]
        pixels = pixels.crop((x, y, x + crop["width"], y + crop["height"]))
    apart = np.abs(np.asarray(pixels, int) - np.asarray(wanted, int)).max()
    assert pixels.size == (64, 96) and apart <= (0 if mode == "RGB" else 1)


@pytest.mark.parametrize("name", ["start.png", "start.jpg", "start.tif"])
def test_a_turned_start_picture_is_fitted_as_it_is_shown(tmp_path, name):
    """ComfyUI's LoadImage turns it too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"tiffinfo": {0x0112: 6}} if name == "start.tif" else {"exif": exif}
    Image.effect_noise((200, 100), 80).save(tmp_path / name, **options)
    shown = load_picture(tmp_path / name)
    assert shown.size == (100, 200)
    graph = redraw({**FACTS, "strength": 0.6}, init_image=tmp_path / name).prompt()
    nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
    geometry = Geometry.cover(shown.size, (64, 96))
    assert (nodes["ImageScale"]["width"], nodes["ImageScale"]["height"]) == geometry.resized == (64, 128)
    assert nodes["ImageCrop"]["y"] == geometry.top


def test_image_to_image_pictures_carry_their_start(tiny_model_file, tmp_path):
    Image.effect_noise((128, 128), 50).save(tmp_path / "start.png")
    options = ["--model", str(tiny_model_file), "--device", "cpu", "--steps", "3", "--prompt", "cat"]
    start = ["--init-image", str(tmp_path / "start.png"), "--strength", "0.7"]
    assert main([*options, *start, "--out", str(tmp_path / "a.png")]) == 0
    prompt = json.loads(chunks(tmp_path / "a.png")["prompt"][1])
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert nodes["LoadImage"]["image"] == "start.png" and nodes["HyDiTKSampler"]["denoise"] == 0.7
    assert "HyDiTEmptyLatent" not in nodes


def test_prompts_reach_the_server_as_they_were():
    texts = [
        "a red apple",
        "a {red|green} apple",
        "http://a.b//c",
        "/* a */ b /",
        "a\\",
        "\\{\\\\{\\",
        "|\\|",
    ]
    draw = random.Random(0)
    texts += ["".join(draw.choices("\\{}|/* a\n", k=draw.randint(1, 12))) for _ in range(3000)]
    for text in texts:
        sent = page_text(literal(text))
        # The page cannot send a backslash at the end; a space behind it changes no token.
        assert sent == text or (text.endswith("\\") and sent == text + " "), text
    assert literal("plain text, 红苹果") == "plain text, 红苹果"
    assert page_text("a {red|green} apple // x") == "a red apple "


def test_every_kind_has_its_sockets_named_once():
    for name, kind in KINDS.items():
        inputs, outputs = ([socket for socket, _ in sockets] for sockets in (kind.inputs, kind.outputs))
        assert len(set(inputs)) == len(inputs) and len(set(outputs)) == len(outputs), name
        assert not (name.startswith("HyDiT") and set(inputs) & set(outputs)), name
