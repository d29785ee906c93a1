"""Arguments that have another name now: the old one is refused with the new one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


def renamed(**now: str) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """Decorate a function whose keyword arguments were renamed: ``renamed(with_judge="judge")``.

    The decorated function raises ``TypeError`` on an old name, and says the new one.
    """

    def decorate(function: Callable[Params, Result]) -> Callable[Params, Result]:
        @functools.wraps(function)
        def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            for old in now.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__}() takes {now[old]}= instead of {old}=; give the same value to it")
            return function(*args, **kwargs)

        return checked

    return decorate
