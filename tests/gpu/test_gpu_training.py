"""Twenty steps of every objective on the device, at once and in two processes, and beside the CPU's.

A whole run, a run that is stopped after half of its steps, and its continuation in a new process: the
last two together must give what the first gives. Draws are the CPU's whatever the device, so that the
losses of a run on the CPU are those to expect.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import CUDA, DEVICE, SMALL, assert_close
from safetensors.torch import load_file
from train_setup import environment, records, write_run

from hydit_core.train import distributed
from hydit_core.train.config import load_config
from hydit_core.train.launch import open_data
from hydit_core.train.loop import Trainer
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parts import build

Figure = Callable[[str, float], None]
Job = dict[str, Any]
Result = dict[str, Any]
STEPS = 6 if SMALL else 20
PATIENCE = 120 if CUDA else 600  # seconds for the runs of a group
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
BF16 = ["run.precision=bf16", "run.gradient_checkpointing=true"]
FROZEN_TEXT = ["objective.train_text_encoders=false"]

# name -> configuration, overrides. Runs of one group share their processes.
GROUPS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "full": {
        "full": ("full", ["data.workers=2"]),
        "full-bf16": ("full", [*BF16, "optimizer.name=muon", "ema.decay=0.9", "validation.every=10"]),
        "full-cached": (
            "full",
            [
                *FROZEN_TEXT,
                "data.cache.latents=true",
                "data.cache.text=true",
                "data.flip=0.5",
                "data.workers=1",
            ],
        ),
    },
    "lora": {
        "lora": ("lora", ["lora.dora=true", "lora.train_bert=true", "lora.train_t5=true"]),
        "lora-bf16-dropout": ("lora", [*BF16, "lora.dropout=0.2"]),
        "lora-fp8": ("lora", [*BF16, 'lora.base_precision="fp8"']),
        "lora-int8": ("lora", [*BF16, 'lora.base_precision="int8"']),
        "lora-nf4": ("lora", [*BF16, 'lora.base_precision="nf4"']),
    },
    "controlnet": {
        "controlnet": ("control", []),
        "controlnet-bf16": (
            "control",
            [*BF16, "samples.every=10", 'samples.prompts=["cat"]', "samples.steps=2"],
        ),
    },
}
if SMALL:  # tests/unit has these runs on the CPU
    GROUPS = {
        "some": {"full-bf16": GROUPS["full"]["full-bf16"], "controlnet": GROUPS["controlnet"]["controlnet"]}
    }
elif not HAS_TORCHAO:
    GROUPS["lora"] = {n: c for n, c in GROUPS["lora"].items() if n not in ("lora-int8", "lora-nf4")}
RUNS = [name for runs in GROUPS.values() for name in runs]
ALSO_ON_THE_CPU = [name for name in ("full", "lora", "controlnet") if name in RUNS and CUDA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    """Configurations for the three objectives."""
    from test_train_control import write_control_run
    from test_train_lora import write_lora_run

    folder = tmp_path_factory.mktemp("gpu")
    write_run(folder / "full")
    write_lora_run(folder / "lora", tiny_model_file)
    write_control_run(folder / "control", tiny_model_file)
    return folder


def config_of(folder: Path, kind: str) -> Path:
    return folder / kind / {"full": "train", "lora": "lora", "control": "control"}[kind]


def job(folder: Path, name: str, part: str, device: str, **how: Any) -> Job:
    kind, overrides = next(runs[name] for runs in GROUPS.values() if name in runs)
    path = config_of(folder, kind).with_suffix(".toml")
    settings = [
        f"run.device={device}",
        f"run.output_dir={folder / part / name}",
        f"run.steps={STEPS}",
        f"schedule.warmup_steps={STEPS // 2}",
        "run.grad_accumulation=2",
        f"data.cache.dir={folder / part / 'cache'}",
        *overrides,
    ]
    if "samples.every=10" in overrides:
        settings.append(f'samples.control_images=["{folder / kind / "pictures" / "0.png"}"]')
    return {
        "id": f"{part} {name}",
        "config": str(path),
        "overrides": settings,
        "stop": None,
        "resume": None,
        **how,
    }


def run_jobs(folder: Path, label: str, jobs: list[Job]) -> dict[str, Result]:
    """The results of jobs in a process of their own, by their ids."""
    given, results = folder / f"{label}.jobs.json", folder / f"{label}.results.json"
    given.write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("train_worker.py")
    command = [sys.executable, str(worker), str(given), str(results)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False
        )
        end = f"the process ended with {done.returncode}: {done.stderr[-300:]}"
        print(done.stderr[-6000:])
    except subprocess.TimeoutExpired:
        end = f"the process took more than {PATIENCE} seconds"
    found = json.loads(results.read_text()) if results.exists() else {}
    return {one["id"]: found.get(one["id"], {"error": end}) for one in jobs}


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Result]:
    """Results by job: "whole NAME", "parts NAME", "resumed NAME", "cpu NAME"."""

    def of_group(group: str) -> dict[str, Result]:
        device, names = str(DEVICE), [*GROUPS[group]]
        first = [job(folder, name, "whole", device) for name in names]
        first += [job(folder, name, "parts", device, stop=STEPS - 1) for name in names]  # inside a step
        again = [job(folder, name, "parts", device, resume="auto", id=f"resumed {name}") for name in names]
        return run_jobs(folder, group, first) | run_jobs(folder, f"{group}-resumed", again)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(of_group, group) for group in GROUPS]
        if ALSO_ON_THE_CPU:
            on_cpu = [job(folder, name, "cpu", "cpu") for name in ALSO_ON_THE_CPU]
            running.append(pool.submit(run_jobs, folder, "cpu", on_cpu))
        return {key: value for results in running for key, value in results.result().items()}


def losses(folder: Path, part: str, name: str) -> torch.Tensor:
    return torch.tensor([r["loss"] for r in records(folder / part / name) if "loss" in r])


@pytest.mark.parametrize("name", RUNS)
def test_training(trained: dict[str, Result], folder: Path, name: str, figure: Figure) -> None:
    """Resumed in a new process it ends as if never stopped: bit by bit on a CPU.

    On CUDA some kernels add up in an order that changes from run to run, so that the loss agrees to rounding.
    """
    for part in ("whole", "parts", "resumed"):
        result = trained[f"{part} {name}"]
        assert "error" not in result, f"{part}: {result['error']}"
        assert result["finished"] == (part != "parts")
    figure("seconds", trained[f"whole {name}"]["seconds"])
    figure("MiB", trained[f"whole {name}"]["MiB"])
    whole, resumed = (losses(folder, part, name) for part in ("whole", "parts"))
    assert len(whole) == len(resumed) == STEPS and torch.isfinite(whole).all()
    assert_close(resumed, whole, 1e-2 if CUDA else 0.0, figure, "resumed loss")
    steps = [folder / part / name / "checkpoints" / f"step_{STEPS:08d}" for part in ("whole", "parts")]
    for file in ("weights", "optimizer"):
        once, twice = (load_file(step / f"{file}.safetensors") for step in steps)
        assert once.keys() == twice.keys()
        flat = [torch.cat([t[key].float().flatten() for key in sorted(t)]) for t in (once, twice)]
        assert_close(flat[1], flat[0], 1e-2 if CUDA else 0.0, figure, f"resumed {file}")


@pytest.mark.parametrize("name", ALSO_ON_THE_CPU)
def test_losses_are_those_of_the_cpu(
    trained: dict[str, Result], folder: Path, name: str, figure: Figure
) -> None:
    """The first step's to the rounding of TF32; then the weights part slowly."""
    for part in ("whole", "cpu"):
        assert "error" not in trained[f"{part} {name}"], trained[f"{part} {name}"]
    found, expected = (losses(folder, part, name) for part in ("whole", "cpu"))
    assert_close(found[:1], expected[:1], 3e-3, figure, "first")
    assert_close(found, expected, 3e-2, figure, "all")


@pytest.mark.parametrize(
    "name", [name for name in ("full-bf16", "lora-fp8", "controlnet-bf16") if name in RUNS]
)
def test_waits_of_the_host_in_a_step(folder: Path, name: str, figure: Figure) -> None:
    """Two an update, for the gradient's norm and the loss; others keep the device idle between kernels.

    Encoders that are trained ask, in transformers' masking, once a step each, whether a mask is full.
    """
    settings = job(folder, name, "waits", str(DEVICE))
    config = load_config(Path(settings["config"]), settings["overrides"])
    processes = distributed.start(str(DEVICE))
    objective = make_objective(config, build(config), processes.device)
    trainer = Trainer(config, objective, open_data(config), processes)
    batches = trainer._batches()
    places: Counter[str] = Counter()
    first = 2 * STEPS - 2
    for step in range(first + 2):
        if CUDA and step == first:  # every caption is encoded by now
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer._micro_step(next(batches))
        if step >= first:
            places.update(_place(w) for w in caught if "synchroniz" in str(w.message))
    batches.close()
    if CUDA:
        torch.cuda.set_sync_debug_mode("default")
    figure("waits in 2 micro-steps", sum(places.values()))
    for place, count in places.most_common():
        figure(place, count)
    assert trainer.progress.step == STEPS and sum(places.values()) <= 8, dict(places)


def _place(warning: Any) -> str:
    return f"{Path(warning.filename).name}:{warning.lineno}"
