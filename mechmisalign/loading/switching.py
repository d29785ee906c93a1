"""Another adapter on an organism's base, held by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mechmisalign.adapters import Adapter
from mechmisalign.interventions import UseAdapter, applied, check_fits

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism


@contextmanager
def switched(organism: Organism, adapter: Adapter) -> Iterator[Organism]:
    """The body of ``Organism.with_adapter``."""
    with organism.as_base():
        worn = [UseAdapter(adapter)]
        check_fits(worn, organism)
        switch = _Switch()
        other = replace(
            organism,
            adapter=adapter,
            name=adapter.source,
            weights="live",
            _matrices=None,
            _peft_model=switch,
            _depth=0,
            full=None,
        )
        with applied(organism, worn, enabled=lambda: switch.on):
            model = organism.model
            organism.model = _Elsewhere(
                f"{organism.name!r} has lent its model to {adapter.source!r}; use the organism that with_adapter() "
                "gave, and its as_base() for the chat model"
            )
            try:
                yield other
            finally:
                organism.model = model
                other.model = _Elsewhere(
                    f"the with_adapter() block of {adapter.source!r} has ended; use the organism inside the block"
                )


class _Switch:
    """Answers to what a live organism asks of its ``PeftModel``: to leave the adapter out for a while."""

    on = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class _Elsewhere:
    """Stands where the model was while its weights belong to another organism."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, attribute: str) -> Any:
        raise RuntimeError(self._why)
