"""The page of a run: what it collects, what it does not believe, and the server that shows it."""

from __future__ import annotations

import html
import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_setup import run_training, write_run

from hydit_core.errors import HyditError
from hydit_core.train.__main__ import main
from hydit_core.train.page.collect import MOST_POINTS, MOST_SHEETS, collect
from hydit_core.train.page.write import page, server


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_real_run_with_its_pictures_configuration_and_way_on(tmp_path, capsys):
    config = write_run(tmp_path)
    sets = ["run.steps=4", "schedule.warmup_steps=1", "run.grad_accumulation=1", "validation.every=2"]
    sets += ["samples.every=2", "samples.prompts=['a red apple']", "samples.steps=1"]
    assert run_training(config, *sets)
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.html").read_text("utf-8")
    assert "val_loss_ema" in capsys.readouterr().out
    (run,) = data_of(text)
    assert (run["step"], run["total"], run["skipped"]) == (4, 4, 0)
    assert [sheet["step"] for sheet in run["sheets"]] == [0, 2, 4]
    assert run["curves"]["val_loss"]["step"] == [0, 2, 4] and run["best"]["step"] in (2, 4)
    told = {one["key"]: one for one in run["config"]}
    assert told["optimizer.lr"] == {"key": "optimizer.lr", "value": "0.001", "own": True}
    assert told["optimizer.eps"]["own"] is False and told["objective.train_text_encoders"]["value"] == "true"
    assert str(tmp_path / "run") in run["command"] and "run.steps=N" in run["command"]
    # Nothing is asked of a network, and only these two elements run or style anything.
    assert not re.search(
        r"""(src|href)=["']?(?!data:)""", re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', text)[1])
    assert (
        policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "connect" not in policy
    )


def test_many_records_become_means_and_bounds(tmp_path):
    values = np.random.default_rng(0).random(10_000)
    records = [{"step": 5 * i, "loss": v, "seconds": 20.0 * i} for i, v in enumerate(values.tolist(), 1)]
    curve = collect(written(tmp_path, records))["curves"]["loss"]
    size = -(-len(values) // MOST_POINTS)
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    assert len(curve["step"]) == len(parts) <= MOST_POINTS and curve["step"][-1] == 50_000
    for name, made in (("mean", np.mean), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose(curve[name], [made(part) for part in parts], rtol=1e-12)
    assert set(collect(tmp_path)["curves"]["speed"]["mean"]) == {4.0}


def test_losses_by_timestep_are_in_order_and_of_the_averages(tmp_path):
    losses = {f"val_mse_t{n}_{n + 249}{end}": 1.0 for n in (500, 0, 750, 250) for end in ("", "_ema")}
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "val_mse_t0_249": 1.0}, {"step": 3, **losses}]
    names = [name for name in collect(written(tmp_path, records))["curves"] if "_t" in name]
    assert names == [f"val_mse_t{n}_{n + 249}_ema" for n in (0, 250, 500, 750)]
    names = collect(written(tmp_path, records[:2]))["curves"]
    assert "val_mse_t0_249" in names


def test_no_more_sheets_than_a_page_carries(tmp_path):
    written(tmp_path, [{"step": 1, "loss": 1.0}])
    (tmp_path / "samples").mkdir()
    for step in range(0, 1000, 10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"samples/step_{step:08d}.png")
    (tmp_path / "samples/step_00000010.png").write_bytes(b"half a pict")
    (tmp_path / "samples/step_x.png").write_bytes(b"")
    steps = [sheet["step"] for sheet in collect(tmp_path)["sheets"]]
    assert len(steps) == MOST_SHEETS and steps[0] == 0 and steps[-1] == 990
    assert max(np.diff(steps)) <= 50


def test_nothing_in_a_run_is_believed(tmp_path):
    """Odd values, texts that would end an element, a state that is none."""
    evil = "</script><script>alert(1)</script><!--"
    folder = written(
        tmp_path / "a<b>&'\"", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "x", "skipped": []}]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1e300, "seconds": true}\n{"step": 4, "loss": NaN}\n{"step": 5, "los')
    state = folder / "checkpoints/step_00000004"
    state.mkdir(parents=True)
    config = {"run": {"steps": evil}, evil: [evil]}
    for content in (
        {"config": config, "progress": {"health": {"trouble": evil}, "best": [1]}},
        {"config": 3, "progress": "x"},
        {"progress": {"best": {"step": "1", "val_loss": None}}},
    ):
        (state / "state.json").write_text(json.dumps(content), "utf-8")
        text = page([folder])
        (run,) = data_of(text)
        assert run["curves"]["loss"]["mean"] == [1.0] and run["step"] == 3
        assert text.count("<script") == text.count("</script>") == 3 and evil not in text
    (state / "state.json").write_text("{", "utf-8")
    assert data_of(page([folder]))[0]["config"] == []


def test_several_runs_are_one_page(tmp_path, capsys):
    runs = [written(tmp_path / name, [{"step": 1, "loss": 1.0}]) for name in ("one", "two")]
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert [run["name"] for run in data_of(out.read_text("utf-8"))] == ["one", "two"]
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["{}"], ["{}", "--live"], ["{}/missing"], ["{}", "--live", "99999999"]]
)
def test_what_is_no_run_is_said_in_a_line(arguments, tmp_path, capsys):
    if "99999999" in arguments:
        written(tmp_path, [{"step": 1, "loss": 1.0}])
    assert main(["report", *(one.format(tmp_path) for one in arguments)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_the_server_shows_the_run_as_it_is_now_and_to_this_machine_only(tmp_path):
    folder = written(tmp_path, [{"step": 1, "loss": 1.0}])
    serving = server([folder], 0)
    assert serving.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{serving.server_address[1]}"

    def ask(path: str, host: str | None = None) -> str:
        request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.read().decode()

    try:
        text = ask("/")
        assert data_of(text)[0]["step"] == 1
        assert "connect-src &#39;self&#39;" in text and 'data-live="yes"' in text
        written(folder, [{"step": 1, "loss": 1.0}, {"step": 7, "loss": 0.5}])
        assert json.loads(ask("/data.json"))[0]["step"] == 7
        for path, host, code in (
            ("/../x", None, 404),
            ("/", "evil.example", 403),
            ("/data.json", "a.b:80", 403),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(path, host)
            assert caught.value.code == code
        (folder / "metrics.jsonl").unlink()
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask("/data.json")
        assert caught.value.code == 503
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join(10)
    with pytest.raises(HyditError, match="no losses recorded"):
        server([folder], 0)


def test_both_languages_say_the_same_things():
    words = json.loads((Path(collect.__code__.co_filename).parent / "words.json").read_text("utf-8"))
    assert words["en"].keys() == words["zh"].keys()
    for key, text in words["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words["zh"][key])), key
    script = (Path(collect.__code__.co_filename).parent / "page.js").read_text("utf-8")
    assert set(re.findall(r'say\("(\w+)"', script)) <= words["en"].keys()
