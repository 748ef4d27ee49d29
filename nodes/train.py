"""Training from the graph: a look at the pictures, a LoRA from them, and how a run is going."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .host import folders, train_paths
from .schema import make_schema

_CATEGORY = "HunyuanDiT/training"
_ALIASES = ["hydit", "hunyuan", "混元", "train", "training", "lora", "训练"]
_STEPS, _MINUTES = "steps", "minutes"


def _base_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("base_name", options=folders.checkpoint_names(), tooltip=tooltip)


def _dataset_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dataset_name",
        options=train_paths.dataset_names(),
        tooltip="A folder in ComfyUI/input with pictures, and beside each its caption in a .txt of the same "
        "name; its subfolders count. Press R after you have put it there. [embedded] hexagon comes with "
        "these nodes.",
    )


def _check_sources(base_name: Any, dataset_name: Any) -> bool | str:
    """For ``validate_inputs``: True, or what is wrong. None is a linked, unknown name."""
    from ..hydit_core.errors import HyditError

    checked = folders.check(base_name, *folders.CHECKPOINTS)
    if checked is not True or dataset_name is None:
        return checked
    try:
        train_paths.dataset(dataset_name)
    except HyditError as error:
        return str(error)
    return True


def _content(dataset_name: str, base_name: str) -> str:
    """What changes when the base or a picture does."""
    base = folders.resolve(base_name, *folders.CHECKPOINTS)
    return folders.fingerprint(base) + train_paths.digest(train_paths.dataset(dataset_name))


class HyDiTDatasetCheck(io.ComfyNode):
    """What a folder of pictures and captions gives a training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTDatasetCheck",
            display_name="HunyuanDiT Dataset Check",
            category=_CATEGORY,
            description="Looks at the pictures and captions of a folder before a training: how many there "
            "are, at which sizes they are trained, which captions are missing or too long.",
            is_output_node=True,
            has_intermediate_output=True,  # what the node shows
            search_aliases=[*_ALIASES, "dataset", "captions", "buckets"],
            inputs=[
                _dataset_input(),
                _base_input("The model that is to be trained: its tokenizers and its size count."),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Side in pixels of the square that the sizes are made around. 0: as the model "
                    "draws.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="What the node shows."),
                io.Image.Output(
                    "thumbnails", tooltip="The pictures on one sheet; those without a caption in red frames."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, dataset_name: Any = None, base_name: Any = None) -> bool | str:
        return _check_sources(base_name, dataset_name)

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str, base_name: str, **_: Any) -> str:
        return _content(dataset_name, base_name)

    @classmethod
    def execute(cls, dataset_name: str, base_name: str, resolution: int) -> io.NodeOutput:
        # The trainer's modules are imported only when they are needed.
        from ..hydit_core.train.dataset_report import look_at
        from .host.train_run import as_image

        folder = train_paths.dataset(dataset_name)
        report = look_at(folder, folders.resolve(base_name, *folders.CHECKPOINTS), resolution)
        sheet = as_image(report.sheet)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict()["images"]
        return io.NodeOutput(report.text, sheet, ui={"hydit_train": [report.text], "images": shown})


class HyDiTTrainLoRA(io.ComfyNode):
    """Trains a LoRA from a folder of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTTrainLoRA",
            display_name="HunyuanDiT Train LoRA",
            category=_CATEGORY,
            description="Trains a LoRA from a folder of pictures, shows how it goes, and gives the LoRA. "
            "Interrupting saves what was done; running the same again goes on, also after a restart.",
            is_output_node=True,
            has_intermediate_output=True,  # what the node shows
            search_aliases=_ALIASES,
            inputs=[
                _dataset_input(),
                _base_input("The model that the LoRA is for: one with text encoders and VAE."),
                io.String.Input(
                    "output_name",
                    default="my_lora",
                    tooltip="Name of the file in ComfyUI/models/loras, and of the run in "
                    "output/hydit_train. What is there is not overwritten: the new one gets a number.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A word that the model does not know, such as ohwx, to call the LoRA up by in a "
                    "prompt. Captions that lack it get it.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["subject", "style", "concept"],
                    tooltip="What is to be learned: one thing or person, a way of drawing, or anything else.",
                ),
                io.Int.Input(
                    "budget",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="How long to train at most, in steps or minutes. 0: as long as it seems right.",
                ),
                io.Combo.Input("budget_unit", options=[_STEPS, _MINUTES], tooltip="What budget counts."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="base_name loaded, to be drawn with: it comes out with the LoRA on it.",
                ),
                io.String.Input(
                    "settings",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="TOML for those who want to decide more, such as [lora] and below it rank = 8. "
                    "Everything that is not there is chosen for you.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.LoraModel.Output("LORA_MODEL", tooltip="The LoRA, for Load LoRA Model or HyDiTLoraMerge."),
                io.String.Output("lora_name", tooltip="The name of its file in ComfyUI/models/loras."),
                io.Model.Output("MODEL", tooltip="model with the LoRA at strength 1; nothing without model."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        dataset_name: Any = None,
        base_name: Any = None,
        output_name: Any = None,
        settings: Any = None,
    ) -> bool | str:
        from ..hydit_core.errors import HyditError
        from .host.train_settings import user_settings

        try:
            if output_name is not None:
                train_paths.check_name(output_name)
            if settings is not None:
                user_settings(settings)
        except HyditError as error:
            return str(error)
        return _check_sources(base_name, dataset_name)

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str, base_name: str, **_: Any) -> str:
        return _content(dataset_name, base_name)

    @classmethod
    def execute(
        cls,
        dataset_name: str,
        base_name: str,
        output_name: str,
        trigger: str,
        kind: str,
        budget: int,
        budget_unit: str,
        model: Any = None,
        settings: str = "",
    ) -> io.NodeOutput:
        from ..hydit_core.train.quick.wish import Wish
        from .host.lora import open_lora
        from .host.lora_file import merge_lora
        from .host.train_run import fingerprint, train
        from .host.train_settings import user_settings

        base = folders.resolve(base_name, *folders.CHECKPOINTS)
        dataset = train_paths.dataset(dataset_name)
        own = user_settings(settings)
        steps, minutes = (None, budget) if budget_unit == _MINUTES else (budget, None)
        wish = Wish(dataset, trigger, base, kind, steps=steps or None, minutes=minutes or None)
        content = _content(dataset_name, base_name)
        key = fingerprint([content, dataset_name, base_name, wish.to_json(), own])
        done = train(wish, own, output_name, key, node_id=str(cls.hidden.unique_id or ""))
        lora, model, *_ = merge_lora(open_lora(done.lora), 1.0, "uniform(1)", model=model)
        return io.NodeOutput(lora, done.lora.name, model, ui={"hydit_train": [done.text]})


class HyDiTTrainMonitor(io.ComfyNode):
    """How a run is going, also one that was started elsewhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTTrainMonitor",
            display_name="HunyuanDiT Train Monitor",
            category=_CATEGORY,
            description="Shows a training whose folder is in ComfyUI's output, whoever started it: how far "
            "it is, its losses and its newest sample pictures.",
            is_output_node=True,
            has_intermediate_output=True,  # what the node shows
            search_aliases=[*_ALIASES, "loss curve", "progress"],
            inputs=[
                io.Combo.Input(
                    "run_name",
                    options=train_paths.run_names(),
                    tooltip="The folder of a run in ComfyUI/output, the newest first. Press R to look for "
                    "new ones.",
                ),
                io.Boolean.Input(
                    "follow",
                    default=False,
                    tooltip="Stay with the run until it ends. Interrupting ends the watching, not the run.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output("report", tooltip="What the node shows: state, step, loss, time left."),
                io.Image.Output("curve", tooltip="The losses over the steps."),
                io.Image.Output("samples", tooltip="The newest sample pictures; black if there are none."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: Any = None) -> bool | str:
        from ..hydit_core.errors import HyditError

        try:
            return run_name is None or bool(train_paths.run_folder(run_name))
        except HyditError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, run_name: str, **_: Any) -> str:
        return train_paths.digest(train_paths.run_folder(run_name))

    @classmethod
    def execute(cls, run_name: str, follow: bool) -> io.NodeOutput:
        from .host.train_run import as_image, watch

        folder = train_paths.run_folder(run_name)
        text, curve, samples = watch(folder, follow=follow, node_id=str(cls.hidden.unique_id or ""))
        pictures = [as_image(picture) for picture in (curve, samples)]
        shown = [entry for part in pictures for entry in ui.PreviewImage(part, cls=cls).as_dict()["images"]]
        return io.NodeOutput(text, *pictures, ui={"hydit_train": [text], "images": shown})
