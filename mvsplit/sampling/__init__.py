"""Sampling: Euler, guidance, noise of its own for each picture, and pictures on disk."""

from mvsplit.sampling.generate import Generated, SamplingConfig, generate
from mvsplit.sampling.guidance import classifier_free
from mvsplit.sampling.images import PictureFolder, make_grid, read_record, save_png, to_pictures
from mvsplit.sampling.noise import sample_noise
from mvsplit.sampling.samplers import Velocity, euler

__all__ = [
    "Generated",
    "PictureFolder",
    "SamplingConfig",
    "Velocity",
    "classifier_free",
    "euler",
    "generate",
    "make_grid",
    "read_record",
    "sample_noise",
    "save_png",
    "to_pictures",
]
