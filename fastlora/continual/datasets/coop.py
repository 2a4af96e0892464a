"""The splits of X-TAIL: CoOp's `split_zhou_*.json`, and class names as the released code of RAIL and CoDyRA has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlora.continual.datasets.catalogue import Source
from fastlora.continual.datasets.formats import read_json
from fastlora.continual.datasets.names import readable
from fastlora.continual.datasets.split import DataError, Images, Split

# what the released code makes of the names, with their own template and with the single one
RENAMED = {
    "EuroSAT": "{} satellite location",
    "MNIST": 'number: "{}"',
}


def coop_split(source: Source, root: Path) -> Split:
    """The split of a data set in xtail; the published one where CoOp made none (Aircraft, MNIST)."""
    if source.split is None:
        split = source.published(root)
    else:
        home, folder = source.find(root, (source.split,))
        split = _read(home / source.split, folder)
    form = RENAMED.get(source.name, "{}")
    return Split(tuple(form.format(name) for name in split.classes), split.folder, split.train, split.test)


def _read(path: Path, folder: Path) -> Split:
    """Rows [path of the image, label, class name] under "train" and "test"; its "val" is used by nobody here."""
    content = read_json(path)
    names: dict[int, str] = {}

    def side(key: str) -> Images:
        try:
            rows = [(str(image), int(label), str(name)) for image, label, name in content[key]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path} has no rows of [image, label, class] under {key!r} ({error!r}).") from None
        for image, label, name in rows:
            if names.setdefault(label, name) != name:
                raise DataError(f"{path} calls label {label} {names[label]!r} and, for {image}, {name!r}.")
        return Images(tuple(row[0].replace("\\", "/").lstrip("/") for row in rows), tuple(row[1] for row in rows))

    train, test = side("train"), side("test")
    gaps: list[Any] = [label for label in range(len(names)) if label not in names]
    if gaps:
        raise DataError(f"{path} has {len(names)} classes and no label {gaps[0]}. Download it again.")
    return Split(readable([names[label] for label in sorted(names)]), folder, train, test)
