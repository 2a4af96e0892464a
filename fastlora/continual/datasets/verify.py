"""A look at every image before training starts: it is there, it is an image, and where asked for it decodes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fastlora.continual.datasets.images import Decoder
from fastlora.continual.datasets.split import DataError

LISTED = 10
LIST_FILE = "bad_images.txt"


def check_images(paths: Iterable[Path], decoder: Decoder, how: str) -> None:
    """Raises DataError unless every file can be opened as an image.

    Args:
        paths: of the images; one that comes twice is looked at once.
        how: headers (existence and header), decode (every pixel too), none (nothing at all).
    Raises:
        DataError: how many are missing and how many damaged, the first of them by name; where there are more, all of
            them in bad_images.txt in the working directory.
    """
    if how == "none":
        return
    unique = list(dict.fromkeys(paths))
    faults = decoder.map(lambda path: _fault(path, how == "decode"), unique)
    bad = [(path, fault) for path, fault in zip(unique, faults) if fault]
    if not bad:
        return
    missing = sum(fault == "missing" for _, fault in bad)
    lines = [f"{path}: {fault}" for path, fault in bad]
    text = f"of {len(unique)} images {missing} are missing and {len(bad) - missing} cannot be read:\n  "
    text += "\n  ".join(lines[:LISTED])
    if len(lines) > LISTED:
        Path(LIST_FILE).write_text("\n".join(lines) + "\n")
        text += f"\n  and {len(lines) - LISTED} more; all of them are listed in {Path(LIST_FILE).absolute()}"
    raise DataError(f"{text}\nUnpack the data sets again, or replace these files. Nothing was trained.")


def _fault(path: Path, decode: bool) -> str | None:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return " ".join(str(error).replace(str(path), "the file").split()) or type(error).__name__
    return None
