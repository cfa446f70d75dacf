"""Qwen3 as the text encoder of the released model (paper §3); needs the extra `hub`.

Shapes: B prompts, T tokens of the longest, Dc width of the hidden states.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mvsplit.data.hub_access import hub_options, unreached
from mvsplit.data.vae import hash_of
from mvsplit.errors import UserError, needs_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Padding = Literal["mask", "attend"]
PADDINGS: tuple[Padding, ...] = ("mask", "attend")
MAX_TOKENS = 256  # paper §3
_SHOWN = 40  # characters of a prompt in a message


class QwenEncoder:
    """The last hidden state of a frozen causal language model, at most 256 tokens a prompt.

    Prompts are padded at the end to the longest of the call; attention being causal, that changes
    no real token. The empty prompt is one padding token.

    Args:
        tokenizer, model: of transformers, the model on the device and in the dtype in which it is
            to run; Qwen3-0.6B for the released weights.
        max_tokens: what is longer is cut, with a warning that says by how much.
        padding: "mask" counts real tokens only, so that the network sees no padding and a picture
            does not depend on its batch-mates. "attend" counts the padding among the real tokens,
            as the released model does.

    Raises UserError for an unknown padding.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        *,
        max_tokens: int = MAX_TOKENS,
        padding: Padding = "mask",
    ) -> None:
        if padding not in PADDINGS:
            raise UserError(f"padding={padding!r} is unknown: choose {' or '.join(PADDINGS)}")
        self.tokenizer, self.model = tokenizer, model
        self.max_tokens, self.padding = max_tokens, padding

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: Padding = "mask",
    ) -> QwenEncoder:
        """Model and tokenizer in a folder or of a hub id, or those of a pipeline saved in a folder.

        Raises:
            UserError: the extra `hub` is not installed; there is no such model.
        """
        with needs_extra("hub"):
            from transformers import AutoModel, AutoTokenizer
        pipeline = (Path(source) / "text_encoder").is_dir()
        where = {"subfolder": "text_encoder"} if pipeline else {}
        known = hub_options(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                Path(source) / "tokenizer" if pipeline else source, **known
            )
            model = AutoModel.from_pretrained(source, dtype=dtype, **where, **known)
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"text_encoder={source!r}: neither a folder nor a hub id with a model and its "
                f"tokenizer ({reason}){unreached(source)}"
            ) from error
        return cls(tokenizer, model.to(device).eval().requires_grad_(False), padding=padding)

    @property
    def width(self) -> int:
        """Dc."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [B, T, Dc] in the model's dtype and the tokens that count of each prompt, [B] int64.

        A prompt that occurs several times is encoded once. Warns of every prompt that is cut.

        Raises:
            UserError: no prompts.
        """
        if not prompts:
            raise UserError("prompts: none given; give at least one")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = [self._tokens(prompt) for prompt in distinct]
        longest = max(map(len, tokens))
        rows = torch.tensor([distinct[prompt] for prompt in prompts])
        counts = torch.tensor([len(ids) for ids in tokens])
        padded = [ids + [self._padding_token] * (longest - len(ids)) for ids in tokens]
        mask = torch.arange(longest) < counts[:, None]
        device = self.model.device
        states = self.model(
            input_ids=torch.tensor(padded, device=device), attention_mask=mask.long().to(device)
        ).last_hidden_state
        counted = counts if self.padding == "mask" else torch.full_like(counts, longest)
        return states[rows.to(states.device)], counted[rows]

    def spec(self) -> dict[str, Any]:
        """What it is, for a record."""
        name = self.model.config.name_or_path
        return {
            "kind": "qwen",
            "source": name,
            "max_tokens": self.max_tokens,
            "padding": self.padding,
        }

    def fingerprint(self) -> str:
        """Changes where any text state would: a hash of the weights and the tokenizer."""
        tokenizer = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return f"qwen:{self.max_tokens}:{self.padding}:{tokenizer}:{hash_of(self.model)}"

    def _tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        if len(ids) > self.max_tokens:
            beginning = prompt[:_SHOWN] + "…" * (len(prompt) > _SHOWN)
            warnings.warn(
                f"prompt {beginning!r} has {len(ids)} tokens; the last "
                f"{len(ids) - self.max_tokens} are cut, {self.max_tokens} are read",
                stacklevel=2,
            )
        return ids[: self.max_tokens] or [self._padding_token]

    @property
    def _padding_token(self) -> int:
        token = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if token is None else token
