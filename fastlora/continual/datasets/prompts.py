"""Prompt templates of the published protocols. The first trains; all are averaged in evaluation."""

from __future__ import annotations

_KINDS = (
    "photo", "painting", "plastic", "sculpture", "sketch", "tattoo", "toy", "rendition", "embroidered", "cartoon",
    "video game", "plushie", "origami", "art", "graffiti", "drawing", "doodle",
)  # fmt: skip
_OF = {"photo", "painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle"}
_OF_WITHOUT_ARTICLE = {"art", "graffiti"}


def _caltech(article: str) -> list[str]:
    """17 templates with "a", then the same with "the"."""
    forms = []
    for kind in _KINDS:
        if kind in _OF:
            forms.append(f"a {kind} of {article} {{}}.")
        elif kind in _OF_WITHOUT_ARTICLE:
            forms.append(f"{kind} of {article} {{}}.")
        elif kind == "video game":
            forms.append(f"{article} {{}} in a video game.")
        else:
            forms.append(f"{article} {kind} {{}}.")
    return forms


# published with the MTIL benchmark (ZSCL), whose lists are CLIP's or shorter
MTIL = {
    "Aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "Caltech101": (*_caltech("a"), *_caltech("the")),
    "CIFAR100": (
        "a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.",
        "a low contrast photo of a {}.", "a high contrast photo of a {}.", "a bad photo of a {}.",
        "a good photo of a {}.", "a photo of a small {}.", "a photo of a big {}.",
        "a photo of the {}.", "a blurry photo of the {}.", "a black and white photo of the {}.",
        "a low contrast photo of the {}.", "a high contrast photo of the {}.", "a bad photo of the {}.",
        "a good photo of the {}.", "a photo of the small {}.", "a photo of the big {}.",
    ),
    "DTD": tuple(
        f"a photo of {article} {{}} {kind}."
        for article in ("a", "the") for kind in ("texture", "pattern", "thing", "object")
    ),
    "EuroSAT": (
        "a centered satellite photo of {}.", "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "Flowers": ("a photo of a {}, a type of flower.",),
    "Food": ("a photo of a {}, a type of food.",),
    "MNIST": ('a photo of the number: "{}".',),
    "OxfordPet": ("a photo of a {}, a type of pet.",),
    "StanfordCars": (
        "a photo of a {}, a type of car.", "a photo of a {}.", "a photo of the {}.", "a photo of my {}.",
        "i love my {}!", "a photo of my dirty {}.", "a photo of my clean {}.", "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "SUN397": ("a photo of a {}.", "a photo of the {}."),
}  # fmt: skip

# CoOp's, one each, which RAIL and CoDyRA took over; that of MNIST is CoDyRA's
XTAIL = {
    "Aircraft": ("a photo of a {}, a type of aircraft.",),
    "Caltech101": ("a photo of a {}.",),
    "DTD": ("{} texture.",),
    "EuroSAT": ("a centered satellite photo of {}.",),
    "Flowers": ("a photo of a {}, a type of flower.",),
    "Food": ("a photo of {}, a type of food.",),
    "MNIST": ('a photo of the number: "{}".',),
    "OxfordPet": ("a photo of a {}, a type of pet.",),
    "StanfordCars": ("a photo of a {}.",),
    "SUN397": ("a photo of a {}.",),
}

SINGLE = ("a photo of a {}.",)
