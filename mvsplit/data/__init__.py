"""Data sets, the frozen word embedder, and the resumable loader."""

from mvsplit.data.cache import Cache
from mvsplit.data.cached_text import CachedText
from mvsplit.data.captions import Claim, Statement
from mvsplit.data.clips import Clips
from mvsplit.data.digits import Digits
from mvsplit.data.encode import EncodeConfig, Encoders, encode
from mvsplit.data.encoders import load_latent_encoder, load_text_encoder
from mvsplit.data.loader import Loader
from mvsplit.data.motions import ClipScene
from mvsplit.data.registry import DATASETS, build_dataset
from mvsplit.data.scenes import TASKS, Scene, SceneObject
from mvsplit.data.shapes import Shapes
from mvsplit.data.sources import open_source
from mvsplit.data.text import WordEmbedder
from mvsplit.data.types import (
    Batch,
    Dataset,
    Embedder,
    Examples,
    WordDataset,
    sample_shape,
)

__all__ = [
    "DATASETS",
    "TASKS",
    "Batch",
    "Cache",
    "CachedText",
    "Claim",
    "ClipScene",
    "Clips",
    "Dataset",
    "Digits",
    "Embedder",
    "EncodeConfig",
    "Encoders",
    "Examples",
    "Loader",
    "Scene",
    "SceneObject",
    "Shapes",
    "Statement",
    "WordDataset",
    "WordEmbedder",
    "build_dataset",
    "encode",
    "load_latent_encoder",
    "load_text_encoder",
    "open_source",
    "sample_shape",
]
