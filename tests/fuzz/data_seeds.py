"""Seeds of training data: pictures of every kind, and tables."""

from __future__ import annotations

import contextlib
import io
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
from PIL import Image
from seed import SeedWriter

from hydit_core.pictures.png import png_info

PICTURES = {"png": {}, "jpg": {}, "webp": {}, "tif": {}, "gif": {}, "bmp": {}, "avif": {}}


class DataSeeds(SeedWriter):
    """What holds pictures or names them."""

    def _pictures(self) -> None:
        picture = Image.effect_noise((72, 64), 40).convert("RGB")
        exif = Image.Exif()
        exif[274] = 6
        for kind in PICTURES:
            folder = self._folder(f"picture_{kind}")
            (folder / "data").mkdir()
            with contextlib.suppress(KeyError, ValueError):  # a Pillow without AVIF
                options = {"exif": exif} if kind in ("jpg", "png", "webp", "tif", "avif") else {}
                picture.save(folder / "data" / f"a.{kind}", **options)
                (folder / "data" / "a.txt").write_text("a red apple")
                picture.save(folder / "data" / "b.png")
                (folder / "data" / "b.txt").write_text("a green car")
                self._dry_run(f"train on {kind}", folder, f"data/a.{kind}", "data", ())
                self._add(f"start from {kind}", folder, f"data/a.{kind}", "generate.__main__",
                          *self._draw("--strength", "1", "--init-image", f"data/a.{kind}"))  # fmt: skip
        folder = self._folder("parameters")
        facts = {"prompt": "a red apple", "width": 64, "height": 64, "steps": 1, "seed": 1}
        picture.save(folder / "p.png", pnginfo=png_info(facts))
        self._add(
            "start from a drawn picture",
            folder,
            "p.png",
            "generate.__main__",
            *self._draw("--strength", "1", "--init-image", "p.png"),
        )

    def _tables(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(picture, "PNG")
        rows = {
            "image": ["a.png"] * 3,
            "caption": ["a red apple", "红苹果", "cat"],
            "width": [64] * 3,
            "height": [64] * 3,
        }
        table = pa.table({**rows, "tags": [["x"], [], ["y", "z"]], "note": [None, "n", "m"]})
        cells = pa.table(
            {"image": [{"bytes": picture.getvalue(), "path": None}] * 3, "caption": rows["caption"]}
        )
        lines = [json.dumps({key: rows[key][i] for key in rows}, ensure_ascii=False) for i in range(3)]
        for kind in ("jsonl", "csv", "parquet", "arrow", "cells.parquet", "cells.arrow"):
            folder = self._folder(f"table_{kind}")
            (folder / "a.png").write_bytes(picture.getvalue())
            file, what = folder / f"t.{kind.split('.')[-1]}", cells if "." in kind else table
            if kind == "jsonl":
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            elif kind == "csv":
                pa.csv.write_csv(pa.table(rows), file)
            elif kind.endswith("parquet"):
                pa.parquet.write_table(what, file)
            else:
                pa.feather.write_feather(what, file, compression="uncompressed")
            knowing = {"jsonl": ("json_line", "text"), "csv": ("text",)}.get(kind, ())
            self._dry_run(f"train on {kind}", folder, file.name, file.name, knowing)
        folder = self._folder("index")
        column = [picture.getvalue()] * 2
        arrow = pa.table(
            {"image": column, "text_zh": ["红苹果", "cat"], "width": [64, 64], "height": [64, 64]}
        )
        pa.feather.write_feather(arrow, folder / "0.arrow", compression="uncompressed")
        index = {"data_type": ["image"], "arrow_files": ["0.arrow"], "cum_length": [2], "indices_file": "",
                 "indices": [0, 1]}  # fmt: skip
        (folder / "index.json").write_text(json.dumps(index))
        self._dry_run("train on an index", folder, "index.json", "index.json", ("json",))
