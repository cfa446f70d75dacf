"""Sampling: samplers, guidance, given pictures, noise of its own for each picture, and pictures on
disk."""

from mvsplit.sampling.clips import ClipFolder, to_clips
from mvsplit.sampling.depth import skip_least, without_blocks
from mvsplit.sampling.edit import Edit, sample_edit
from mvsplit.sampling.engine import Engine, accelerated
from mvsplit.sampling.generate import Generated, SamplingConfig, generate
from mvsplit.sampling.guidance import classifier_free
from mvsplit.sampling.images import PictureFolder, make_grid, read_record, save_png, to_pictures
from mvsplit.sampling.noise import sample_noise
from mvsplit.sampling.previews import Previews
from mvsplit.sampling.samplers import SAMPLERS, Velocity, ab2, dpmpp_2m, euler, get_sampler, heun

__all__ = [
    "SAMPLERS",
    "ClipFolder",
    "Edit",
    "Engine",
    "Generated",
    "PictureFolder",
    "Previews",
    "SamplingConfig",
    "Velocity",
    "ab2",
    "accelerated",
    "classifier_free",
    "dpmpp_2m",
    "euler",
    "generate",
    "get_sampler",
    "heun",
    "make_grid",
    "read_record",
    "sample_edit",
    "sample_noise",
    "save_png",
    "skip_least",
    "to_clips",
    "to_pictures",
    "without_blocks",
]
