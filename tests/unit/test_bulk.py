"""`generate --shard-size`: rows of a table drawn into tar files, whose bytes no interruption changes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydit_core import load
from hydit_core.errors import HyditError
from hydit_core.generate.__main__ import main
from hydit_core.generate.bulk import asked, drawer
from hydit_core.generate.bulk.rows import Row
from hydit_core.generate.bulk.table import Prompts

ROWS = [
    {"prompt": "a red apple", "seed": 7},
    {"prompt": '绿色的汽车, "new"\nline', "negative": "blue"},
    {"prompt": "a cat", "width": 96, "height": 64},
    {"prompt": "a dog", "steps": 3, "cfg": 1.5},
    {"prompt": "a blue heart", "width": 96, "height": 64, "seed": 2**64 - 1},
]


@pytest.fixture
def bulk(tiny_model_file, capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder, 2 rows a shard; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", ROWS)

    def run(*arguments, out="tars", prompts="rows.jsonl", size=2):
        fixed = ["--model", tiny_model_file, "--device", "cpu", "--steps", 2, "--prompts", prompts]
        code = main(list(map(str, [*fixed, "--out", out, "--shard-size", size, *arguments])))
        return code, capsys.readouterr().err

    return run


def write_jsonl(name, rows):
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def contents(folder):
    """Every file by name, temporary and hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def samples(folder):
    """(shard, key, suffix, content) in the order of the files."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                key, _, suffix = member.name.partition(".")
                found.append((path.name, key, suffix, tar.extractfile(member).read()))
    return found


def test_shard_i_holds_rows_i_times_n_and_each_is_what_it_is_alone(bulk, tiny_model_file):
    assert bulk()[0] == 0
    assert sorted(contents("tars")) == ["000000.tar", "000001.tar", "000002.tar", "bulk.json"]
    found = samples("tars")
    assert [(shard, key, suffix) for shard, key, suffix, _ in found] == [
        (f"{row // 2:06d}.tar", f"{row:09d}", suffix) for row in range(5) for suffix in ("png", "json", "txt")
    ]
    pipe = load(tiny_model_file, device="cpu")
    for number, row in enumerate(ROWS):
        png, told, text = (content for _, _, _, content in found[3 * number : 3 * number + 3])
        assert text.decode() == row["prompt"]
        facts = json.loads(told)
        wanted = {"width": 64, "height": 64, "steps": 2, "seed": number, "row": number, **row}
        assert facts | wanted == facts and facts["key"] == f"{number:09d}"
        given = {name: row.get(name) for name in ("width", "height", "cfg", "negative")}
        alone = pipe(row["prompt"], seed=wanted["seed"], steps=wanted["steps"], **given)[0]
        with Image.open(io.BytesIO(png)) as image:
            assert image.size == (wanted["width"], wanted["height"])
            difference = np.asarray(image).astype(int) - np.asarray(alone).astype(int)
            assert abs(difference).max() <= 2  # rounding of a batch
            assert json.loads(image.info["hydit"])["prompt"] == row["prompt"]


def test_every_kind_of_table_gives_the_same_pictures(bulk):
    import pyarrow
    import pyarrow.parquet

    bulk()
    wanted = [sample[1:] for sample in samples("tars")]
    names = ["prompt", "seed", "width", "height", "steps", "cfg", "negative"]
    columns = {name: [row.get(name) for row in ROWS] for name in names}
    kinds = {name: pyarrow.uint64() for name in names[1:5]}  # seed: above int64
    arrays = {name: pyarrow.array(values, type=kinds.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), "rows.parquet", row_group_size=2)
    with open("rows.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([names, *zip(*columns.values(), strict=True)])
    with open("rows.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([names, *zip(*columns.values(), strict=True)])
    for kind in ("parquet", "csv", "tsv"):
        assert bulk(prompts=f"rows.{kind}", out=kind)[0] == 0
        assert [sample[1:] for sample in samples(kind)] == wanted


def test_text_is_a_prompt_a_line(bulk):
    Path("p.txt").write_bytes("\ufeffred apple\n\n  绿色的汽车 \r\nlast".encode())
    assert bulk(prompts="p.txt")[0] == 0
    assert [text.decode() for _, _, suffix, text in samples("tars") if suffix == "txt"] == [
        "red apple", "绿色的汽车", "last",
    ]  # fmt: skip


def test_what_was_interrupted_ends_with_the_same_bytes(bulk, monkeypatch):
    bulk(out="whole")
    whole = contents("whole")
    plain = drawer.Drawer._pictures
    for survivors in range(4):  # the batch at which it ends
        left = [survivors]

        def once(self, batch, cut, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return plain(self, batch, cut)

        monkeypatch.setattr(drawer.Drawer, "_pictures", once)
        assert bulk(out="broken")[0] == 130
        Path("broken/.000002.tar.999999-0123456789abcdef.tmp").write_bytes(b"of a killed process")
        monkeypatch.setattr(drawer.Drawer, "_pictures", plain)
        (Path("broken") / "000000.tar").unlink(missing_ok=True)
    assert bulk(out="broken")[0] == 0
    assert contents("broken") == whole


def test_what_is_there_is_not_drawn_again_nor_is_a_model_loaded(bulk, monkeypatch):
    bulk()
    whole = {path: path.stat().st_mtime_ns for path in Path("tars").iterdir()}
    monkeypatch.setattr(drawer.drawing, "load_model", lambda *_, **__: pytest.fail("loaded"))
    code, err = bulk()
    assert code == 0 and "all 3 shards of tars are there" in err
    assert {path: path.stat().st_mtime_ns for path in Path("tars").iterdir()} == whole


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_gives_the_same_bytes(bulk, monkeypatch, world):
    bulk(out="whole")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in reversed(range(world)):  # one may be killed and started again at any time
        monkeypatch.setenv("RANK", str(rank))
        assert bulk(out="shared")[0] == 0
    assert contents("shared") == contents("whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 3], "steps is 2 there, 3 now"),
        (["--seed", 1], "seed is 0 there, 1 now"),
        (["--together", 3], "together is 4 there, 3 now"),
        (["--on-error", "skip"], 'on_error is "stop" there, "skip" now'),
    ],
)
def test_a_folder_is_of_one_run(bulk, arguments, message):
    bulk()
    before = contents("tars")
    code, err = bulk(*arguments)
    assert code == 2 and f"error: tars holds pictures of another run: {message}; give the same" in err
    assert len(err.strip().splitlines()) == 1 and contents("tars") == before


def test_other_prompts_and_other_weights_are_another_run(bulk, tiny_model_file, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    bulk()
    before = contents("tars")
    write_jsonl("rows.jsonl", ROWS[:4])
    assert "the hash of the prompts' file is" in bulk()[1]
    write_jsonl("rows.jsonl", ROWS)
    with safe_open(tiny_model_file, "pt") as file:
        metadata = file.metadata()
    weights = load_file(tiny_model_file)
    name = next(name for name in weights if name.endswith("final_layer.linear.bias"))
    weights[name] += 1
    # Under the same name elsewhere
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / tiny_model_file.name
    save_file(weights, other, metadata)
    assert "the hash of the DiT's weights is" in bulk("--model", other)[1]
    save_file(load_file(tiny_model_file), other, metadata)
    assert bulk("--model", other)[0] == 0  # the same ones have only moved
    assert contents("tars") == before


def test_a_shard_that_is_not_whole_or_anothers_is_refused(bulk):
    bulk()
    path = Path("tars/000001.tar")
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is not whole: delete it"),
        (b"mine" * 1000, "is no tar file of pictures"),
        (Path("tars/000000.tar").read_bytes(), "was not drawn from these prompts"),
    ):
        path.write_bytes(content)
        code, err = bulk()
        assert code == 2 and f"error: tars/000001.tar {message}" in err, err
        assert path.read_bytes() == content
    path.unlink()
    bulk()
    assert path.read_bytes() == whole


BAD = [
    ({"prompt": ""}, "no prompt; expected a text in prompt or caption or text, found prompt"),
    ({"text": 3}, "text holds int, expected a text"),
    ({"prompt": "x", "seed": -1}, "seed is -1; expected a whole number from 0"),
    ({"prompt": "x", "seed": True}, "seed is True"),
    ({"prompt": "x", "width": 100}, "width is 100; expected a whole number from 8 to 8,192 that 8 divides"),
    ({"prompt": "x", "height": "tall"}, "height is tall"),
    ({"prompt": "x", "steps": 2.5}, "steps is 2.5"),
    ({"prompt": "x", "cfg": 0.5}, "cfg is 0.5; expected a number from 1 to 1000"),
    ({"prompt": "x", "negative": []}, "negative holds list, expected a text"),
    ("prompt", "holds a text; expected an object"),
    ({"prompt": "x", "steps": 1500}, "1500 steps with 'linspace' spacing"),  # which only the model knows
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_told_before_anything_is_drawn(bulk, row, message):
    write_jsonl("rows.jsonl", [*ROWS, row])
    code, err = bulk()
    assert code == 2 and re.search(rf"^error: rows.jsonl, line 6:? {re.escape(message)}", err, re.M), err
    assert not Path("tars").exists()


def test_bad_rows_may_be_left_out_and_are_noted(bulk):
    write_jsonl("rows.jsonl", [BAD[0][0], ROWS[0], BAD[-1][0], ROWS[1], *(row for row, _ in BAD[1:3])])
    code, err = bulk("--on-error", "skip")
    assert code == 0 and "warning: 4 rows left out" in err
    assert [key for _, key, suffix, _ in samples("tars") if suffix == "png"] == ["000000001", "000000003"]
    noted = json.loads(Path("tars/000001.skipped.json").read_text("utf-8"))["rows"]
    assert [row["row"] for row in noted] == [2] and "rows.jsonl, line 3: " in noted[0]["error"]
    assert len(samples("tars")) == 6 and Path("tars/000002.tar").is_file()  # empty, so that it counts as done
    before = contents("tars")
    assert bulk("--on-error", "skip")[0] == 0 and contents("tars") == before


def test_a_row_that_fails_while_it_is_drawn_is_named(bulk, monkeypatch):
    plain = drawer.drawing.Drawing.pictures

    def fails(self, prompts, *rest, **more):
        if "a dog" in prompts:
            raise HyditError("not finite")
        return plain(self, prompts, *rest, **more)

    monkeypatch.setattr(drawer.drawing.Drawing, "pictures", fails)
    write_jsonl("rows.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    code, err = bulk("--steps", 1, size=5)
    assert code == 2 and "error: rows.jsonl, line 4: not finite" in err
    assert bulk("--on-error", "skip", "--steps", 1, size=5, out="less")[0] == 0
    assert [key for _, key, suffix, _ in samples("less") if suffix == "txt"] == [
        f"{row:09d}" for row in (0, 1, 2, 4)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "--prompt does not go with --shard-size: write the prompts into the file"),
        (["--batch", 2], "--batch does not go with --shard-size: give a row several times"),
        (["--captions"], "--captions does not go with"),
        (["--init-image", "x.png"], "--init-image does not go with"),
        (["--shard-size", 0], "--shard-size 0: use 1 or more"),
        (["--together", 0], "--together 0: use 1 or more"),
        (["--workers", 2], "--workers needs --engine ray"),
        (["--out", "x.png"], "--out x.png: shards are written into a folder"),
        (["--prompts", "absent.csv"], "cannot read absent.csv: No such file"),
        (["--prompts", "empty.txt"], "empty.txt: no prompts in it"),
        (["--prompts", "bare.csv"], "bare.csv: no column for prompts; expected a first line with prompt"),
        (["--prompts", "wide.csv"], "wide.csv, line 2: more cells than the header has columns"),
        (["--prompts", "bad.parquet"], "bad.parquet"),
        (["--prompts", "latin.txt"], "latin.txt, line 2, is not UTF-8"),
    ],
)
def test_what_cannot_work_is_refused(bulk, arguments, message):
    Path("empty.txt").write_text("\n \n")
    Path("bare.csv").write_text("name,size\nx,1\n")
    Path("wide.csv").write_text("prompt,seed\nx, y,1\n")
    Path("bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    Path("latin.txt").write_bytes("x\nä\n".encode("latin-1"))
    code, err = bulk(*arguments)
    assert code == 2 and f"error: {message}" in err.replace("cannot read bad", "bad"), err
    assert not Path("tars").exists()


def test_tables_and_options_of_shards_need_a_shard_size(tiny_model_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", ROWS)
    for arguments in (["--prompts", "rows.jsonl"], ["--prompt", "x", "--engine", "ray"]):
        assert main(["--model", str(tiny_model_file), *arguments]) == 2
        assert "--shard-size" in capsys.readouterr().err


def test_one_process_at_a_time_draws_into_a_folder(bulk):
    from hydit_core.generate.bulk.job import claimed

    with claimed(Path("tars"), 0):
        code, err = bulk()
    assert code == 2 and "error: tars: another process draws there (process " in err
    assert not Path("tars").exists()  # nothing came into it


def test_training_reads_the_shards(bulk):
    from hydit_core.data.config import DataConfig
    from hydit_core.data.gathering import gather

    bulk()
    config = DataConfig.model_validate({"sources": [{"path": "tars/*.tar"}], "min_side": 64})
    rows, _ = gather(config)
    assert [row.captions[0] for row in rows] == [row["prompt"] for row in ROWS]
    assert rows.size(2) == (96, 64) and rows[2].picture.read().startswith(b"\x89PNG")


def test_rows_of_a_long_file_are_not_kept(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"prompt {number}{' long' * 50}\n" for number in range(6000)))
    prompts = Prompts(path, 100, seed=5)
    tracemalloc.start()
    found = prompts.look(skip=False, trusted=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rows == 6000 and peak < 1 << 20  # kept, they would take 4 MB
    row = prompts.shard(53)[5]
    assert isinstance(row, Row) and (row.number, row.prompt[:11], row.seed) == (5305, "prompt 5305", 5310)
    assert len(prompts.shard(59)) == 100


def test_batches_are_the_same_whatever_the_engine(bulk, monkeypatch):
    """Rows of one shape are drawn together, in fours unless told otherwise."""
    sizes = []
    original = drawer.Drawer._pictures
    monkeypatch.setattr(
        drawer.Drawer,
        "_pictures",
        lambda self, batch, cut: sizes.append(len(batch)) or original(self, batch, cut),
    )
    Path("p.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert bulk("--steps", 1, prompts="p.txt", size=6)[0] == 0
    assert bulk("--steps", 1, "--together", 5, prompts="p.txt", size=6, out="five")[0] == 0
    assert sizes == [4, 2, 5, 1]


def test_a_note_that_another_process_took_away_is_written_again(bulk, monkeypatch):
    """Of processes that start together, each takes the notes of the others for a killed one's."""
    real, taken = asked.replacing, []

    @contextlib.contextmanager
    def replacing(path):
        with real(path) as temporary:
            yield temporary
            if len(taken) < 2:
                temporary.unlink()
                taken.append(temporary)

    monkeypatch.setattr(asked, "replacing", replacing)
    assert bulk()[0] == 0
    assert len(taken) == 2 and "bulk.json" in contents("tars")
