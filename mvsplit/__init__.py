"""Diffusion transformers hundreds to a thousand layers deep: the rule, the model, the watch."""

__version__ = "0.1.0"
