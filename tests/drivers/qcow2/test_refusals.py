"""How an image is refused: by the name of what it needs, by the limit, and never otherwise.

What is refused at all, tests/hostile says.
"""

from __future__ import annotations

import pytest

from underlay.errors import LimitExceededError, UnderlayError, UnsupportedFeatureError
from underlay.limits import Limits
from underlay_drivers.qcow2 import layout

from .images import Image, open_bytes, read

CLUSTER = 64 << 10


def test_encryption_is_refused_by_name(plain: Image) -> None:
    with (
        pytest.raises(UnsupportedFeatureError, match="LUKS") as caught,
        open_bytes(plain.put(32, "I", 2).data),
    ):
        pass
    assert caught.value.feature == "encryption (LUKS)"


def test_an_unknown_feature_is_named_by_the_images_own_table(plain: Image) -> None:
    plain.set_bit(72, 5).set_bit(72, 9)
    plain.extensions(
        (layout.EXTENSION_FEATURE_NAMES, layout.FEATURE_NAME.pack(0, 5, b"time travel"))
    )
    with pytest.raises(UnsupportedFeatureError) as caught, open_bytes(plain.data):
        pass
    assert caught.value.feature == "time travel, Unknown incompatible feature: 200"
    assert "Unsupported qcow2 feature(s): time travel" in str(caught.value)


def test_an_unknown_feature_is_named_even_if_the_rest_makes_no_sense(plain: Image) -> None:
    plain.set_bit(72, 5).put(36, "I", 2**32 - 1).put(32, "I", 3)
    with (
        pytest.raises(UnsupportedFeatureError, match="Unknown incompatible"),
        open_bytes(plain.data),
    ):
        pass


def test_limits_are_kept(plain: Image) -> None:
    with (
        pytest.raises(LimitExceededError) as caught,
        open_bytes(plain.data, limits=Limits(virtual_size=1 << 20)),
    ):
        pass
    assert caught.value.limit == "virtual_size"
    with open_bytes(plain.data, limits=Limits(decoded_unit=CLUSTER - 1)) as disk:
        assert read(disk, 0, 1) == b"\x11"
        with pytest.raises(LimitExceededError):
            read(disk, 3 * CLUSTER, 1)


def test_nothing_that_the_header_can_say_ends_otherwise_than_in_an_error_of_ours(
    plain: Image, extended: Image
) -> None:
    """Every field at every border value: no other exception, no hang, no great allocation."""
    values = [0, 1, 2, 7, 8, 511, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    for image in (plain, extended):
        for offset, width in [(4 * at, "I") for at in range(28)] + [
            (8 * at, "Q") for at in range(14)
        ]:
            for value in values:
                damaged = image.copy()
                if width == "I" and value >= 1 << 32:
                    continue
                damaged.put(offset, width, value)
                try:
                    with open_bytes(damaged.data) as disk:
                        read(disk, 0, 4096)
                except UnderlayError:
                    pass
