"""Pictures and captions for training: sources, sizes, order, caches.

Every batch is a pure function of (configuration, seed, step): it does not depend on the rank, on the
number of workers, or on where a run was interrupted.
"""

from __future__ import annotations

from .cache import (
    LatentCache,
    build_latent_cache,
    open_latent_cache,
    require_outside_sources,
    user_cache_folder,
)
from .config import BucketConfig, CacheConfig, ControlConfig, DataConfig, SourceConfig
from .control_images import ControlImages, canny
from .dataset import Batch, TrainData, open_dataset
from .images import Geometry, load_picture, to_tensor
from .manifest import Manifest, Record
from .order import BatchOrder, hash_int, sample_generator, uniform
from .summary import DataSummary
from .text_cache import TextCache, build_text_cache

__all__ = [
    "Batch",
    "BatchOrder",
    "BucketConfig",
    "CacheConfig",
    "ControlConfig",
    "ControlImages",
    "DataConfig",
    "DataSummary",
    "Geometry",
    "LatentCache",
    "Manifest",
    "Record",
    "SourceConfig",
    "TextCache",
    "TrainData",
    "build_latent_cache",
    "build_text_cache",
    "canny",
    "hash_int",
    "load_picture",
    "open_dataset",
    "open_latent_cache",
    "require_outside_sources",
    "sample_generator",
    "to_tensor",
    "uniform",
    "user_cache_folder",
]
