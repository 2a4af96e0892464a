"""Images and sentences of no task, for methods that hold the model to what it said of them."""

from __future__ import annotations

from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

from fastlora.continual.datasets.formats import read_lines
from fastlora.continual.datasets.images import Decoder, LazyImages
from fastlora.continual.datasets.names import readable
from fastlora.continual.datasets.prompts import SINGLE
from fastlora.continual.datasets.split import SUFFIXES, DataError, Images, folder_names
from fastlora.continual.datasets.transforms import Transforms
from fastlora.continual.datasets.verify import check_images
from fastlora.continual.stream import Reference


def reference_data(
    folder: Path | None, captions: Path | None, transforms: Transforms, decoder: Decoder, verify: str
) -> Reference:
    """Every image below `folder`, prepared as for tests, and the lines of `captions`; both may be None.

    Without captions the texts are "a photo of a {}." of the names of its folders; without these, of ImageNet's classes.

    Raises:
        DataError: no directory, no images, an image that cannot be read, or no texts.
    """
    images = None if folder is None else _images(folder, transforms, decoder, verify)
    if captions is not None:
        texts = read_lines(captions)
    else:
        names = IMAGENET_CLASSNAMES if folder is None else readable(folder_names(folder))
        texts = [SINGLE[0].format(name) for name in names]
    if not texts:
        raise DataError(
            f"{captions or folder} gives no texts. Put one sentence a line into a file and pass --data.captions FILE."
        )
    return Reference(images, tuple(texts))


def _images(folder: Path, transforms: Transforms, decoder: Decoder, verify: str) -> LazyImages:
    if not folder.is_dir():
        raise DataError(f"data.reference is {folder}, which is no directory. Give one with images.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"data.reference is {folder}, which has no images ({', '.join(SUFFIXES)}).")
    check_images((folder / name for name in names), decoder, verify)
    return LazyImages(folder, Images(tuple(names), (0,) * len(names)), transforms, decoder, training=False)
