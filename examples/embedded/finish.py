"""Turn a finished run's file into the one that ships: final decoder, title and licenses in its metadata.

    python finish.py work/run/model.safetensors ../../hydit_core/assets/hydit-icons-128.safetensors
    python finish.py work/ip_adapter/ip_adapter.safetensors work/image.safetensors \\
        --encoder work/vision/image_encoder.safetensors

An IP-Adapter gets its image encoder, and keeps the title that its configuration gave it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydit_core.weights.files import open_tensors
from hydit_core.weights.save import VAE_PREFIX
from hydit_core.weights.writer import save_safetensors

ABOUT = {
    "modelspec.title": "hydit icons 128",
    "modelspec.author": "the hydit contributors",
    "modelspec.license": "Apache-2.0; trained on Twemoji (c) Twitter, Inc and other contributors, CC-BY 4.0",
    "modelspec.description": "A small HunyuanDiT, text encoders and VAE: some 380 icons, English and Chinese",
    "modelspec.usage_hint": "128x128, 25 steps of dpmpp_2m, guidance 2 to 3",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, help="take the autoencoder of this file, in half precision")
    parser.add_argument("--encoder", type=Path, help="put this image encoder beside an IP-Adapter")
    args = parser.parse_args()
    source = open_tensors(args.run_file)
    tensors = {name: source[name] for name in source}
    if args.vae is not None:
        vae = open_tensors(args.vae)
        for name in vae:
            tensors[VAE_PREFIX + name] = vae[name].half()
    metadata = {**source.metadata, **ABOUT}
    if args.encoder is not None:
        encoder = open_tensors(args.encoder)
        tensors |= {name: encoder[name] for name in encoder}
        metadata = {**encoder.metadata, **source.metadata}
    save_safetensors(args.out, tensors, metadata)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
