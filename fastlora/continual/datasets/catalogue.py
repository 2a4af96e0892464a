"""The eleven data sets: where they lie below data.root in CoOp's layout and in torchvision's, and what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastlora.continual.datasets import readers
from fastlora.continual.datasets.split import DataError, Split


@dataclass(frozen=True)
class Place:
    """A directory below data.root, and the one of the images below that."""

    home: str
    images: str

    def __str__(self) -> str:
        return f"{self.home}/" if self.images == "." else f"{self.home}/{self.images}/"


@dataclass(frozen=True)
class Source:
    """A data set on disk.

    Args:
        name: of its task.
        page: where it is downloaded.
        classes: their number in mtil.
        read: (home, folder of images) -> the published split.
        coop, torchvision: its place in either layout; the two may be one.
        files: label files below the home that `read` needs.
        split: CoOp's file with the split of xtail, in the home; None where the published split is used there, too.
        coop_classes: number of classes in xtail, where it is another.
    """

    name: str
    page: str
    classes: int
    read: Callable[[Path, Path], Split]
    coop: Place
    torchvision: Place
    files: tuple[str, ...] = ()
    split: str | None = None
    coop_classes: int | None = None

    def find(self, root: Path, needed: tuple[str, ...]) -> tuple[Path, Path]:
        """(home, folder of images) of the layout that is there; the one with all `needed` files where both are.

        Raises:
            DataError: neither is there, or a file is missing; the message says what goes where.
        """
        places = [place for place in dict.fromkeys((self.coop, self.torchvision)) if (root / str(place)).is_dir()]
        if not places:
            raise DataError(f"{self.name}: neither layout is in {root}. {self.where(needed)}")
        missing = {place: [name for name in needed if not (root / place.home / name).is_file()] for place in places}
        best = min(places, key=lambda place: len(missing[place]))
        if missing[best]:
            lost = ", ".join(str(root / best.home / name) for name in missing[best])
            raise DataError(f"{self.name}: {lost} is missing. {self.where(needed)}")
        return root / best.home, root / best.home / best.images

    def published(self, root: Path) -> Split:
        """The published split of the data set in `root`.

        Raises:
            DataError: the data set or a file of it is missing, or its label files are damaged.
        """
        home, folder = self.find(root, self.files)
        try:
            return self.read(home, folder)
        except DataError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{self.name}: the label files in {home} are damaged ({why}). Download them again."
            ) from error

    def where(self, needed: tuple[str, ...]) -> str:
        """What goes where, in words."""
        layouts = {"CoOp's layout": self.coop, "torchvision's": self.torchvision}
        if self.coop == self.torchvision:
            layouts = {"both layouts": self.coop}
        places = "; ".join(f"{layout}: images in {place}{_with(place, needed)}" for layout, place in layouts.items())
        source = f"Download it from {self.page}"
        if self.split in needed:
            source += f", and {self.split} from the links in DATASETS.md of github.com/KaiyangZhou/CoOp"
        return f"In {places}. {source}."


def _with(place: Place, needed: tuple[str, ...]) -> str:
    return f", with {', '.join(f'{place.home}/{name}' for name in needed)}" if needed else ""


_MNIST = Place("MNIST/raw", ".")
_CIFAR = Place("cifar-100-python", ".")
_FOOD = Place("food-101", "images")
_EUROSAT = Place("eurosat", "2750")
_CARS = Place("stanford_cars", ".")

SOURCES = {
    source.name: source
    for source in (
        Source(
            "Aircraft", "www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft", 100, readers.aircraft,
            Place("fgvc_aircraft", "images"), Place("fgvc-aircraft-2013b/data", "images"),
            ("variants.txt", "images_variant_train.txt", "images_variant_test.txt"),
        ),
        Source(
            "Caltech101", "data.caltech.edu/records/mzrjq-6wc02", 101, readers.caltech101,
            Place("caltech-101", "101_ObjectCategories"), Place("caltech101", "101_ObjectCategories"),
            split="split_zhou_Caltech101.json", coop_classes=100,
        ),
        Source(
            "CIFAR100", "www.cs.toronto.edu/~kriz/cifar.html (the Python version)", 100, readers.cifar100,
            _CIFAR, _CIFAR, ("train", "test", "meta"),
        ),
        Source(
            "DTD", "www.robots.ox.ac.uk/~vgg/data/dtd", 47, readers.dtd,
            Place("dtd", "images"), Place("dtd/dtd", "images"), ("labels/train1.txt", "labels/test1.txt"),
            split="split_zhou_DescribableTextures.json",
        ),
        Source(
            "EuroSAT", "github.com/phelber/EuroSAT (the RGB version)", 10, readers.eurosat, _EUROSAT, _EUROSAT,
            split="split_zhou_EuroSAT.json",
        ),
        Source(
            "Flowers", "www.robots.ox.ac.uk/~vgg/data/flowers/102", 102, readers.flowers,
            Place("oxford_flowers", "jpg"), Place("flowers-102", "jpg"), ("imagelabels.mat", "setid.mat"),
            split="split_zhou_OxfordFlowers.json",
        ),
        Source(
            "Food", "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101", 101, readers.food101, _FOOD, _FOOD,
            ("meta/train.json", "meta/test.json"), split="split_zhou_Food101.json",
        ),
        Source(
            "MNIST", "yann.lecun.com/exdb/mnist or a mirror of it (train- and t10k-images-idx3-ubyte, train- and "
            "t10k-labels-idx1-ubyte; .gz will do)", 10, readers.mnist, _MNIST, _MNIST,
        ),
        Source(
            "OxfordPet", "www.robots.ox.ac.uk/~vgg/data/pets", 37, readers.oxford_pet,
            Place("oxford_pets", "images"), Place("oxford-iiit-pet", "images"),
            ("annotations/trainval.txt", "annotations/test.txt"), split="split_zhou_OxfordPets.json",
        ),
        Source(
            "StanfordCars", "ai.stanford.edu/~jkrause/cars/car_dataset.html (often down: ask for a copy of its files)",
            196, readers.stanford_cars, _CARS, _CARS,
            ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
            split="split_zhou_StanfordCars.json",
        ),
        Source(
            "SUN397", "vision.princeton.edu/projects/2010/SUN (SUN397.tar.gz, which holds ClassName.txt)", 397, readers.sun397,
            Place("sun397", "SUN397"), Place("SUN397", "."), split="split_zhou_SUN397.json",
        ),
    )
}  # fmt: skip
