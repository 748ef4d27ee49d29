"""Good files of every kind that the project reads, and the command through which a user gives it each."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import torch
from PIL import Image
from quantised_files import fp8_layer, int8_layer, rewrite
from safetensors.torch import load_file, save_file
from tiny import TINY, bert_vocab, randomize, spiece_model, write_tiny_model
from vision_files import clip_names, vision_model

from hydit_core.data.sources import arrow_table, table_check
from hydit_core.errors import cli_main
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.pictures.png import png_info
from hydit_core.train.config import load_config
from hydit_core.train.launch import open_data

SMALL = replace(TINY, hidden_size=32, mlp_hidden=32, text_dim=16, t5_dim=16, t5_hidden=16, pooled_dim=16)
PICTURES = {"png": {}, "jpg": {}, "webp": {}, "tif": {}, "gif": {}, "bmp": {}, "avif": {}}

TRAINING = """
[model]
init_from = "{model}"
[data]
resolution = 64
on_unreadable = "skip"
sources = [{{ path = "{source}"{more} }}]
[data.cache]
dir = "cache"
[run]
output_dir = "run"
steps = 2
batch_size = 1
device = "cpu"
[optimizer]
lr = 1e-4
betas = [0.9, 0.99]
[schedule]
warmup_steps = 1
[checkpoint]
every = 1
[model.info]
version = "v1.2"
[model.info.defaults]
steps = 2
"""


@dataclass(frozen=True)
class Seed:
    """``file`` of the folder ``folder`` is damaged; ``arguments`` then run in a copy of that folder."""

    name: str
    folder: Path
    file: str
    door: str  # a module of hydit_core with a main(argv), or `data`: read_data
    arguments: tuple[str, ...]
    knowing: tuple[str, ...] = ()  # the mutations that know this format
    weight: float = 1  # how often, relative to the others

    def prepare(self, into: Path, content: bytes | None = None) -> None:
        """A copy of the folder with ``content`` in place of the file; unchanged files are linked."""
        shutil.copytree(self.folder, into, copy_function=os.link, dirs_exist_ok=True)
        if content is not None:
            (into / self.file).unlink()
            (into / self.file).write_bytes(content)

    def command(self) -> Callable[[], int]:
        main = read_data if self.door == "data" else importlib.import_module(f"hydit_core.{self.door}").main
        arguments = list(self.arguments)
        return lambda: main(arguments)


def read_data(arguments: list[str]) -> int:
    """Gather the data of a configuration and load a batch: the trainer's reading without its model.

    Tables are checked in a fork of this warm process, which starts sooner than the interpreter that the other
    commands start for it.
    """
    arrow_table.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedTableCheck, PIPE=None, DEVNULL=None
    )

    def read() -> None:
        config = load_config(Path(arguments[0]))
        data = open_data(config)
        print("\n".join(data.summary().lines()))
        data.batch(0)

    return cli_main(read)


class ForkedTableCheck:
    """The part of ``subprocess.Popen`` that check_tables uses, around table_check.main in a forked child."""

    def __init__(self, command: list[str], **_: object) -> None:
        assert command[-1] == table_check.__file__
        asked, ask = os.pipe()
        answers, answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(ask)
                os.close(answers)
                sys.stdin, sys.stdout = os.fdopen(asked), os.fdopen(answer, "w")
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                table_check._MEMORY += used
                table_check.main()
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)
        self.stdin, self.stdout = os.fdopen(ask, "w"), os.fdopen(answers)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def __enter__(self) -> ForkedTableCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        os.waitpid(self._pid, 0)


class Seeds:
    """Writes everything under ``root`` once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.model = write_tiny_model(root / "tiny.safetensors")
        self.all: list[Seed] = []
        self._weights()
        self._folders()
        self._adapters()
        self._image_prompts()
        self._pictures()
        self._tables()
        self._texts()
        self._training()

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def _add(
        self, name: str, folder: Path, file: str, module: str, *arguments: str, **options: object
    ) -> None:
        self.all.append(Seed(name, folder, file, module, arguments, **options))  # type: ignore[arg-type]

    def _draw(self, *arguments: str, model: str | None = None) -> tuple[str, ...]:
        settings = (
            "--steps",
            "1",
            "--size",
            "64x64",
            "--device",
            "cpu",
            "--out",
            "out",
            "--prompt",
            "a red apple",
        )
        return ("--model", model or str(self.model), *settings, *arguments)

    # -- weights -------------------------------------------------------------------------------------

    def _weights(self) -> None:
        folder = self._folder("dit")
        state = randomize(DiT(SMALL), 1).state_dict()
        save_file(
            state, folder / "dit.safetensors", {"hydit.config": json.dumps({"format": 1, "version": "v1.2"})}
        )
        torch.save(state, folder / "dit.pt")
        torch.save({"module": state, "epoch": 3}, folder / "old.pt", _use_new_zipfile_serialization=False)
        for file in ("dit.safetensors", "dit.pt", "old.pt"):
            knowing = (
                ("header",) if file.endswith("s") else ("zip",) if file == "dit.pt" else ("write", "head")
            )
            self._add(
                f"inspect {file}",
                folder,
                file,
                "weights.__main__",
                "inspect",
                file,
                knowing=knowing,
                weight=30,
            )
            out = ("convert", file, "-o", "out.safetensors", "--layout", "comfy", "--dtype", "fp16")
            self._add(f"convert {file}", folder, file, "weights.__main__", *out, knowing=knowing, weight=6)
        self._quantised(folder / "dit.safetensors")
        folder = self._folder("model")
        shutil.copy(self.model, folder / "model.safetensors")
        self._add(
            "draw model", folder, "model.safetensors", "generate.__main__",
            *self._draw(model="model.safetensors"), knowing=("header",), weight=6,
        )  # fmt: skip
        folder = self._folder("control")
        save_file(
            randomize(ControlNet(TINY), 2).state_dict(),
            folder / "c.safetensors",
            {"hydit.control": '{"kind": "canny"}'},
        )
        Image.new("RGB", (64, 64), "gray").save(folder / "hint.png")
        self._add(
            "draw controlnet", folder, "c.safetensors", "generate.__main__",
            *self._draw("--controlnet", "c.safetensors", "--control-image", "hint.png"),
            knowing=("header",), weight=2,
        )  # fmt: skip
        self._add(
            "draw control picture", folder, "hint.png", "generate.__main__",
            *self._draw("--controlnet", "c.safetensors", "--control-image", "hint.png"),
        )  # fmt: skip

    def _quantised(self, plain: Path) -> None:
        """Quantised layers in ComfyUI's spellings, whose notes are JSON in tensors or in the metadata."""
        folder = self._folder("quantised")
        state = load_file(plain)
        wide = [key.removesuffix(".weight") for key in state if "attn1.Wqkv.weight" in key]
        for spelling, layer in (
            ("tensors", lambda weight: int8_layer(weight, group=16)),
            ("metadata", int8_layer),
            ("scaled_fp8", fp8_layer),
        ):
            file = f"{spelling}.safetensors"
            rewrite(plain, folder / file, {key: layer(state[f"{key}.weight"]) for key in wide}, spelling)
            out = ("convert", file, "-o", "out.safetensors", "--layout", "comfy", "--dtype", "fp16")
            self._add(
                f"convert {spelling}", folder, file, "weights.__main__", *out, knowing=("header",), weight=10
            )
        more = ("quantize", "tensors.safetensors", "-o", "out.safetensors", "--format", "int8_convrot")
        file = more[1]
        self._add("quantize", folder, file, "weights.__main__", *more, knowing=("header",), weight=5)

    def _folders(self) -> None:
        """Models in several files: shards with their index, configurations and tokenizers beside weights."""
        folder = self._folder("shards")
        state = randomize(DiT(SMALL), 1).state_dict()
        names = sorted(state)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, keys in halves.items():
            save_file({key: state[key] for key in keys}, folder / file)
        index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self._add(
            "inspect index", folder, "model.safetensors.index.json", "weights.__main__", "inspect", ".",
            knowing=("json",), weight=20,
        )  # fmt: skip

        folder = self._folder("diffusers")
        tensors = load_file(self.model)
        parts = {"transformer": "model.", "vae": "vae.", "text": "text_encoders."}
        for name, prefix in parts.items():
            (folder / name).mkdir()
            part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            save_file(part, folder / name / "model.safetensors")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({
            "_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.018,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "prediction_type": "v_prediction", "clip_sample": False,
        }))  # fmt: skip
        self._add(
            "inspect scheduler", folder, "scheduler/scheduler_config.json",
            "weights.__main__", "inspect", ".",
            knowing=("json",), weight=20,
        )  # fmt: skip
        self._encoders()

    def _encoders(self) -> None:
        """Tencent's two folders, with their configurations and tokenizers."""
        folder = self._folder("encoders")
        tensors = load_file(self.model)
        bert, t5 = folder / "clip_text_encoder", folder / "mt5"
        for place in (bert, t5, folder / "tokenizer"):
            place.mkdir()
        for place, mark in ((bert, "hydit_clip.transformer."), (t5, "mt5xl.transformer.")):
            found = {k.split(mark)[1]: v for k, v in tensors.items() if mark in k}
            save_file(found, place / "model.safetensors")
        (folder / "tokenizer" / "vocab.txt").write_bytes(bert_vocab())
        (bert / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 2}))
        (t5 / "spiece.model").write_bytes(spiece_model())
        (t5 / "config.json").write_text(json.dumps({"model_type": "mt5", "num_heads": 2, "d_kv": 16}))
        draw = self._draw("--text-encoders", ".")
        for file, knowing in {
            "tokenizer/vocab.txt": ("text",), "clip_text_encoder/config.json": ("json",),
            "clip_text_encoder/model.safetensors": ("header",), "mt5/spiece.model": (),
            "mt5/config.json": ("json",), "mt5/model.safetensors": ("header",),
        }.items():  # fmt: skip
            self._add(f"draw with {file}", folder, file, "generate.__main__", *draw, knowing=knowing)

    # -- adapters ------------------------------------------------------------------------------------

    def _adapters(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return 0.1 * torch.randn(shape, generator=generator)

        wqkv, out = "blocks.1.attn1.Wqkv", "blocks.1.attn1.out_proj"
        peft = {f"base_model.model.{wqkv}.lora_A.weight": random(4, 64),
                f"base_model.model.{wqkv}.lora_B.weight": random(192, 4)}  # fmt: skip
        name = "lora_unet_" + out.replace(".", "_")
        kohya = {
            f"{name}.lora_down.weight": random(4, 64),
            f"{name}.lora_up.weight": random(64, 4),
            f"{name}.alpha": torch.tensor(2.0),
            f"{name}.dora_scale": random(64, 1).abs() + 1,
        }
        lokr = {f"{name}.lokr_w1": random(4, 4), f"{name}.lokr_w2_a": random(16, 2),
                f"{name}.lokr_w2_b": random(2, 16), f"{name}.alpha": torch.tensor(2.0)}  # fmt: skip
        loha = {f"{name}.hada_w{i}_{side}": random(*shape) for i in (1, 2) for side, shape in
                (("a", (64, 4)), ("b", (4, 64)))}  # fmt: skip
        for kind, tensors in {"kohya": kohya, "lokr": lokr, "loha": loha}.items():
            folder = self._folder(kind)
            save_file(tensors, folder / "l.safetensors", {"ss_network_alpha": "2", "ss_network_dim": "4"})
            self._adapter(kind, folder, "l.safetensors", "l.safetensors", ("header",))
        folder = self._folder("peft")
        save_file(peft, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["Wqkv"], "rank_pattern": {},
            "alpha_pattern": {"Wqkv": 4}, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        }))  # fmt: skip
        self._adapter("peft tensors", folder, "adapter_model.safetensors", ".", ("header",))
        self._adapter("peft config", folder, "adapter_config.json", ".", ("json",))
        folder = self._folder("peft_bin")
        torch.save(peft, folder / "l.bin")
        self._adapter("peft bin", folder, "l.bin", "l.bin", ("zip",))

    def _adapter(self, name: str, folder: Path, file: str, given: str, knowing: tuple[str, ...]) -> None:
        self._add(
            f"inspect {name}", folder, file, "lora.__main__", "inspect", given, knowing=knowing, weight=25
        )
        merge = ("merge", str(self.model), given, "-o", "out.safetensors")
        self._add(f"merge {name}", folder, file, "lora.__main__", *merge, knowing=knowing, weight=3)
        self._add(
            f"draw {name}", folder, file, "generate.__main__", *self._draw("--lora", given), knowing=knowing
        )

    def _image_prompts(self) -> None:
        """An IP-Adapter and its image encoder, as Tencent's files and as those of others."""
        folder = self._folder("image_prompts")
        adapter = randomize(IPAdapter(IPAdapterConfig.for_dit(TINY, 12, 4)), 3).state_dict()
        torch.save(adapter, folder / "ipa.pt")
        save_file(adapter, folder / "ipa.safetensors")
        torch.save({"state_dict": clip_names(vision_model()), "epoch": 1}, folder / "clip_img_encoder.pt")
        vision_model().save_pretrained(folder / "image_encoder")
        for name in ("a", "mask"):
            Image.effect_noise((64, 64), 40).save(folder / f"{name}.png")
        draw = ("--image-prompt", "a.png", "--image-prompt-mask", "mask.png", "--ip-adapter")
        clip, tower = ("--image-encoder", "clip_img_encoder.pt"), ("--image-encoder", "image_encoder")
        for file, more, knowing in (
            ("ipa.pt", ("ipa.pt", *clip), ("zip",)),
            ("ipa.safetensors", ("ipa.safetensors", *clip), ("header",)),
            ("clip_img_encoder.pt", ("ipa.pt",), ("zip",)),
            ("image_encoder/model.safetensors", ("ipa.pt", *tower), ("header",)),
            ("image_encoder/config.json", ("ipa.pt", *tower), ("json",)),
            ("mask.png", ("ipa.pt", *clip), ()),
        ):
            command = self._draw(*draw, *more)
            self._add(f"image prompt by {file}", folder, file, "generate.__main__", *command, knowing=knowing)
            if knowing != () and not file.endswith("json"):
                self._add(
                    f"inspect {file}", folder, file, "weights.__main__", "inspect", file,
                    knowing=knowing, weight=20,
                )  # fmt: skip

    # -- pictures and tables -------------------------------------------------------------------------

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

    def _dry_run(
        self,
        name: str,
        folder: Path,
        file: str,
        source: str,
        knowing: tuple[str, ...],
        more: str = "",
        weight: float = 12,
    ) -> None:
        settings = TRAINING.format(model=self.model, source=source, more=more)
        (folder / "run.toml").write_text(settings)
        dry = ("run.toml", "--dry-run")
        self._add(name, folder, file, "train.__main__", *dry, knowing=knowing, weight=0.5)
        self._add(f"{name}, data alone", folder, file, "data", "run.toml", knowing=knowing, weight=weight)

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

    # -- texts and runs ------------------------------------------------------------------------------

    def _texts(self) -> None:
        folder = self._folder("weights")
        save_file(randomize(ControlNet(TINY), 2).state_dict(), folder / "c.safetensors")
        Image.new("RGB", (64, 64), "gray").save(folder / "hint.png")
        (folder / "w.json").write_text(json.dumps([1.0]))
        (folder / "prompts.txt").write_text("a red apple\n红苹果\n", encoding="utf-8")
        control = (
            "--controlnet",
            "c.safetensors",
            "--control-image",
            "hint.png",
            "--control-weights",
            "w.json",
        )
        self._add(
            "draw with weights",
            folder,
            "w.json",
            "generate.__main__",
            *self._draw(*control),
            knowing=("json", "text"),
        )
        draw = [x for x in self._draw("--prompts", "prompts.txt") if x not in ("--prompt", "a red apple")]
        self._add("draw prompts", folder, "prompts.txt", "generate.__main__", *draw, knowing=("text",))
        folder = self._folder("settings")
        (folder / "data").mkdir()
        Image.new("RGB", (64, 64), "gray").save(folder / "data" / "a.png")
        (folder / "data" / "a.txt").write_text("a red apple")
        self._dry_run("train with settings", folder, "run.toml", "data", ("text",), weight=20)
        self._dry_run("train on captions", folder, "data/a.txt", "data", ("text",))

    def _training(self) -> None:
        """A run with a cache, interrupted; then its files are damaged and it is resumed."""
        folder = self._folder("resume")
        (folder / "data").mkdir()
        for i, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (64, 64), colour).save(folder / "data" / f"{i}.png")
            (folder / "data" / f"{i}.txt").write_text("a red apple")
        settings = TRAINING.format(model=self.model, source="data", more="").replace(
            'dir = "cache"', 'dir = "cache"\nlatents = true'
        )
        (folder / "run.toml").write_text(settings)
        seed = Seed(
            "first run", folder, "run.toml", "train.__main__", ("run.toml", "--stop-after-micro", "1")
        )
        before = os.getcwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                seed.command()()
        finally:
            os.chdir(before)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "data"):
            name = str(file.relative_to(folder))
            knowing = {".json": ("json",), ".jsonl": ("json_line",), ".safetensors": ("header",)}.get(
                file.suffix
            )
            if knowing is None or "events" in name:
                continue
            command = ("report", "run") if file.name == "metrics.jsonl" else ("run.toml", "--resume", "run")
            what = "a cache's shard" if file.name.startswith("shard") else file.name
            weight = 12 if "report" in command else 1
            self._add(
                f"go on with {what}", folder, name, "train.__main__", *command, knowing=knowing, weight=weight
            )
