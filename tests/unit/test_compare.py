"""`python -m hydit_core.compare` on a tiny random model and on folders."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core import load
from hydit_core.compare import draw, report
from hydit_core.compare.__main__ import main
from hydit_core.compare.sides import parse_side, take_sides
from hydit_core.compare.store import pixels_of
from hydit_core.errors import ConfigError, DataError

PROMPTS = ["--prompt", "a red apple", "小鸟"]


@pytest.fixture
def compare(tiny_model_file, capsys, tmp_path, monkeypatch):
    """Run the command in an empty folder, with a model in every side; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **sides):
        model = f"--model '{tiny_model_file}' --device cpu "
        drawn = [word for name, text in sides.items() for word in (f"--{name}", model + text)]
        code = main([*map(str, arguments), *drawn])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def compared(tiny_model_file, tmp_path_factory):
    """One comparison that many tests look at."""
    out = tmp_path_factory.mktemp("compared") / "out"
    model = f"--model '{tiny_model_file}' --device cpu "
    sides = {"a": "--steps 4", "b": "--steps 3 --cfg 1", "c": "--peer-steps b"}
    words = [w for n, t in sides.items() for w in (f"--{n}", t if n == "c" else model + t)]
    given = ["--prompt", "a red apple", "<b>&\"'</script>", "--seeds", "2", "--size", "64x64", "48x64"]
    code = main([*given, "--noise-floor", "bf16", "batch", "--batch", "2", "-o", str(out), *words])
    assert code == 0
    return out, json.loads((out / "compare.json").read_text("utf-8"))


def test_every_side_draws_every_prompt_seed_and_size(compared):
    out, found = compared
    assert list(found["sides"]) == ["a", "b", "c", "noise floor (bf16)", "noise floor (batch)"]
    for name in ("a", "b", "c", "noise-floor-bf16"):
        assert len(list((out / "pictures" / name).glob("*.png"))) == 8
    assert len(found["pairs"]) == 4 * 8
    assert {tuple(pair["size"]) for pair in found["pairs"]} == {(64, 64), (48, 64)}
    assert {pair["seed"] for pair in found["pairs"]} == {0, 1}


def test_calls_are_counted_and_a_peer_does_the_same_work(compared):
    figures = {name: side["figures"] for name, side in compared[1]["sides"].items()}
    assert (figures["a"]["calls"], figures["a"]["passes"]) == (4, 8)
    assert (figures["b"]["calls"], figures["b"]["passes"]) == (3, 3)  # without guidance
    # 3 passes cost 1.5 guided steps: the peer gets 2
    assert (figures["c"]["calls"], figures["c"]["passes"]) == (2, 4)
    assert compared[1]["sides"]["c"]["options"]["steps"] == 2
    assert "cfg" not in compared[1]["sides"]["c"]["options"]  # as the reference
    assert compared[1]["sides"]["c"]["drawn"]["cfg"] == 2  # as the model recommends
    assert all(one["seconds"] > 0 for one in figures.values())


def test_figures_follow_from_the_pixels_before_rounding(compared, tiny_model_file):
    _, found = compared
    pipe = load(tiny_model_file, device="cpu")
    errors = []
    for seed in (0, 1):
        sides = [
            next(iter(pipe.pictures(["a red apple"], pipe.settings(width=48, height=64, **given), seed=seed)))
            for given in ({"steps": 4}, {"steps": 3, "cfg": 1.0})
        ]
        errors.append(float((sides[0].pixels - sides[1].pixels).square().mean()))
    kept = [
        pair["mse"]
        for pair in found["pairs"]
        if (pair["side"], pair["prompt"], pair["size"]) == ("b", "a red apple", [48, 64])
    ]
    assert kept == pytest.approx(errors, rel=1e-3)


def test_the_floor_is_below_what_settings_change(compared):
    sides = compared[1]["sides"]
    bf16, batch, other = (
        sides[name]["figures"]["psnr"]["mean"] for name in ("noise floor (bf16)", "noise floor (batch)", "b")
    )
    assert batch > bf16 > other
    assert sides["noise floor (bf16)"]["options"]["dtype"] == "bf16"


def test_the_page_asks_for_nothing_and_escapes_what_users_write(compared):
    page = (compared[0] / "index.html").read_text("utf-8")
    assert "&lt;b&gt;&amp;&#34;&#39;&lt;/script&gt;" in page and '<b>&"' not in page
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy
    addresses = re.findall(r'(?:src|href|action)="(.*?)"', page)
    assert addresses and all(one.startswith("data:image/webp;base64,") for one in addresses)
    assert not re.search(r'\son\w+="|style="', page)  # a strict policy refuses these


def test_the_policy_names_the_script_s_and_the_style_s_hash(compared):
    import base64
    import hashlib

    page = (compared[0] / "index.html").read_text("utf-8")
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        mark = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode().replace("+", "&#43;")
        assert f"{tag}-src &#39;sha256-{mark}&#39;" in page.replace("+", "&#43;")


def test_a_run_that_broke_off_goes_on(compare, monkeypatch):
    arguments = [*PROMPTS, "--seeds", 2, "--batch", 2, "-o", "out"]
    real, calls = draw.Store.put, []

    def breaking(self, item, *rest):
        if len(calls) == 5:
            raise ConfigError("broken")
        calls.append(item)
        real(self, item, *rest)

    monkeypatch.setattr(draw.Store, "put", breaking)
    code, _, err = compare(*arguments, a="--steps 2", b="--steps 1")
    assert code == 2 and "broken" in err
    monkeypatch.setattr(draw.Store, "put", lambda *given: (calls.append(given[1]), real(*given)))
    calls.clear()
    assert compare(*arguments, a="--steps 2", b="--steps 1")[0] == 0
    # The four of a and one of b were there; the other of that batch is drawn with it again.
    assert len(calls) == 4


def test_a_finished_report_is_replaced_only_when_asked(compare, tmp_path):
    arguments = ["--prompt", "cat", "-o", "out"]
    assert compare(*arguments, a="--steps 1", b="--steps 2")[0] == 0
    before = (tmp_path / "out/compare.json").read_bytes()
    code, _, err = compare(*arguments, a="--steps 1", b="--steps 2")
    assert code == 2 and "compare.json exists" in err and "--overwrite" in err
    assert (tmp_path / "out/compare.json").read_bytes() == before
    code, _, err = compare(*arguments, "--overwrite", a="--steps 1", b="--steps 3")
    assert code == 2 and "other settings: --steps" in err
    # A side more is drawn beside those that are there.
    assert compare(*arguments, "--overwrite", a="--steps 1", b="--steps 2", d="--cfg 1")[0] == 0
    assert "d" in json.loads((tmp_path / "out/compare.json").read_text())["sides"]


def test_another_model_under_the_same_name_is_noticed(compare, tiny_model_file, tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(tiny_model_file.read_bytes())
    sides = [f"--{n}=--model mine.safetensors --device cpu --steps {s}" for n, s in (("a", 1), ("b", 2))]
    assert compare("--prompt", "cat", "-o", "out", *sides)[0] == 0
    changed = bytearray(mine.read_bytes())
    changed[-9] ^= 1
    mine.write_bytes(changed)
    code, _, err = compare("--prompt", "cat", "-o", "out", "--overwrite", *sides)
    assert code == 2 and "pictures of other files" in err


def test_sides_that_share_a_model_load_it_once(compare, monkeypatch):
    loaded = []
    real = draw.drawing.load_model
    monkeypatch.setattr(draw.drawing, "load_model", lambda *given: loaded.append(1) or real(*given))
    sides = {"a": "--steps 1", "b": "--steps 2 --dtype bf16", "c": "--steps 1 --cfg 1"}
    assert compare("--prompt", "cat", "-o", "out", **sides)[0] == 0
    assert len(loaded) == 2


@pytest.mark.parametrize(
    "arguments, sides, said",
    (
        ([], {"a": ""}, "two sides or more"),
        (PROMPTS, {"a": "--steps x", "b": ""}, "--a: argument --steps"),
        (PROMPTS, {"a": "", "b": "--seed 3"}, "--b: --seed is the same for all sides"),
        (PROMPTS, {"a": "", "b": "--size 64x64"}, "--b: --size is the same for all sides"),
        (PROMPTS, {"a": "", "b": "--out x"}, "--b: --out does not belong to a side"),
        (PROMPTS, {"a": "", "b": "--plan"}, "--b: --plan does not belong to a side"),
        (PROMPTS, {"a": "", "b": "--nonsense"}, "--nonsense"),
        (PROMPTS, {"a": "", "b": "--help"}, "--help does not belong there"),
        (PROMPTS, {"a": "", "b": "--negative 'x"}, "No closing quotation"),
        (PROMPTS, {"a": "", "b": "--peer-steps q"}, "name a side that is no peer itself"),
        (PROMPTS, {"a": "", "b": "--peer-steps"}, "needs the letter of another side"),
        ([*PROMPTS, "--reference", "x"], {"a": "", "b": ""}, "there is no such side, only: a, b"),
        ([*PROMPTS, "--seeds", 0], {"a": "", "b": ""}, "--seeds 0"),
        ([], {"a": "", "b": ""}, "nothing to draw"),
        ([*PROMPTS, "--pages-of", 0], {"a": "", "b": ""}, "--pages-of 0"),
        ([*PROMPTS, "--a", "nowhere", "--b", "--steps 1"], {}, "no such folder"),
        ([*PROMPTS, "--a", ".", "--b", "--steps 1"], {}, "some sides are folders"),
        ([*PROMPTS, "--a", "", "--a", ""], {}, "--a is given twice"),
        ([*PROMPTS, "--blind", "a"], {"a": "", "b": ""}, "--blind a: name a side that is not the reference"),
        (["--answers", "x.txt"], {}, "belong together"),
        ([*PROMPTS, "--judge", "x"], {"a": "", "b": ""}, "FILE.py:FUNCTION"),
        ([*PROMPTS, "--judge", "x.py:f"], {"a": "", "b": ""}, "no such file"),
    ),
)
def test_what_cannot_work_is_one_line(compare, tmp_path, arguments, sides, said):
    code, out, err = compare(*arguments, "-o", "out", **sides)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_options_are_read_as_a_shell_reads_them():
    sides, others = take_sides(["--seeds", "2", "--a", "--partial", "--b=--negative 'a b'", "--c", ""])
    assert sides == [("a", "--partial"), ("b", "--negative 'a b'"), ("c", "")]
    assert others == ["--seeds", "2"]
    assert parse_side("a", "--partial").args.partial
    assert parse_side("b", "--negative 'a b'").args.negative == "a b"
    peer = parse_side("c", "--peer-steps b --cfg 2", "--sampler ddim --cfg 5").args
    assert (peer.sampler, peer.cfg) == ("ddim", 2)


def test_a_side_without_its_options(compare):
    code, _, err = compare("--prompt", "cat", "-o", "out", "--a")
    assert code == 2 and "--a needs the options" in err


def test_a_judge_of_the_user_counts_right_pictures(compare, tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'apple'\n")
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside import WORD\n"
        "@dataclass\n"
        "class Wanted:\n"
        "    word: str\n"
        "def right(picture, prompt):\n"
        "    assert picture.size == (64, 64)\n"
        "    return None if 'cat' in prompt else Wanted(WORD).word in prompt\n"
    )
    before = list(sys.path)
    code, out, _ = compare(
        *PROMPTS, "cat", "--judge", "judge.py:right", "-o", "out", a="--steps 1", b="--steps 2"
    )
    assert code == 0 and "1 of 2" in out and sys.path == before
    figures = json.loads((tmp_path / "out/compare.json").read_text())["sides"]["b"]["figures"]
    assert (figures["right"], figures["judged"]) == (1, 2)


# -- folders ------------------------------------------------------------------------------------------------


def folder(path, **pictures):
    path.mkdir()
    for name, value in pictures.items():
        Image.new("RGB", (32, 24), (value, value, value)).save(path / name.replace("_", "."))
    return path


def test_folders_are_matched_by_name(compare, tmp_path):
    folder(tmp_path / "one", x_png=0, y_png=100, only_png=1)
    folder(tmp_path / "two", x_bmp=51, y_png=100)
    code, out, err = compare("--a", "one", "--b", "two", "-o", "out")
    assert code == 0 and "only" in err and "left out" in err
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert [(pair["picture"], pair["mse"]) for pair in found["pairs"]] == [
        ("x", pytest.approx(0.04)),
        ("y", 0),
    ]
    assert "calls" not in out.splitlines()[3]


def test_folders_that_do_not_fit_are_refused(compare, tmp_path):
    folder(tmp_path / "one", x_png=0)
    folder(tmp_path / "two", y_png=0)
    code, _, err = compare("--a", "one", "--b", "two", "-o", "out")
    assert code == 2 and "no picture of the same name" in err
    Image.new("RGB", (40, 24)).save(tmp_path / "two/x.png")
    code, _, err = compare("--a", "one", "--b", "two", "-o", "out")
    assert code == 2 and "40x24" in err and "32x24" in err
    assert not (tmp_path / "out/compare.json").exists()


def test_exact_pixels_beside_a_picture_are_checked(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (32, 24)).save(path)
    np.save(tmp_path / "x.npy", np.full((3, 24, 32), 6553, np.uint16))
    assert torch.allclose(pixels_of(path), torch.tensor(0.1), atol=1e-4)
    for wrong in (np.zeros((3, 32, 24), np.uint16), np.zeros((3, 24, 32)), np.array([{}], dtype=object)):
        np.save(tmp_path / "x.npy", wrong, allow_pickle=True)
        with pytest.raises(DataError, match=r"not the pixels of x\.png"):
            pixels_of(path)


def test_more_pages_when_one_does_not_hold_all(compare, tmp_path):
    folder(tmp_path / "one", **{f"p{i}_png": 0 for i in range(5)})
    folder(tmp_path / "two", **{f"p{i}_png": 10 * i for i in range(5)})
    code, out, _ = compare("--a", "one", "--b", "two", "-o", "out", "--pages-of", 2)
    assert code == 0
    pages = [(tmp_path / "out" / name).read_text() for name in ("index.html", "page-2.html", "page-3.html")]
    assert [re.findall("<q>(.*?)</q>", page) for page in pages] == [["p4", "p3"], ["p2", "p1"], ["p0"]]
    assert report.PAGE in out and "page-3.html" in out
