"""Benchmarks of images on disk: eleven published data sets in two layouts, and class folders of the user's own."""

from fastlora.continual.datasets.protocols import check_options, find_images

__all__ = ["check_options", "find_images"]
