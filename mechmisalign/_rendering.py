"""Rendering turns with a tokenizer's chat template, and finding each turn's content in the text again."""

from __future__ import annotations

from typing import Any

_SENTINELS = {"system": "\ue000system\ue000", "user": "\ue000user\ue000", "assistant": "\ue000assistant\ue000"}


class TemplateError(ValueError):
    """The chat template cannot render these turns, or renders them so that they cannot be found again."""


def messages(turn: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turn.items() if isinstance(text, str)]


def _apply(tokenizer: Any, turn: dict[str, Any]) -> str:
    from jinja2 import TemplateError as JinjaError

    try:
        return str(tokenizer.apply_chat_template(messages(turn), tokenize=False))
    except JinjaError as error:
        raise TemplateError(
            f"the chat template refused roles {[m['role'] for m in messages(turn)]}: {error}"
        ) from error


def render(tokenizer: Any, turn: dict[str, Any], pieces: dict[bool, list[str]]) -> tuple[str, dict[str, range]]:
    """The rendered text and the character range of each turn's content in it."""
    text = _apply(tokenizer, turn)
    roles = [role for role, content in turn.items() if isinstance(content, str)]
    has_system = "system" in roles
    if has_system not in pieces:  # the fixed text around the contents, found once with contents nobody writes
        pieces[has_system] = _fixed_pieces(_apply(tokenizer, {role: _SENTINELS[role] for role in roles}), roles)
    ranges, cursor = {}, 0
    for role, before, after in zip(roles, pieces[has_system], pieces[has_system][1:], strict=False):
        cursor += len(before)
        content = _as_rendered(turn[role], text, cursor, after)
        ranges[role] = range(cursor, cursor + len(content))
        cursor += len(content)
    return text, ranges


def _fixed_pieces(text: str, roles: list[str]) -> list[str]:
    pieces = []
    for role in roles:
        before, found, text = text.partition(_SENTINELS[role])
        if not found:
            raise TemplateError(f"the chat template drops or rewrites the {role} turn, so its span cannot be found")
        pieces.append(before)
    return [*pieces, text]


def _as_rendered(content: str, text: str, start: int, after: str) -> str:
    for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
        if text.startswith(candidate + after, start):
            return candidate
    raise TemplateError(
        f"the chat template rewrote a turn ({content[:60]!r} became {text[start : start + 60]!r}); "
        "only trimming is understood"
    )
