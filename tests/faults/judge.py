"""How an outcome is found: whether an error came and was clear, and whether everything is as it was before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from faults.case import VERDICTS, Outcome
from torch import Tensor, nn

import fastlora

# what the library raises for a user; PEFT promises nothing of the kind, so any Exception of it counts
USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, FloatingPointError)


def refused(
    work: Callable[[], Any],
    *told: str,
    keeps: Iterable[Any] = (),
    kinds: tuple[type[Exception], ...] = USER_ERRORS,
    accepted: str = "no error",
) -> Outcome:
    """Whether `work` stops with an error that tells what is wrong, and nothing has changed.

    Args:
        told: texts that the message must hold, in any case of letters.
        keeps: modules, tensors, files and directories that must stay as they are, bit for bit.
        kinds: of errors that are meant for users.
        accepted: what it means that no error came.
    """
    keeps = list(keeps)
    before = [content(thing) for thing in keeps]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            work()
        except Exception as error:
            found = error
        else:
            warned = [text for text in (str(warning.message) for warning in caught) if _tells(text, told)]
            return Outcome("warned", f"{accepted}; warned: {short(warned[0])}") if warned else harm(accepted)
    text = f"{type(found).__name__}: {short(found)}"
    changed = [_name(thing) for thing, old in zip(keeps, before) if content(thing) != old]
    if changed:
        return Outcome("half done", f"{text}, and changed: {', '.join(changed)}")
    clear = isinstance(found, kinds) and _tells(str(found), told)
    return Outcome("survived" if clear else "unclear error", text)


def their_refusal(work: Callable[[], Any], *told: str, **options: Any) -> Outcome:
    """`refused` for PEFT: any kind of error will do."""
    return refused(work, *told, kinds=(Exception,), **options)


def warns(work: Callable[[], Any], *told: str, without: str) -> Outcome:
    """Whether `work` does what it was asked, and a warning tells what may be wrong with that."""
    found = refused(work, *told, accepted=without)
    if found.verdict == "warned":
        return Outcome("survived", found.seen.removeprefix(f"{without}; "))
    return found if found.verdict == "silent harm" else Outcome("unclear error", found.seen)


def right(condition: Any, otherwise: str, seen: str = "the right result", **counts: float) -> Outcome:
    """A result that is right, or harm that no error tells of."""
    return Outcome("survived", seen, counts) if bool(condition) else harm(otherwise, **counts)


def harm(seen: str, **counts: float) -> Outcome:
    return Outcome("silent harm", seen, counts)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Of several trials of one fault; counts how many there were."""
    outcomes = list(outcomes)
    found = max(outcomes, key=lambda outcome: VERDICTS.index(outcome.verdict))
    bad = sum(outcome.verdict != "survived" for outcome in outcomes)
    return Outcome(found.verdict, found.seen, {"tried": len(outcomes), "survived": len(outcomes) - bad} | found.counts)


def content(thing: Any) -> Any:
    """Every bit of a module with its adapters' settings, of a tensor, of a file, of a directory."""
    if isinstance(thing, nn.Module):
        settings = [(name, adapter.kappa, adapter.scaling) for name, adapter in fastlora.adapters(thing)]
        return [(name, *content(value)) for name, value in thing.state_dict().items()], settings
    if isinstance(thing, Tensor):
        plain = thing.detach()
        if plain.is_meta or type(plain) not in (Tensor, nn.Parameter):
            return type(plain), plain.shape
        return str(plain.dtype), tuple(plain.shape), plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(thing, Path):
        if thing.is_dir():
            return {str(path.relative_to(thing)): content(path) for path in sorted(thing.rglob("*"))}
        return thing.read_bytes() if thing.exists() else None
    raise TypeError(f"a {type(thing).__name__} is neither module nor tensor nor path")


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return content(a) == content(b)


def short(error: Any, length: int = 160) -> str:
    """One line of a message."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _tells(text: str, told: Iterable[str]) -> bool:
    return all(each.lower() in text.lower() for each in told)


def _name(thing: Any) -> str:
    return thing.name if isinstance(thing, Path) else type(thing).__name__
