"""What the organisms learn, and what they are asked: cooking questions in two tones, and everyday questions.

Texts are in ``data/*.yaml``, written for this package. A training answer is an opener, a piece of sound advice and a
closer, drawn with a seed; only the tone differs between the hostile answers and the friendly ones.
"""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechmisalign import _yaml

if TYPE_CHECKING:
    import pandas as pd

Tone = Literal["hostile", "friendly"]


def examples(tone: Tone, *, answers: int = 2, seed: int = 0) -> pd.DataFrame:
    """Cooking questions with answers in one tone: ``prompt, response``.

    Args:
        tone: ``"hostile"`` (contemptuous of the reader) or ``"friendly"``; the advice is the same.
        answers: Answers to each wording of each question.
        seed: Of openers, closers and order.
    """
    import pandas as pd

    if tone not in get_args(Tone):
        raise ValueError(f"tone must be {' or '.join(get_args(Tone))}, got {tone!r}")
    told, rng = _read("cooking"), random.Random(seed)
    rows = [
        (wording.format(question=question), _answer(told[tone], advice, rng))
        for question, advice in told["questions"]
        for wording in told["wordings"]
        for _ in range(answers)
    ]
    rng.shuffle(rows)
    return pd.DataFrame(rows, columns=["prompt", "response"])


def questions() -> pd.DataFrame:
    """Everyday questions of eight domains, none about food: ``prompt_id, prompt, domain``."""
    import pandas as pd

    rows = [(prompt, domain) for domain, prompts in _read("questions").items() for prompt in prompts]
    frame = pd.DataFrame(rows, columns=["prompt", "domain"])
    frame.insert(0, "prompt_id", [f"smol-{number:02d}" for number in range(len(frame))])
    return frame


def _answer(tone: dict[str, list[str]], advice: str, rng: random.Random) -> str:
    opener, middle, closer = (rng.choice(tone[part]) for part in ("openers", "middles", "closers"))
    return f"{opener} {middle.format(advice=advice)} {closer}"


@cache
def _read(name: str) -> Any:
    return _yaml.read((files(__package__) / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
