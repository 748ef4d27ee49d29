"""The nodes' texts in the page: locales/ and web/docs/ against the schemas, in English and Chinese.

The schemas are read by importing the pack with stand-ins for ComfyUI, so this runs without one.

    python -m tests.unit.test_locales      writes locales/en/nodeDefs.json from the schemas, and locales/zh-TW
                                           from locales/zh
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from hydit_core.facts import SamplingDefaults
from hydit_core.lora.adapter import Adapter
from hydit_core.lora.kinds import BiasOnly, Diff, DoRA, LoRA
from hydit_core.presets import size_advice
from hydit_core.text.features import PromptReport, TokenReport

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")
NODES = (
    "HyDiTCheckpointLoader",
    "HyDiTControlNetApply",
    "HyDiTControlNetLoader",
    "HyDiTDatasetCheck",
    "HyDiTDiTLoader",
    "HyDiTEmptyLatent",
    "HyDiTForecast",
    "HyDiTIPAdapterApply",
    "HyDiTIPAdapterLoader",
    "HyDiTKSampler",
    "HyDiTLayerWeights",
    "HyDiTLoraLoader",
    "HyDiTLoraMerge",
    "HyDiTLoraSave",
    "HyDiTModelSave",
    "HyDiTSampler",
    "HyDiTScheduler",
    "HyDiTTextEncode",
    "HyDiTTextEncoderLoader",
    "HyDiTTiles",
    "HyDiTTrainLoRA",
    "HyDiTTrainMonitor",
)
PACK = "hydit_pack_without_comfyui"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# What vue-i18n, which the page translates with, takes for syntax.
SYNTAX = re.compile(r"[{}|@]")


# -- the schemas ---------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """What a schema says of an input or an output."""

    id: str
    tooltip: str | None = None
    options: list[str] = field(default_factory=list)
    generated: bool = False  # has a control_after_generate widget beside it


def _input(id: str, *, tooltip: str | None = None, options: Any = None, **rest: Any) -> Slot:
    known = list(options) if isinstance(options, list) else []
    return Slot(id, tooltip, known, bool(rest.get("control_after_generate")))


def _output(id: str | None = None, *, tooltip: str | None = None, display_name: str | None = None) -> Slot:
    return Slot(id or display_name or "", tooltip)


class _Io(types.ModuleType):
    """comfy_api.latest.io as far as schemas go: every type's Input and Output remember what they are told."""

    ComfyNode = type("ComfyNode", (), {})
    NodeOutput = object
    Hidden = MagicMock()
    Custom = staticmethod(lambda name: types.SimpleNamespace(Input=_input, Output=_output))
    Schema = make_dataclass(
        "Schema",
        [
            (name, Any, None)
            for name in ("node_id", "display_name", "category", "description", "inputs", "outputs", "hidden")
        ]
        + [("is_output_node", bool, False), ("search_aliases", Any, None)],
    )

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            raise AttributeError(name)
        return types.SimpleNamespace(Input=_input, Output=_output)


class _HostModules(MetaPathFinder, Loader):
    """Empty stand-ins for nodes/host/*, which need a real ComfyUI."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{PACK}.nodes.host.") else None

    def create_module(self, spec: ModuleSpec) -> Any:
        # As a list of files: none here.
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


def read_schemas() -> dict[str, Any]:
    """The schemas of all nodes by id; leaves sys.modules as it was."""
    before = dict(sys.modules)
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ui = _Io("comfy_api.latest.io"), MagicMock()  # type: ignore[attr-defined]
    latest.ComfyExtension = object  # type: ignore[attr-defined]
    api = types.ModuleType("comfy_api")
    api.latest = latest  # type: ignore[attr-defined]
    api.__spec__ = ModuleSpec("comfy_api", None)
    finder = _HostModules()
    sys.modules.update({"comfy_api": api, "comfy_api.latest": latest})
    sys.meta_path.insert(0, finder)
    try:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        nodes = sys.modules[f"{PACK}.nodes"].NODES
        return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name == PACK or name.startswith((f"{PACK}.", "comfy_api")):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.startswith("comfy_api")})


def said_in_english(schema: Any) -> dict[str, Any]:
    """What locales/en/nodeDefs.json has to say of a node: what its schema says."""
    inputs: dict[str, Any] = {}
    for slot in schema.inputs:
        inputs[slot.id] = {"name": slot.id, "tooltip": slot.tooltip}
        if slot.options and not _of_files(slot):
            inputs[slot.id]["options"] = {option: option for option in slot.options}
        if slot.generated:
            inputs["control_after_generate"] = {"name": "control after generate"}
    outputs = {
        str(i): {"name": slot.id, **({"tooltip": slot.tooltip} if slot.tooltip else {})}
        for i, slot in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def _of_files(slot: Slot) -> bool:
    return slot.id.endswith("_name")


@pytest.fixture(scope="module")
def all_schemas() -> dict[str, Any]:
    return read_schemas()


@pytest.fixture(scope="module")
def schemas(all_schemas) -> dict[str, Any]:
    return all_schemas


def load(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, with where it is."""
    if isinstance(value, str):
        yield path, value
    else:
        for key, part in value.items():
            yield from texts(part, f"{path}.{key}")


# -- the schemas themselves ----------------------------------------------------------------------------------


def test_every_node_is_there(all_schemas):
    assert sorted(all_schemas) == sorted(NODES)


def test_every_input_has_a_tooltip(all_schemas):
    silent = [
        (node, slot.id) for node, schema in all_schemas.items() for slot in schema.inputs if not slot.tooltip
    ]
    assert not silent


# -- locales -------------------------------------------------------------------------------------------------


def test_english_says_what_the_schemas_say(schemas):
    defs = load("en", "nodeDefs")
    for node, schema in schemas.items():
        assert defs.get(node) == said_in_english(schema), f"locales/en/nodeDefs.json: {node}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_output_and_option_is_named(schemas, language):
    defs = load(language, "nodeDefs")
    assert sorted(defs) == sorted(schemas)
    for node, schema in schemas.items():
        wanted, found = said_in_english(schema), defs[node]
        shapes = [[path for path, _ in texts(what)] for what in (wanted, found)]
        assert sorted(shapes[0]) == sorted(shapes[1]), f"locales/{language}/nodeDefs.json: {node}"
        assert all(text.strip() for _, text in texts(found))


def test_chinese_is_chinese():
    defs = load("zh", "nodeDefs")
    for node, said in defs.items():
        for path, text in texts(said):
            if path.endswith((".tooltip", ".description", ".display_name")):
                assert CHINESE.search(text), f"{node}{path}: {text}"


@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_pages_in_the_other_chinese_are_not_english(name):
    """Such pages fall back to English: what is written for one Chinese is served for both."""
    assert load("zh-TW", name) == load("zh", name)


def test_chinese_options_are_distinct():
    for said in load("zh", "nodeDefs").values():
        for slot in said["inputs"].values():
            labels = list(slot.get("options", {}).values())
            assert len(labels) == len(set(labels))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_no_text_is_taken_for_syntax(language, name):
    values = load(language, name)
    values.pop("hydit", None)  # not read by vue-i18n but by web/js/locale.js
    wrong = [(path, text) for path, text in texts(values) if SYNTAX.search(text)]
    assert not wrong


def test_both_languages_have_the_same_words():
    words = {language: load(language, "main") for language in LANGUAGES}
    for name in ("report", "lora", "notes", "forecast", "training"):
        words["zh"]["hydit"][name].pop("rules")
    paths = {language: {path for path, _ in texts(value)} for language, value in words.items()}
    assert paths["en"] == paths["zh"]
    for path, english in texts(words["en"]):
        chinese = dict(texts(words["zh"]))[path]
        assert re.findall(r"\{\w+\}", english) == re.findall(r"\{\w+\}", chinese), path


def test_the_page_asks_for_words_that_exist():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "js").glob("*.js")}
    assert sources
    known = {path.removeprefix(".hydit.") for path, _ in texts(load("en", "main"))}
    for path, source in sources.items():
        asked = set(re.findall(r'\btext\(\s*"([\w.]+)"', source))
        for words in re.findall(r'words: "(\w+)"', source):
            asked |= {f"{words}.label", f"{words}.none"}
        assert asked <= known, f"{path.name} asks for {asked - known}"


def translated(said: str, rules: Any) -> str:
    """A report as web/js/locale.js translates it."""
    lines = []
    for i, line in enumerate(said.split("\n")):
        for pattern, to in rules["lines" if i else "first"].items():
            line = re.sub(pattern, re.sub(r"\$(\d)", r"\\\1", to), line)
        lines.append(line)
    return "\n".join(lines)


def test_reports_of_loras_are_translated_but_for_what_they_quote():
    rules = load("zh", "main")["hydit"]["lora"]["rules"]
    factors = {"up": torch.ones(4, 2), "down": torch.ones(2, 4)}
    lora, dora = LoRA(factors), DoRA(factors, magnitude=torch.ones(4))
    bias, diff = BiasOnly(bias=torch.ones(4)), Diff({"diff": torch.ones(4, 4)})
    for modules, expected in (
        ({"dit.a": [lora], "dit.b": [lora]}, "comfy 格式，LoRA，秩 2，DiT 2 个模块"),
        (
            {"dit.a": [dora], "bert.b": [diff], "t5.c": [diff]},
            "comfy 格式，LoRA+完整差值+DoRA，秩 2，DiT 1 个模块，BERT 1 个模块，mT5 1 个模块",
        ),
        ({"dit.a": [bias]}, "comfy 格式，偏置，DiT 1 个模块"),
    ):
        assert translated(Adapter(modules, format="comfy").describe(), rules) == expected
    for line, expected in (
        ("trigger words: the model has no LoRA, 3 of BERT", "触发词：the model has no LoRA, 3 of BERT"),
        (
            "BERT: 12 modules left out; connect clip to use them",
            "BERT：12 个模块未使用，连接 CLIP 后才会生效",
        ),
        ("the model has no blocks.7.mlp.fc1", "模型中没有 blocks.7.mlp.fc1"),
        ("mT5 has no a, b, c, d and 3 more", "mT5 中没有 a, b, c, d 等，另有 3 个"),
        ("merged: my lora at 0.5, x at 1", "已合并（at 后为强度）：my lora at 0.5, x at 1"),
    ):
        assert translated("x\n" + line, rules) == "x\n" + expected


def test_advice_of_the_sampler_is_translated():
    rules = load("zh", "main")["hydit"]["notes"]["rules"]
    sizes = [size_advice(SamplingDefaults(), side, side) or "" for side in (64, 4096)]
    others = [
        "preset v1.1 is meant for another release than this model (v1.2)",
        "denoise 0.5 of an empty latent: there is no picture to start from",
    ]
    for first in (*sizes, *others):
        said = translated("\n".join([first, *sizes, *others]), rules)
        left = re.sub(r"\d+x\d+|v1\.\d|Latent", "", said)
        assert not re.search(r"[A-Za-z]", left), said


def test_what_forecasts_took_is_translated():
    rules = load("zh", "main")["hydit"]["forecast"]["rules"]
    both = "EasyCache is on this model too and left out some of those: use one of the two"
    said = translated(f"30 of 50 calls of the model were real\n{both}", rules)
    assert not re.search("[A-Za-z]", said.replace("EasyCache", ""))


def test_reports_are_translated_but_for_what_they_quote():
    rules = load("zh", "main")["hydit"]["report"]["rules"]
    quoted = "a cat, BERT 9 of 77 tokens"
    cases = [
        PromptReport(TokenReport("BERT", 9, 77), TokenReport("mT5", 12, 256)),
        PromptReport(
            TokenReport("BERT", 90, 77, cut=quoted), TokenReport("mT5", 300, 256, cut="dog", unknown=("☃",))
        ),
        PromptReport(TokenReport("BERT", 90, 77, chunks=2), TokenReport("mT5", 12, 256)),
        PromptReport(
            TokenReport(
                "BERT", 9, 77, left_out=("☃ (768 wide, not 1024)", "☂ (its file holds no embedding)")
            ),
            TokenReport("mT5", 12, 256, left_out=("☃ (not found, or not readable)",)),
        ),
    ]
    for case in cases:
        said = translated(str(case), rules)
        assert quoted in said or not case.bert.cut
        left = re.sub(r"BERT|mT5|dog", "", said.replace(quoted, ""))
        assert not re.search(r"[A-Za-z]", left), said


# -- help pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_help_page(schemas, node, language):
    docs = ROOT / "web" / "docs"
    page = (docs / node / f"{language}.md").read_text(encoding="utf-8")
    titles = re.findall(r"^# (.+)$", page, re.M)
    assert titles == [load(language, "nodeDefs")[node]["display_name"]]
    sections = {
        "en": ["Inputs", "Outputs", "Example", "Good to know"],
        "zh": ["输入", "输出", "示例", "注意"],
    }
    assert re.findall(r"^## (.+)$", page, re.M) == sections[language]
    schema = schemas[node]
    for slot in schema.inputs:
        assert f"**`{slot.id}`**" in page, f"does not explain {slot.id}"
        for option in slot.options:
            assert f"`{option}`" in page, f"does not explain {slot.id} {option}"
    for slot in schema.outputs:
        assert f"**`{slot.id}`**" in page, f"does not explain the output {slot.id}"
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page):
        assert (docs / picture).is_file() and not picture.startswith(("/", "..")), picture
    if language == "zh":
        assert len(CHINESE.findall(page)) > len(re.findall(r"\b[A-Za-z]{3,}\b", page))


def test_no_page_of_a_node_that_is_none():
    assert sorted(path.name for path in (ROOT / "web" / "docs").iterdir() if path.name != "images") == sorted(
        NODES
    )


if __name__ == "__main__":
    schemas_by_id = read_schemas()
    said = {node: said_in_english(schema) for node, schema in schemas_by_id.items() if node in NODES}
    target = ROOT / "locales" / "en" / "nodeDefs.json"
    target.write_text(json.dumps(said, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for name in ("main.json", "nodeDefs.json"):
        copy = ROOT / "locales" / "zh-TW" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / "locales" / "zh" / name).read_bytes())
