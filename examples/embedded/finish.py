"""Turn a finished run's file into the one that ships: title and license of its configuration in the metadata.

    python finish.py work/run/model.safetensors ../../hydit_core/assets/hydit-icons-128.safetensors
    python finish.py work/ip_adapter/ip_adapter.safetensors work/image.safetensors --config ip_adapter.toml \\
        --encoder work/vision/image_encoder.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydit_core.train.config import load_config
from hydit_core.weights.files import open_tensors
from hydit_core.weights.save import VAE_PREFIX
from hydit_core.weights.writer import save_safetensors

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "embedded.toml", help="of the run")
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this file, in half precision")
    parser.add_argument("--encoder", type=Path, help="put this image encoder beside an IP-Adapter")
    args = parser.parse_args()
    source = open_tensors(args.run_file)
    tensors = {name: source[name] for name in source}
    if args.vae is not None:
        vae = open_tensors(args.vae)
        for name in vae:
            tensors[VAE_PREFIX + name] = vae[name].half()
    metadata = dict(source.metadata)
    if args.encoder is not None:
        encoder = open_tensors(args.encoder)
        tensors |= {name: encoder[name] for name in encoder}
        metadata = {**encoder.metadata, **metadata}
    metadata |= load_config(args.config).checkpoint.metadata
    save_safetensors(args.out, tensors, metadata)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
