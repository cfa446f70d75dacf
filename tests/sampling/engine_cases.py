"""Small models that the engine's tests draw, and a plan whose stages are all the engine's own."""

import torch

from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.sampling.engine_plan import Plan, Writing

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # of the kernels: through the interpreter on a CPU
WRITE = Writing(Tile(rows=64, columns=32, depth=32), Rows(rows=16))
OWN = Plan(
    qkv=Tile(rows=64, columns=128, depth=32),
    attention=Blocks(queries=64, keys=64),
    proj=WRITE,
    w13=Tile(rows=128, columns=128, depth=32),
    w2=Writing(Tile(rows=64, columns=64, depth=16, split=2), Rows(rows=8)),
)


def make(rule="mvsplit", dtype=torch.float32, device=DEVICE, **changes):
    fields = {
        "depth": 2, "width": 32, "heads": 2, "ffn_width": 40, "channels": 3, "patch": 2,
        "text_width": 24, "writers": "standard",
    }  # fmt: skip
    if not isinstance(rule, RuleConfig):
        rule = RuleConfig(name=rule, beta=0.7, gamma=0.5)
    config = DiTConfig(**{**fields, "rule": rule, **changes})
    model = DiT(config, torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for block in model.blocks:  # gains that differ between columns
        for rule_of_branch in (block.rule_attention, block.rule_ffn):
            for gain in rule_of_branch.parameters():
                gain.add_(0.2 * torch.randn(gain.shape, generator=generator))
    return model.to(device, dtype)


def draw(model, batch=2, side=(4, 6), text=5, valid=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    latents = torch.randn(batch, c.channels, *side, generator=generator)
    states = torch.randn(batch, text, c.text_width, generator=generator)
    like = model.head.weight
    counts = None if valid is None else torch.tensor(valid, device=like.device)
    return latents.to(like), states.to(like), counts
