"""Benchmarks of images on disk: eleven published data sets in two layouts, and class folders of the user's own."""

from fastlora.continual.datasets.protocols import check_options, image_stream

__all__ = ["check_options", "image_stream"]
