"""The options with which an image is created, as ``-o help`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from underlay.driver import OptionSpec

__all__ = ["AMEND_OPTIONS", "CREATE_OPTIONS"]

#: In qemu-img's order.
CREATE_OPTIONS: Final[Mapping[str, OptionSpec]] = {
    "backing_file": OptionSpec("File name of a base image"),
    "backing_fmt": OptionSpec("Image format of the base image"),
    "cluster_size": OptionSpec("qcow2 cluster size", type="size", default="65536"),
    "compat": OptionSpec("Compatibility level (v2 [0.10] or v3 [1.1])", default="v3"),
    "compression_type": OptionSpec(
        "Compression method used for image cluster compression", default="zlib"
    ),
    "data_file": OptionSpec("File name of an external data file"),
    "data_file_raw": OptionSpec(
        "The external data file must stay valid as a raw image", type="bool", default="off"
    ),
    "extended_l2": OptionSpec("Extended L2 tables", type="bool", default="off"),
    "lazy_refcounts": OptionSpec("Postpone refcount updates", type="bool", default="off"),
    "preallocation": OptionSpec(
        "Preallocation mode (allowed values: off, metadata, falloc, full)", default="off"
    ),
    "refcount_bits": OptionSpec(
        "Width of a reference count entry in bits", type="int", default="16"
    ),
}

#: In qemu-img's order.
AMEND_OPTIONS: Final[Mapping[str, OptionSpec]] = {
    **{
        name: OptionSpec(CREATE_OPTIONS[name].help, type=CREATE_OPTIONS[name].type)
        for name in (
            "backing_file",
            "backing_fmt",
            "compat",
            "data_file",
            "data_file_raw",
            "lazy_refcounts",
            "refcount_bits",
        )
    },
    "size": OptionSpec("Virtual disk size", type="size"),
}
