"""The finder on tiny randomly initialised models of the libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.structure import TapNames, find_taps
from mvsplit.diagnostics.taps import gradient_norms, taps_for_dit
from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig

Built = tuple[nn.Module, dict[str, Any]]  # a model and the arguments of its forward pass


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'mvsplit[hub]'")


def diffusers_dit() -> Built:
    model = library("diffusers").DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    labels, times = torch.tensor([1, 2]), torch.tensor([3, 4])
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": times,
        "class_labels": labels,
    }


def pixart() -> Built:
    model = library("diffusers").PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=6,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 6),
        "timestep": torch.tensor([3, 4]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> Built:
    model = library("diffusers").SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 6),
        "pooled_projections": torch.randn(2, 5),
        "timestep": torch.tensor([3, 4]),
    }


def flux() -> Built:
    model = library("diffusers").FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    return model, {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 6),
        "pooled_projections": torch.randn(2, 5),
        "timestep": torch.tensor([0.3, 0.4]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def decoder(name: str) -> Built:
    transformers = library("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=11,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model, {"input_ids": torch.randint(11, (2, 7)), "use_cache": False}


def llama() -> Built:
    return decoder("Llama")


def qwen() -> Built:
    return decoder("Qwen3")


def timm_vit() -> Built:
    timm = pytest.importorskip("timm", reason="timm is not installed, or torchvision is missing")
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=4
    )
    return model, {"x": torch.randn(2, 3, 8, 8)}


ATTENTIONS = ("mu_eff", "row_div", "retention", "leakage")
# model: blocks, W_O, W_2, Q in the first block; whether one attention spans just the trunk
EXPECTED: dict[Callable[[], Built], tuple[str, str, str, str, bool]] = {
    diffusers_dit: ("transformer_blocks", "attn1.to_out.0", "ff.net.2", "attn1.to_q", True),
    pixart: ("transformer_blocks", "attn1.to_out.0", "ff.net.2", "attn1.to_q", True),
    sd3: ("transformer_blocks", "attn.to_out.0", "ff.net.2", "attn.to_q", False),
    flux: ("transformer_blocks", "attn.to_out.0", "ff.net.2", "attn.to_q", False),
    llama: ("model.layers", "self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", True),
    qwen: ("model.layers", "self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", True),
    timm_vit: ("blocks", "attn.proj", "mlp.fc2", "attn.qkv", True),
}


@pytest.fixture(params=EXPECTED, ids=lambda build: build.__name__, name="build")
def _build(request: pytest.FixtureRequest) -> Callable[[], Built]:
    torch.manual_seed(0)
    return request.param


def run(model: nn.Module, arguments: dict[str, Any]) -> None:
    output = model(**arguments)
    first = output if isinstance(output, Tensor) else output[0]
    first.float().square().mean().backward()


def open_gates(model: nn.Module) -> None:
    """Some libraries start gates at zero, which would leave nothing to measure."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)


def test_finds_writers_and_queries(build: Callable[[], Built]) -> None:
    model, _ = build()
    blocks, writer_attn, writer_ffn, query, _ = EXPECTED[build]
    taps = find_taps(model)
    listed = model.get_submodule(blocks)
    for tap, block in zip(taps, listed, strict=False):
        assert tap.block is block
        found = {branch.name: branch.writer for branch in tap.branches}
        assert found["attn"] is block.get_submodule(writer_attn)
        assert found["ffn"] is block.get_submodule(writer_ffn)
        assert tap.query.projection is block.get_submodule(query)
    assert [tap.layer for tap in taps] == list(range(len(taps)))


def test_the_probe_measures_what_the_library_computed(build: Callable[[], Built]) -> None:
    model, arguments = build()
    open_gates(model)
    taps = find_taps(model)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen[module] = (args[0].detach(), output)

    for tap in taps:
        for branch in tap.branches:
            branch.writer.register_forward_hook(remember)
    with LayerProbe(taps) as probe:
        run(model, arguments)
    arrays = probe.arrays()
    for n, tap in enumerate(taps):
        for branch in tap.branches:
            y, output = seen[branch.writer]
            mean = metrics.mean_gradient_norm(y, output.grad).item()
            assert mean > 0
            assert arrays[f"g_mean_{branch.name}"][n] == pytest.approx(mean, rel=1e-4)
        assert arrays["grad_query"][n] == pytest.approx(tap.query.gradient().local.norm().item())
        assert arrays["grad_key"][n] == pytest.approx(tap.key.gradient().local.norm().item())
        assert -1 <= arrays["tcs"][n] <= 1
    spans_trunk = EXPECTED[build][-1]
    assert all((name in arrays) == spans_trunk for name in ATTENTIONS)
    assert gradient_norms(taps)["grad_query"] > 0


def test_flux_single_stream_blocks_have_one_writer() -> None:
    model, _ = flux()
    single = find_taps(model)[2:]
    assert [tap.block for tap in single] == list(model.single_transformer_blocks)
    for tap in single:
        (branch,) = tap.branches
        assert (branch.name, branch.writer) == ("ffn", tap.block.proj_out)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_our_own_model_is_found_by_structure_too(kv_heads: int) -> None:
    config = DiTConfig(
        depth=2, width=8, heads=2, kv_heads=kv_heads, ffn_width=6, channels=2, text_width=4
    )
    model = DiT(config)
    assert find_taps(model) == taps_for_dit(model)
    by_structure = find_taps(model, TapNames(blocks="blocks"))
    for found, known in zip(by_structure, taps_for_dit(model), strict=True):
        assert [b.writer for b in found.branches] == [b.writer for b in known.branches]
        assert found.query.projection is known.query.projection
        rows = ((t.query.start, t.query.stop, t.key.start, t.key.stop) for t in (found, known))
        assert len(set(rows)) == 1


def test_wrappers_are_looked_through() -> None:
    config = DiTConfig(depth=2, width=8, heads=2, ffn_width=6, channels=2, text_width=4)
    model = DiT(config)
    known = taps_for_dit(model)
    assert find_taps(torch.compile(model)) == known
    model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in model.blocks)
    for found, tap in zip(find_taps(model, TapNames(blocks="blocks")), known, strict=True):
        assert (found.block, found.query, found.key) == (tap.block, tap.query, tap.key)
        assert [b.writer for b in found.branches] == [b.writer for b in tap.branches]


class Packed(nn.Module):
    """An attention by hand, whose writer has the name that is given."""

    def __init__(self, writer: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.add_module(writer, nn.Linear(4, 4))


@pytest.mark.parametrize("writer", ["out", "to_out", "wo", "proj"])
def test_writers_of_attentions_by_hand_are_found(writer: str) -> None:
    block = nn.ModuleDict({"attn": Packed(writer), "mlp": nn.Linear(4, 4)})
    (tap,) = find_taps(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert tap.branches[0].writer is getattr(block["attn"], writer)


class Odd(nn.Module):
    """A block with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.looks, self.seeks, self.joins = (nn.Linear(4, 4) for _ in range(3))
        self.thinks = nn.Linear(4, 4)


def test_explicit_names_override() -> None:
    model = nn.ModuleDict({"tower": nn.ModuleList([Odd(), Odd()])})
    with pytest.raises(UserError, match="no transformer blocks were found in ModuleDict"):
        find_taps(model)
    names = TapNames(
        blocks="tower", writer_attn="joins", writer_ffn="thinks", query="looks", key="seeks"
    )
    for tap, block in zip(find_taps(model, names), model["tower"], strict=True):
        assert [b.writer for b in tap.branches] == [block.joins, block.thinks]
        assert tap.query.projection is block.looks
        assert tap.key.projection is block.seeks
    with pytest.raises(UserError, match="Odd has no module 'join'; did you mean joins"):
        find_taps(model, TapNames(blocks="tower", writer_attn="join"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"blocks": "tower"},
            r"dict of 'blocks': .*write names=TapNames\(blocks='tower'\)",
        ),
        ({"block": "tower"}, r"names: TapNames have no 'block'; did you mean blocks"),
        ("tower", r"names='tower': expected TapNames"),
        (TapNames(blocks=nn.ModuleList()), r"names\.blocks is a ModuleList: expected the dotted"),
    ],
)
def test_names_that_are_no_tap_names_are_refused(names: Any, message: str) -> None:
    model = nn.ModuleDict({"tower": nn.ModuleList([Odd(), Odd()])})
    with pytest.raises(UserError, match=message):
        find_taps(model, names)
