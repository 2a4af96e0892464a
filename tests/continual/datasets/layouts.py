"""Small copies of the eleven data sets in their real layouts: every class, every label file, a few images of 24 px.

Each maker writes one data set below `root`, in the layout "coop" or "torchvision".
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CALTECH101 = (
    "BACKGROUND_Google Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver "
    "binocular bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair "
    "chandelier cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin "
    "dragonfly electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone "
    "grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop "
    "llama lobster lotus mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza "
    "platypus pyramid revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler "
    "starfish stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat "
    "windsor_chair wrench yin_yang"
).split()
EUROSAT = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}  # fmt: skip
AIRCRAFT = ["707-320", "A340-300", "F-16A/B", "F/A-18", "Boeing 717", *(f"Variant {i}" for i in range(95))]
BREEDS = ["Abyssinian", "american_bulldog", "Bengal", "wheaten_terrier", *(f"breed_{i}" for i in range(33))]
FOODS = sorted(["apple_pie", "pizza", "french_onion_soup", *(f"dish_{i:02d}" for i in range(98))])
CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", *(f"Make Model {i} 2007" for i in range(194))]
SUN = ["a/abbey", "a/apartment_building/outdoor", "v/van_interior", *(f"z/scene_{i:03d}" for i in range(394))]
TEXTURES = ["banded", "blotchy", *(f"kind_{i:02d}" for i in range(45))]
FINE = ["apple", "aquarium_fish", *(f"fine_{i:02d}" for i in range(98))]
PER_CLASS = 8  # images of a data set whose split is drawn
TRAIN, TEST = 3, 2  # of the others


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (28, 24), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, "JPEG")
    return file.getvalue()


JPEGS = [jpeg(colour) for colour in ((220, 40, 40), (40, 200, 60), (50, 60, 210), (200, 200, 60), (90, 90, 90))]


def put(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEGS[number % len(JPEGS)])


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def zhou(path: Path, train: list, test: list) -> None:
    """CoOp's split file."""
    text(path, json.dumps({"train": train, "val": train[:1], "test": test}))


def aircraft(root: Path, layout: str) -> None:
    home = root / ("fgvc_aircraft" if layout == "coop" else "fgvc-aircraft-2013b/data")
    text(home / "variants.txt", "\n".join(AIRCRAFT) + "\n")
    number = 1000000
    for side, count in (("train", TRAIN), ("val", 1), ("test", TEST)):
        lines = []
        for label, variant in enumerate(AIRCRAFT):
            for _ in range(count):
                number += 1
                put(home / "images" / f"{number:07d}.jpg", label)
                lines.append(f"{number:07d} {variant}")
        text(home / f"images_variant_{side}.txt", "\n".join(lines) + "\n")


def caltech101(root: Path, layout: str) -> None:
    home = root / ("caltech-101" if layout == "coop" else "caltech101")
    train, test = [], []
    kept = [name for name in CALTECH101 if name not in ("BACKGROUND_Google", "Faces_easy")]
    new = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
    for number, name in enumerate(CALTECH101):
        for i in range(1, PER_CLASS + 1):
            put(home / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", number)
            if name in kept:
                row = [f"{name}/image_{i:04d}.jpg", kept.index(name), new.get(name, name)]
                (train if i <= TRAIN else test).append(row)
    (home / "101_ObjectCategories" / "anchor" / "image_0002.jpg").write_bytes(jpeg((9, 9, 9), mode="L"))  # grey
    (home / "101_ObjectCategories" / "ant" / "Thumbs.db").write_bytes(b"no image")
    zhou(home / "split_zhou_Caltech101.json", train, test)


def cifar100(root: Path, layout: str) -> None:
    home = root / "cifar-100-python"
    home.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for side, count in (("train", TRAIN), ("test", TEST)):
        labels = list(range(100)) * count
        data = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        content = {"data": data, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (home / side).write_bytes(pickle.dumps(content, protocol=2))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE, "coarse_label_names": ["x"]}, protocol=2))


def dtd(root: Path, layout: str) -> None:
    home = root / ("dtd" if layout == "coop" else "dtd/dtd")
    sides = {"train": [], "val": [], "test": []}
    for label, name in enumerate(TEXTURES):
        for i in range(TRAIN + 1 + TEST):
            image = f"{name}/{name}_{i:04d}.jpg"
            put(home / "images" / image, label)
            sides["train" if i < TRAIN else "val" if i == TRAIN else "test"].append(image)
    for side, images in sides.items():
        text(home / "labels" / f"{side}1.txt", "\n".join(images) + "\n")
    rows = {
        side: [[i, TEXTURES.index(i.split("/")[0]), i.split("/")[0]] for i in images] for side, images in sides.items()
    }
    zhou(home / "split_zhou_DescribableTextures.json", rows["train"], rows["test"])


def eurosat(root: Path, layout: str) -> None:
    home = root / "eurosat"
    train, test = [], []
    for label, (name, readable) in enumerate(EUROSAT.items()):
        for i in range(1, PER_CLASS + 4):
            put(home / "2750" / name / f"{name}_{i}.jpg", label)
            (train if i <= TRAIN else test).append([f"{name}/{name}_{i}.jpg", label, readable])
    zhou(home / "split_zhou_EuroSAT.json", train, test)


def flowers(root: Path, layout: str) -> None:
    home = root / ("oxford_flowers" if layout == "coop" else "flowers-102")
    labels = np.tile(np.arange(1, 103), TRAIN + 1 + TEST)  # from 1, and no image in the order of its class
    for number in range(1, len(labels) + 1):
        put(home / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(home / "imagelabels.mat", {"labels": labels[None]})
    cuts = np.split(np.arange(1, len(labels) + 1), [102 * TRAIN, 102 * (TRAIN + 1)])
    sets = dict(zip(("trnid", "valid", "tstid"), cuts))
    savemat(home / "setid.mat", {key: numbers[None] for key, numbers in sets.items()})
    rows = {
        key: [[f"image_{n:05d}.jpg", int(labels[n - 1]) - 1, f"flower {labels[n - 1]}"] for n in numbers.tolist()]
        for key, numbers in sets.items()
    }
    text(home / "cat_to_name.json", json.dumps({str(i): f"flower {i}" for i in range(1, 103)}))
    zhou(home / "split_zhou_OxfordFlowers.json", rows["trnid"], rows["tstid"])


def food101(root: Path, layout: str) -> None:
    home = root / "food-101"
    sides: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(FOODS):
        for i in range(TRAIN + TEST):
            put(home / "images" / name / f"{100 + i}.jpg", label)
            sides["train" if i < TRAIN else "test"].setdefault(name, []).append(f"{name}/{100 + i}")
    for side, content in sides.items():
        text(home / "meta" / f"{side}.json", json.dumps(content))
    rows = {
        side: [[f"{image}.jpg", FOODS.index(name), name] for name, images in content.items() for image in images]
        for side, content in sides.items()
    }
    zhou(home / "split_zhou_Food101.json", rows["train"], rows["test"])


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def mnist(root: Path, layout: str) -> None:
    home = root / "MNIST" / "raw"
    home.mkdir(parents=True)
    for side, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.tile(np.arange(10, dtype=np.uint8), count)
        pixels = np.repeat(labels * 20, 28 * 28).reshape(-1, 28, 28)
        (home / f"{side}-images-idx3-ubyte").write_bytes(idx(pixels))
        (home / f"{side}-labels-idx1-ubyte").write_bytes(idx(labels))


def oxford_pet(root: Path, layout: str) -> None:
    home = root / ("oxford_pets" if layout == "coop" else "oxford-iiit-pet")
    rows: dict[str, list] = {"trainval": [], "test": []}
    for label, breed in enumerate(BREEDS):
        for i in range(TRAIN + TEST):
            put(home / "images" / f"{breed}_{i + 1}.jpg", label)
            side = "trainval" if i < TRAIN else "test"
            rows[side].append([f"{breed}_{i + 1}.jpg", label, breed.lower()])
    for side, own in rows.items():
        lines = [f"{image[:-4]} {label + 1} 1 1" for image, label, _ in own]
        text(home / "annotations" / f"{side}.txt", "\n".join(lines) + "\n")
    (home / "images" / "Abyssinian_100.mat").write_bytes(b"stray")
    zhou(home / "split_zhou_OxfordPets.json", rows["trainval"], rows["test"])


def stanford_cars(root: Path, layout: str) -> None:
    home = root / "stanford_cars"
    kind = [(name, "O") for name in ("bbox_x1", "class", "fname")]
    rows = {}
    for side, count in (("train", TRAIN), ("test", TEST)):
        labels = np.tile(np.arange(196), count)
        files = [f"{i + 1:05d}.jpg" for i in range(len(labels))]
        for file, label in zip(files, labels):
            put(home / f"cars_{side}" / file, int(label))
        annotations = np.array([(1, int(label) + 1, file) for file, label in zip(files, labels)], dtype=kind)
        (home / "devkit").mkdir(exist_ok=True)
        if side == "train":
            savemat(home / "devkit" / "cars_train_annos.mat", {"annotations": annotations})
        else:
            savemat(home / "cars_test_annos_withlabels.mat", {"annotations": annotations})
        rows[side] = [
            [f"cars_{side}/{file}", int(label), _year_first(CARS[label])] for file, label in zip(files, labels)
        ]
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array(CARS, dtype=object)[None]})
    zhou(home / "split_zhou_StanfordCars.json", rows["train"], rows["test"])


def _year_first(name: str) -> str:
    *words, year = name.split()
    return " ".join([year, *words])


def sun397(root: Path, layout: str) -> None:
    home = root / ("sun397" if layout == "coop" else "SUN397")
    folder = home / "SUN397" if layout == "coop" else home
    train, test = [], []
    for label, name in enumerate(SUN):
        for i in range(PER_CLASS):
            put(folder / name / f"sun_{label:03d}{i}.jpg", label)
            words = " ".join(name.split("/")[1:][::-1])
            (train if i < TRAIN else test).append([f"{name}/sun_{label:03d}{i}.jpg", label, words])
    text(folder / "ClassName.txt", "".join(f"/{name}\n" for name in SUN))
    zhou(home / "split_zhou_SUN397.json", train, test)


MAKERS = {
    "Aircraft": aircraft, "Caltech101": caltech101, "CIFAR100": cifar100, "DTD": dtd, "EuroSAT": eurosat,
    "Flowers": flowers, "Food": food101, "MNIST": mnist, "OxfordPet": oxford_pet, "StanfordCars": stanford_cars,
    "SUN397": sun397,
}  # fmt: skip


def make_all(root: Path, layout: str) -> Path:
    for maker in MAKERS.values():
        maker(root, layout)
    return root
