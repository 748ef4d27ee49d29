"""Seeds of weights: models, ControlNets, text encoders and LoRAs, in files and folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from quantised_files import fp8_layer, int8_layer, rewrite
from safetensors.torch import load_file, save_file
from seed import SeedWriter
from tiny import TINY, bert_vocab, randomize, spiece_model
from vision_files import clip_names, vision_model

from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig

SMALL = replace(TINY, hidden_size=32, mlp_hidden=32, text_dim=16, t5_dim=16, t5_hidden=16, pooled_dim=16)


class WeightSeeds(SeedWriter):
    """What holds tensors."""

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
