"""The padded stream that the sampling engine's kernels share, and what they know about its rows.

A sample's tokens lie in memory as [image tokens ; text tokens], each segment padded to whole chunks
of `CHUNK` rows, so that a chunk belongs to one segment of one sample. Rows that are no real token
(the padding of a chunk, text past a sample's count) are zero in the trunk and stay zero. Column
sums over the real rows of every chunk, in fp32, are all that a merge needs to know its means, and
they are added up in a fixed order: results are deterministic.

Shapes: B samples, N rows of the stream (all samples), D width, C = N / CHUNK chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.segments import Segments

TRITON_VERSION = triton.__version__
CHUNK = 32  # rows; 256 image tokens and 32 text tokens need no padding
_CHUNK = tl.constexpr(CHUNK)


@dataclass(frozen=True)
class Stream:
    """Where the tokens of a batch lie.

    Attributes:
        batch: B.
        image, text: tokens of a sample, without the padding of chunks.
    """

    batch: int
    image: int
    text: int

    @property
    def image_rows(self) -> int:
        return -(-self.image // CHUNK) * CHUNK

    @property
    def text_rows(self) -> int:
        return -(-self.text // CHUNK) * CHUNK

    @property
    def sample_rows(self) -> int:
        return self.image_rows + self.text_rows

    @property
    def rows(self) -> int:
        """N."""
        return self.batch * self.sample_rows

    @property
    def chunks(self) -> int:
        """C."""
        return self.rows // CHUNK

    @property
    def is_padded(self) -> bool:
        return (self.image, self.text) != (self.image_rows, self.text_rows)

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What every kernel is told: image and text tokens, rows of the image, of a sample."""
        return self.image, self.text, self.image_rows, self.sample_rows

    def segments(self, valid: Tensor | None, device: torch.device) -> Segments:
        """The padded stream in the words of the other ops. `valid` [B], real text tokens."""
        lengths = (self.image_rows, self.text_rows)
        if valid is None and not self.is_padded:
            return Segments(lengths)
        image = torch.full((self.batch,), self.image, device=device)
        text = torch.full_like(image, self.text) if valid is None else valid.to(image)
        return Segments(lengths, torch.stack((image, text), dim=1))

    def place(self, tokens: Tensor, rows: Tensor) -> None:
        """Writes tokens [B, image + text, D] to the rows [N, D] of the stream."""
        stream = rows.view(self.batch, self.sample_rows, -1)
        stream[:, : self.image].copy_(tokens[:, : self.image])
        at = self.image_rows
        stream[:, at : at + self.text].copy_(tokens[:, self.image :])

    def image_tokens(self, rows: Tensor) -> Tensor:
        """[N, D] → the image tokens [B, image, D], a view."""
        return rows.view(self.batch, self.sample_rows, -1)[:, : self.image]

    def spread(self, table: Tensor, fill: float) -> Tensor:
        """A table over the tokens [image + text, …] as one over the rows of a sample."""
        out = table.new_full((self.sample_rows, *table.shape[1:]), fill)
        out[: self.image] = table[: self.image]
        out[self.image_rows : self.image_rows + self.text] = table[self.image :]
        return out


@triton.jit
def is_real(o_row, n_rows, p_valid, image, text, image_rows, sample_rows):
    """Whether rows of the stream hold real tokens."""
    o_t = o_row % sample_rows
    count = text
    if p_valid is not None:
        count = tl.load(p_valid + o_row // sample_rows, mask=o_row < n_rows, other=0)
    real = (o_t < image) | ((o_t >= image_rows) & (o_t - image_rows < count))
    return real & (o_row < n_rows)


@triton.jit
def segment_of(row, p_valid, image, text, image_rows, sample_rows):
    """First row, number of rows and of real tokens of the segment in which a row lies."""
    i_b = row // sample_rows
    in_text = row % sample_rows >= image_rows
    count = text
    if p_valid is not None:
        count = tl.load(p_valid + i_b)
    first = i_b * sample_rows + tl.where(in_text, image_rows, 0)
    rows = tl.where(in_text, sample_rows - image_rows, image_rows)
    return first, rows, tl.where(in_text, count, image)


@triton.jit
def wait_for_inputs(p_ahead, n_lines, PDL: tl.constexpr):
    """Asks the L2 cache for this block's share of weights that are needed later, which are constant
    and so need no waiting. Then, under programmatic dependent launch, waits until everything that
    the kernels before this one wrote can be read, and lets the next kernel start its preparation.
    """
    if p_ahead is not None:
        share = tl.cdiv(n_lines, tl.num_programs(0))
        for i in range(0, share, 256):
            o_line = tl.program_id(0) * share + i + tl.arange(0, 256)
            o_line = tl.minimum(o_line, n_lines - 1).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [p_ahead.to(tl.int64) + o_line * 128],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def lines(ahead: Tensor | None) -> int:
    """Cache lines of a dense tensor."""
    return 1 if ahead is None else -(-ahead.nbytes // 128)


@triton.jit
def column_sums(
    i_task, p_x, p_sum, p_valid, s_x, image, text, image_rows, sample_rows,
    D: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """Sums of X [N, D] over the real rows of one segment of one sample, for one slab of columns,
    into [B, 2, D]."""
    STEP: tl.constexpr = 128  # rows whose loads are under way at once
    n_slabs: tl.constexpr = (D + SLAB - 1) // SLAB
    o_d = (i_task % n_slabs) * SLAB + tl.arange(0, SLAB)
    i_bs = i_task // n_slabs
    row = (i_bs // 2) * sample_rows + (i_bs % 2) * image_rows
    count = image
    if i_bs % 2 == 1:
        count = text
        if p_valid is not None:
            count = tl.load(p_valid + i_bs // 2)
    total = tl.zeros([STEP, SLAB], tl.float32)
    for t in range(0, count, STEP):
        o_t = t + tl.arange(0, STEP)
        m = (o_t < count)[:, None] & (o_d < D)[None, :]
        p = p_x + (row + o_t).to(tl.int64)[:, None] * s_x + o_d[None, :]
        total += tl.load(p, mask=m, other=0.0).to(tl.float32)
    tl.store(p_sum + i_bs * D + o_d, tl.sum(total, 0), mask=o_d < D)


SLAB = 64  # columns of one task of `column_sums`


def sum_tasks(stream: Stream, width: int) -> int:
    """Tasks of `column_sums` for the whole stream."""
    return 2 * stream.batch * -(-width // SLAB)
