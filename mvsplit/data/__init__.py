"""Data sets, the frozen word embedder, and the resumable loader."""

from mvsplit.data.captions import Claim, Statement
from mvsplit.data.digits import Digits
from mvsplit.data.loader import Loader
from mvsplit.data.registry import DATASETS, build_dataset
from mvsplit.data.scenes import TASKS, Scene, SceneObject
from mvsplit.data.shapes import Shapes
from mvsplit.data.text import WordEmbedder
from mvsplit.data.types import Batch, Dataset, Embedder, Examples, WordDataset

__all__ = [
    "DATASETS",
    "TASKS",
    "Batch",
    "Claim",
    "Dataset",
    "Digits",
    "Embedder",
    "Examples",
    "Loader",
    "Scene",
    "SceneObject",
    "Shapes",
    "Statement",
    "WordDataset",
    "WordEmbedder",
    "build_dataset",
]
