"""A chat model in memory as the judge: exact probabilities of the numbers 0 to 100, no server and no cost."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mechmisalign._context import context_length, refuse_beyond
from mechmisalign._placement import execution_device, stored
from mechmisalign._pretrained import read_pretrained
from mechmisalign.progress import progress_bar

from .asking import Ask, Done
from .budget import Estimate
from .controls import CONTROLS, Control
from .desk import AtDesk, Desk, OnFailedControls
from .journal import Journal, Mode
from .rubrics import Rubric, resolve
from .scores import Reply
from .spellings import LONGEST, Spellings, Tokens, number_masses, spellings

if TYPE_CHECKING:
    import torch

PRUNE = 1e-4
"""A digit with less probability than this is not looked behind; the score moves by less than 0.01 for each."""
_KEPT = 1e-9
_OTHERS = 20
_WINDOW = 32


class LocalJudge(AtDesk):
    """Has a Hugging Face chat model rate each answer, by the probabilities of the numbers that it would reply with.

    A tokenizer that writes numbers digit by digit is followed down to the whole number (see ``spellings``). Rows of a
    batch are padded on the left and masked; a score does not depend on what else is in the batch, up to rounding.

    Args:
        model: A causal language model in memory, a local folder, or a Hub id.
        tokenizer: Its tokenizer with a chat template; read from the same place by default.
        rubrics: Names (see ``RUBRICS``), or ``Rubric`` values.
        batch_size: Prompts in one forward pass.
        journal: JSONL file of all judgements, or None to keep them in memory.
        controls: Control answers; by default ``CONTROLS``.
        on_failed_controls: ``raise`` refuses to judge; ``warn`` goes on.
        device: Where a model that is loaded here goes; by default an accelerator if there is one.

    Attributes:
        controls_: What it said of the controls; None before the first run.

    Raises:
        ValueError: If a model in memory comes without a tokenizer, or the tokenizer cannot write the numbers.
        TemplateError: If the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        rubrics: Sequence[str | Rubric] = ("alignment", "coherence"),
        *,
        batch_size: int = 8,
        journal: str | Path | None = None,
        controls: Sequence[Control] | None = None,
        on_failed_controls: OnFailedControls = "raise",
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch holds at least one prompt")
        self.rubrics = resolve(rubrics)
        model, tokenizer = _loaded(model, tokenizer, device)
        self._asker = LocalAsker(model, tokenizer, batch_size)
        self._desk = Desk(
            self._asker, self.rubrics, Journal(journal), CONTROLS if controls is None else controls, on_failed_controls
        )

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The answers with ``<rubric>`` (0 to 100, NaN) and ``<rubric>_status`` for each rubric.

        A prompt that is longer than the model reads is an ``error``.

        Args:
            frame: Columns ``prompt, response``, optionally ``history`` (turns before the prompt).

        Raises:
            DeadJudgeError: If the controls fail.
        """
        return self._desk.judge(frame)

    def __repr__(self) -> str:
        return f"LocalJudge({self._asker.name!r}, rubrics={[rubric.name for rubric in self.rubrics]})"

    def estimate(self, frame: pd.DataFrame, *, seconds_per_call: float = 0.1) -> Estimate:
        """What judging the frame would take from here: nothing is computed.

        Args:
            frame: The answers.
            seconds_per_call: Of one prompt.
        """
        judgements, lengths = self._desk.estimate(frame)
        return Estimate(judgements, len(lengths), sum(lengths), 0, 0.0, seconds_per_call * len(lengths))


class LocalAsker:
    """Asks a model in memory; see ``asking.Asker``."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        from mechmisalign.conversations import require_chat_template

        require_chat_template(tokenizer)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        self.wanted: Mode = "logprobs"
        self.mode: Mode = "logprobs"
        self.spellings  # noqa: B018 (refuses a tokenizer without numbers now, not in the middle of a run)

    @cached_property
    def spellings(self) -> Spellings:
        """How the tokenizer writes numbers."""
        return spellings(self.tokenizer)

    def identity(self) -> Mapping[str, Any]:
        """A hash of samples of all weights, of which adapters are on, and of the chat template."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        return {"model": self.name, "weights": fingerprint(self.model), "template": template, "prune": PRUNE}

    def settings(self, mode: Mode) -> Mapping[str, Any]:
        """Nothing beside the mode: replies are computed, not sampled."""
        return {"asked": mode}

    def ask(self, asks: Iterable[Ask], total: int, done: Done) -> str | None:
        """Compute the replies in batches of similar length."""
        pending = iter(asks)
        with progress_bar("judging", total, "prompt") as bar:
            while window := list(itertools.islice(pending, self.batch_size * _WINDOW)):
                encoded = sorted(((self._encode(ask.prompt), ask) for ask in window), key=lambda pair: len(pair[0]))
                for start in range(0, len(encoded), self.batch_size):
                    self._answer(encoded[start : start + self.batch_size], done)
                    bar.update(len(encoded[start : start + self.batch_size]))
        return None

    def _encode(self, prompt: str) -> list[int]:
        from mechmisalign._rendering import apply_template
        from mechmisalign.conversations import encode_chats

        turns = [{"role": "user", "content": prompt}]
        text = apply_template(self.tokenizer, turns, reply=True, enable_thinking=False)
        content = next((form for form in (prompt, prompt.strip()) if form in text), None)
        if content is None:
            raise ValueError("the chat template of the judge rewrites what it is asked; use another judge model")
        start = text.rindex(content)
        return encode_chats(self.tokenizer, [text], [[range(start, start + len(content))]])[0][0]

    def _answer(self, batch: Sequence[tuple[list[int], Ask]], done: Done) -> None:
        details = {"model": self.name}
        fitting = []
        for ids, ask in batch:
            if len(ids) > self._longest:
                reason = f"the prompt has {len(ids)} tokens, and the model reads {self._longest:.0f} before a reply"
                done(ask, None, details | {"reason": reason})
            else:
                fitting.append((ids, ask))
        for (ids, ask), reply in zip(fitting, self.replies([ids for ids, _ in fitting]), strict=True):
            done(ask, reply, details | {"tokens_in": len(ids)})

    @property
    def _longest(self) -> float:
        """Tokens of a prompt that leave room for a number."""
        limit = context_length(self.model.config)
        return math.inf if limit is None else limit - LONGEST

    def replies(self, prompts: Sequence[list[int]]) -> list[Reply]:
        """The reply to each prompt: log-probabilities of the numbers, and of the likeliest other tokens."""
        import torch

        if not prompts:
            return []
        with torch.inference_mode():
            read = _Prompts(self.model, prompts)
            return [self._reply(read, row) for row in range(len(prompts))]

    def _reply(self, read: _Prompts, row: int) -> Reply:
        root = read.root[row]
        masses = number_masses(self.spellings, root, lambda beginnings: read.behind(row, beginnings), PRUNE)
        top = [(str(number), mass) for number, mass in masses.items() if mass > _KEPT]
        likeliest = np.argsort(root)[::-1][: _OTHERS + len(self.spellings.first)]
        others = [int(token) for token in likeliest if int(token) not in self.spellings.first][:_OTHERS]
        top += [(self.tokenizer.decode([token]), float(root[token])) for token in others if root[token] > _KEPT]
        pairs = tuple((token, round(math.log(mass), 6)) for token, mass in top)
        return Reply(max(top, key=lambda pair: pair[1])[0] if top else "", pairs)


class _Prompts:
    """Prompts that a model has read once, so that what follows each can be asked at the cost of a few tokens."""

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        import torch

        self.model = model
        width, device = max(map(len, prompts)), execution_device(model.get_input_embeddings())
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, width - len(prompt) :] = 1
        self.mask = self.mask.to(device)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.root, self.cache = self._forward(ids.to(device), self.mask, positions, None)

    def behind(self, row: int, beginnings: Sequence[Tokens]) -> np.ndarray:
        """Probabilities of the token after each beginning of a reply, ``[beginning vocab]``."""
        import torch

        suffix = torch.tensor(beginnings, device=self.mask.device)  # (beginnings, tokens)
        count, length = suffix.shape
        mask = torch.cat([self.mask[row].expand(count, -1), torch.ones_like(suffix)], dim=1)
        positions = self.mask[row].sum() + torch.arange(length, device=suffix.device).expand(count, -1)
        cache = copy.copy(self.cache)
        cache.layers = [
            copy.copy(layer) for layer in self.cache.layers
        ]  # a layer replaces its tensors, never writes in them
        cache.batch_select_indices(torch.full((count,), row))  # of the host: layers may be on several devices
        return self._forward(suffix, mask, positions, cache)[0]

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[np.ndarray, Any]:
        refuse_beyond(mask.shape[1], context_length(self.model.config), "what the judge reads of an answer")
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
        )
        return output.logits[:, -1].float().cpu().double().softmax(-1).numpy(), output.past_key_values


def fingerprint(model: Any) -> str:
    """Short hash of a model as it is now: samples of all its weights, and which adapters are on."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        place, _, leaf = name.rpartition(".")
        flat = stored(model.get_submodule(place), leaf).reshape(-1)
        places = _spread(flat.numel(), flat.device)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(flat[places].float().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters"):
            digest.update(f"{name}{module.disable_adapters}{module.active_adapters}".encode())
    return digest.hexdigest()[:16]


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Up to 64 places from first to last; float32 holds those of a small tensor only (and gave them, so they stay)."""
    import torch

    exact = torch.float32 if count <= 2**24 else torch.float64
    return torch.linspace(0, count - 1, min(64, count), dtype=exact, device=device).long()


def _loaded(model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise ValueError("a model in memory needs its tokenizer: LocalJudge(model, tokenizer)")
        return model.eval(), tokenizer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = read_pretrained(AutoModelForCausalLM, model, dtype="auto").to(device).eval()
    return loaded, tokenizer or read_pretrained(AutoTokenizer, model)
