"""docs/configuration.md and its Chinese edition: what the schema gives, and what the trainer does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from hydit_core.train.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "make_configuration.py"


def _load():
    spec = importlib.util.spec_from_file_location("make_configuration", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load()
KEYS = [key for table in make.tables() for key in table.keys]


@pytest.mark.parametrize("language", make.PAGES)
def test_page_is_current(language):
    written = make.PAGES[language].read_text(encoding="utf-8")
    assert written == make.pages()[language], "run: python docs/make_configuration.py"


def test_every_key_has_a_meaning_in_both_languages():
    told = make.read_toml(make.TABLE)
    names = [key.name for key in KEYS]
    assert len(names) == len(set(names)) > 100
    assert set(told["keys"]) == set(names), "docs/configuration.toml: missing, or of no key"
    assert set(told["tables"]) == {table.name for table in make.tables()}
    for key in KEYS:
        assert key.field.description, f"{key.name}: no description in the schema"
        assert re.search(r"[一-鿿]", told["keys"][key.name]["zh"]), key.name


def test_a_key_without_a_chinese_meaning_is_told(monkeypatch):
    told = make.read_toml(make.TABLE)
    del told["keys"]["data.flip"]
    monkeypatch.setattr(make, "read_toml", lambda path: told)
    with pytest.raises(KeyError, match=r"data\.flip"):
        make.pages()


def test_keys_are_those_of_the_schema():
    """Counted in the JSON schema, which pydantic makes by itself."""
    schema = TrainConfig.model_json_schema()
    names = set()

    def walk(node, path):
        if "$ref" in node:
            walk(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], path)
        for inner in [*node.get("anyOf", ()), *node.get("oneOf", ())]:
            walk(inner, path)
        if isinstance(node.get("items"), dict):
            walk(node["items"], path)
        for name, inner in node.get("properties", {}).items():
            names.add(f"{path}{name}")
            walk(inner, f"{path}{name}.")

    walk(schema, "")
    tables = {table.name for table in make.tables()}
    assert {key.name for key in KEYS} == names - (tables - {"model.text_encoders"})


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("data.flip", ["0.0", "1.0"], ["-0.1", "1.1"]),
        ("data.min_side", ["0", "16384"], ["-1", "16385"]),
        ("ema.decay", ["0.0", "0.99"], ["1.0"]),
        ("lora.rank", [], ["0", "8193"]),
        ("run.batch_size", ["1", "65536"], ["0", "65537"]),
        ("run.seed", ["0", "9223372036854775807"], ["-1"]),
        ("run.gradient_checkpointing", ["true", "0.5", "1.0"], ["1.1"]),
        ("data.resolution", ["16", "[64, 16384]"], ["15", "17", "16392"]),
        ("model.info.defaults.width", ["8", "8192"], ["0", "12", "8200"]),
    ],
)
def test_ranges_are_true(tmp_path, key, inside, outside):
    """The limits that the page tells are those at which the trainer refuses."""
    file = tmp_path / "a.toml"
    file.write_text(
        '[model]\ninit_from = "x"\n[[data.sources]]\npath = "x"\n'
        '[run]\noutput_dir = "y"\nsteps = 1\nbatch_size = 1\n'
    )
    for value in inside:
        load_config(file, [f"{key}={value}"])
    for value in outside:
        with pytest.raises(Exception, match=re.escape(key.rsplit(".", 1)[-1])):
            load_config(file, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("name", "english", "chinese"),
    [
        ("data.flip", "0 to 1", "0 到 1"),
        ("ema.decay", "0 to below 1", "0 到 1（不含 1）"),
        ("run.answer_within", "above 0, up to 10^6", "大于 0，不超过 10^6"),
        ("data.prior.share", "above 0, below 1", "大于 0，小于 1"),
        ("run.batch_size", "1 to 65536", "1 到 65536"),
        ("run.seed", "0 to 2^63 - 1", "0 到 2^63 - 1"),
        ("samples.width", "16 to 16384, multiples of 8", "16 到 16384，须为 8 的倍数"),
        ("optimizer.betas", "two numbers, each 0 to below 1", "两个数，均为 0 到 1（不含 1）"),
        ("model.info.defaults.steps", "1 to 100000", "1 到 100000"),
        (
            "model.info.defaults.sampler",
            "`ddpm`, `ddim`, `dpmpp_2m`, `euler`, `lcm`",
            "`ddpm`、`ddim`、`dpmpp_2m`、`euler`、`lcm`",
        ),
    ],
)
def test_values_in_words(name, english, chinese):
    key = next(key for key in KEYS if key.name == name)
    assert make._values(key, "en") == english
    assert make._values(key, "zh") == chinese
