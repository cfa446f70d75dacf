"""The sampling engine's kernels, against fp64 formulas written with explicit matrices.

Each case: samples, image tokens, text tokens, real text tokens of each sample (None: all).
"""

import dataclasses

import pytest
import torch

from mvsplit.kernels import Gains
from mvsplit.kernels.segments import Segments
from tests.kernels.fused import draw
from tests.oracles import complex_rotation, normalise, split_merge

pytest.importorskip("triton")

from mvsplit.kernels.fused import stream_attention, stream_gemm, stream_merge
from mvsplit.kernels.fused.stream import CHUNK, Stream
from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Products of K terms in fp32, summed in another order than in fp64, of values of order one.
FP32_ERROR = 5e-6
STREAMS = [
    (2, 32, 32, None),
    (1, 33, 1, None),
    (3, 1, 5, (5, 1, 2)),
    (2, 70, 40, (33, 1)),
    (1, 1, 0, None),
]
SMALL = Tile(rows=32, columns=32, depth=32)


class Case:
    """A stream on a device, with its tokens placed in padded rows."""

    def __init__(self, case, device):
        self.batch, self.image, self.text, self.counts = case
        self.stream = Stream(self.batch, self.image, self.text)
        self.device = device
        self.valid = None
        if self.counts is not None:
            self.valid = torch.tensor(self.counts, dtype=torch.int32, device=device)
        self.lengths = (self.image, self.text)
        counts = self.counts or (self.text,) * self.batch
        self.real = [(self.image, count) for count in counts]
        real = [
            torch.cat([torch.arange(n) < r for n, r in zip(self.lengths, both, strict=True)])
            for both in self.real
        ]
        self.mask = torch.stack(real)

    def tokens(self, width, seed, zero=True):
        """[B, image + text, width]; zero on padding, as the trunk is."""
        x = draw(self.batch, self.image + self.text, width, seed=seed)
        return torch.where(self.mask[..., None], x, 0) if zero else x

    def rows(self, tokens):
        rows = torch.zeros(self.stream.rows, tokens.shape[-1], device=self.device)
        self.stream.place(tokens.to(self.device), rows)
        return rows

    def back(self, rows):
        """[N, D] → [B, image + text, D] in fp64."""
        padded = rows.view(self.batch, self.stream.sample_rows, -1)
        at = self.stream.image_rows
        parts = (padded[:, : self.image], padded[:, at : at + self.text])
        return torch.cat(parts, 1).cpu().double()

    def sums(self, tokens):
        """Over each segment, [B, 2, D]."""
        tokens = torch.where(self.mask[..., None], tokens, 0)
        parts = (tokens[:, : self.image], tokens[:, self.image :])
        return torch.stack([p.sum(1) for p in parts], 1)


def crossed(*shapes):
    """Every stream with the first shape, and every other shape with a stream that has it all."""
    pairs = [(stream, shapes[0]) for stream in STREAMS] + [(STREAMS[3], s) for s in shapes[1:]]
    return pytest.mark.parametrize(("case", "shape"), pairs, indirect=["case"], ids=str)


@pytest.fixture
def case(request, device):
    return Case(request.param, device)


def close(actual, expected, scale=1.0):
    error = (actual.cpu().double() - expected).abs().max() if expected.numel() else 0.0
    assert error <= FP32_ERROR * scale, error


def on(device, *tensors):
    return [t.float().to(device) for t in tensors]


@crossed(  # heads, kv_heads, head width, trunk width, tile
    (4, 2, 8, 96, Tile(rows=32, columns=64, depth=32)),
    (2, 2, 16, 32, SMALL),
    (3, 1, 12, 40, Tile(rows=64, columns=32, depth=16)),
    (2, 2, 16, 64, dataclasses.replace(SMALL, tma=True)),
)
def test_qkv_rotates_then_normalises_queries_and_keys(case, shape):
    heads, groups, head, width, tile = shape
    x, w = case.tokens(width, 1), draw((heads + 2 * groups) * head, width, seed=2) / width**0.5
    angles = draw(case.image + case.text, head // 2, seed=3)
    angles[case.image :] = 0
    tables = on(case.device, angles.cos(), angles.sin())
    cos, sin = (case.stream.spread(t, fill) for t, fill in zip(tables, (1.0, 0.0), strict=True))
    out = torch.empty(case.stream.rows, w.shape[0], device=case.device)
    stream_gemm.qkv(
        case.rows(x), *on(case.device, w), cos, sin, out, case.stream, heads, groups, 1e-6, tile
    )
    packed = (x.double() @ w.double().T).unflatten(-1, (heads + 2 * groups, head))
    turned = normalise(complex_rotation(packed, angles.double()[:, None]), 1e-6)
    expected = torch.cat((turned[:, :, : heads + groups], packed[:, :, heads + groups :]), 2)
    # A head of nearly zero length, at padding, is scaled up by its norm: exactly zero there.
    close(case.back(out), expected.flatten(-2), 20)


@crossed(  # trunk width, hidden, whether the trunk's mean leaks, tile
    (96, 40, True, Tile(rows=64, columns=32, depth=32)),
    (32, 32, False, SMALL),
    (40, 24, True, Tile(rows=32, columns=64, depth=16)),
    (64, 48, True, Tile(rows=32, columns=32, depth=32, tma=True)),
)
def test_swiglu_and_the_sums_of_the_trunk(case, shape):
    width, hidden, leaks, tile = shape
    x, w = case.tokens(width, 1), draw(2 * hidden, width, seed=2) / width**0.5
    out = torch.empty(case.stream.rows, hidden, device=case.device)
    sums = torch.empty(case.batch, 2, width, device=case.device) if leaks else None
    rows = case.rows(x)
    stream_gemm.swiglu(rows, *on(case.device, w), out, sums, case.valid, case.stream, tile)
    gate, value = (x.double() @ w.double().T).chunk(2, -1)
    close(case.back(out), gate / (1 + (-gate).exp()) * value, 10)
    if sums is not None:
        close(sums, case.sums(x.double()), 10)
        again = torch.empty_like(sums)
        f, of_f = case.rows(case.tokens(width, 4, zero=False)), torch.empty_like(sums)
        stream_merge.segment_sums(rows, again, case.valid, case.stream, f, of_f)
        assert torch.equal(again, sums)
        close(of_f, case.sums(case.back(f)), 10)


@crossed(  # columns of A, trunk width, tile
    (96, 64, Tile(rows=64, columns=32, depth=32, split=2)),
    (32, 32, SMALL),
    (72, 40, Tile(rows=32, columns=16, depth=16, split=3)),
    (64, 96, Tile(rows=64, columns=32, depth=32, split=2, tma=True)),
    (256, 64, Tile(rows=32, columns=64, depth=64)),
)
def test_writer_and_the_sums_of_its_chunks(case, shape):
    inner, width, tile = shape
    a, w = case.tokens(inner, 1, zero=False), draw(width, inner, seed=2) / inner**0.5
    rows = case.rows(a)
    out, partial = stream_gemm.writer_buffers(case.stream, width, tile.split, rows)
    stream_gemm.writer(rows, *on(case.device, w), out, partial, case.valid, case.stream, tile)
    expected = a.double() @ w.double().T
    close(case.back(out.sum(0)), expected, 4)
    by_sample = partial.sum(0).view(case.batch, -1, width)
    image = case.stream.image_rows // CHUNK
    sums = torch.stack((by_sample[:, :image].sum(1), by_sample[:, image:].sum(1)), 1)
    close(sums, case.sums(expected), 20)


def gains_of(kind, width):
    beta, alpha, leak = (draw(width, seed=s) for s in (11, 12, 13))
    return {
        "free": Gains(beta, alpha, leak),
        "tied": Gains(beta, alpha, None),
        "numbers": Gains(0.5, 0.25, 1.0),
        "plain": Gains(1.0, 1.0, 0),
        "scalar": Gains(draw(1, seed=1), 0.25, 0),
    }[kind]


@crossed(  # gains, width, parts of F, tiles of a sample with sums by segment (0: by chunk), cut
    ("tied", 64, 2, 0, Rows(rows=4)),
    ("free", 96, 1, 1, Rows(rows=4)),
    ("tied", 96, 2, 3, Rows(rows=4)),
    ("numbers", 40, 1, 0, Rows(rows=2)),
    ("plain", 64, 1, 0, Rows(rows=8)),
    ("scalar", 64, 2, 0, Rows(rows=4)),
    ("free", 5, 1, 0, Rows(rows=1)),
    ("free", 256, 1, 0, Rows(rows=2)),
)
def test_merge(case, shape):
    kind, width, split, tiles, cut = shape
    x = case.tokens(width, 1)
    parts = [case.tokens(width, 2 + i, zero=False) for i in range(split)]
    gains = gains_of(kind, width)
    rows = case.rows(x)
    f = torch.stack([case.rows(p) for p in parts])
    # What padding holds beside the tokens that `tokens` fills must have no influence.
    stream = case.stream
    partial = sums = None
    if stream_merge.takes_means(gains):
        masked = [case.rows(torch.where(case.mask[..., None], p, 0)) for p in parts]
        partial = torch.stack([m.view(-1, CHUNK, width).sum(1) for m in masked])
        if tiles:
            whole = torch.stack([case.sums(p) for p in parts])[:, :, None]
            share = torch.arange(1, tiles + 1)[:, None, None] * 2 / (tiles * (tiles + 1))
            partial = (whole * share).to(case.device)
    if stream_merge.leaks(gains):
        sums = case.sums(x).to(case.device)
    given = Gains(*(g.to(case.device) if isinstance(g, torch.Tensor) else g for g in gains))
    stream_merge.merge(rows, f, rows, partial, sums, given, case.valid, stream, 1e-5, cut)
    full = [g.double() if isinstance(g, torch.Tensor) else g for g in gains]
    leak = full[1] if full[2] is None else full[2]
    expected = split_merge(
        x.double(), sum(p.double() for p in parts), full[0], full[1], leak, case.lengths, case.real
    )
    close(case.back(rows), expected, 4)
    everything = case.rows(torch.ones_like(x))[:, 0] == 0
    assert (rows[everything] == 0).all()  # the rows that only fill up chunks


@crossed(  # heads, kv_heads, head width, cut
    (4, 2, 8, Blocks(queries=16, keys=64)),
    (2, 2, 16, Blocks(queries=32, keys=32)),
    (3, 1, 12, Blocks(queries=64, keys=16)),
)
def test_attention_over_real_tokens(case, shape):
    heads, groups, head, cut = shape
    packed = case.tokens((heads + 2 * groups) * head, 1, zero=False)
    rows = case.rows(packed).view(case.batch, case.stream.sample_rows, -1, head)
    q, k, v = rows.transpose(1, 2).split((heads, groups, groups), 1)
    x = case.rows(case.tokens(40, 2))
    out = torch.empty(case.stream.rows, heads * head, device=case.device)
    sums = torch.empty(case.batch, 2, 40, device=case.device)
    stream_attention.attention(q, k, v, out, case.valid, x, sums, case.stream, cut)
    tokens = packed.double().unflatten(-1, (-1, head)).transpose(1, 2)
    q, k, v = tokens.split((heads, groups, groups), 1)
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    score = (q @ k.mT / head**0.5).masked_fill(~case.mask[:, None, None], -torch.inf)
    expected = (score.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    close(case.back(out), expected, 4)
    close(sums, case.sums(case.back(x)), 10)


def test_nan_of_padding_reaches_nobody_and_of_a_token_its_segment(device):
    case = Case((1, 2, 3, (1,)), device)
    a = case.tokens(16, 1, zero=False)
    a[0, 3] = torch.nan  # a text token past the count
    rows, w = case.rows(a), draw(16, 16, seed=2).to(device)
    out, partial = stream_gemm.writer_buffers(case.stream, 16, 1, rows)
    tile = Tile(rows=32, columns=16, depth=16)
    stream_gemm.writer(rows, w, out, partial, case.valid, case.stream, tile)
    assert partial.isfinite().all()
    a[0, 0] = torch.nan
    stream_gemm.writer(case.rows(a), w, out, partial, case.valid, case.stream, tile)
    assert partial[0, 0].isnan().all()
    assert partial[0, 1].isfinite().all()


def test_the_stream_speaks_of_the_same_tokens_as_its_segments():
    stream = Stream(2, 33, 5)
    assert stream.layout == (33, 5, 64, 96)
    segments = stream.segments(torch.tensor([5, 2]), torch.device("cpu"))
    rows = torch.zeros(stream.rows, 1)
    stream.place(torch.ones(2, 38, 1), rows)
    rows.view(2, 96)[1, 64 + 2 :] = 0
    assert torch.equal(segments.mask, rows.view(2, 96) == 1)
    assert isinstance(Stream(1, 32, 32).segments(None, torch.device("cpu")), Segments)
    assert Stream(1, 32, 32).segments(None, torch.device("cpu")).mask is None
