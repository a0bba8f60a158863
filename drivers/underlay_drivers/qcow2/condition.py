"""Whether an image can still be written: not once nobody knows what it holds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs

from underlay.errors import ConflictError, CorruptImageError, StorageError, UnderlayError
from underlay_drivers.qcow2 import layout

if TYPE_CHECKING:
    from underlay_drivers.qcow2.dependencies import Dependencies

__all__ = ["Condition"]


class Condition:
    """What ended the writing of one image, if anything did."""

    __slots__ = ("_broken", "_disk")

    def __init__(self, disk: Dependencies) -> None:
        self._disk = disk
        self._broken: UnderlayError | None = None

    @property
    def broken(self) -> bool:
        """Whether nothing more can be written."""
        return self._broken is not None

    def check(self) -> None:
        """Raise what broke this image for writing, if anything did."""
        if self._broken is not None:
            # Without the calls that met it before, whose buffers it would keep.
            raise self._broken.with_traceback(None)

    def give_up(self, why: str, cause: BaseException) -> None:
        """Nobody knows what reached the disk, so nothing more is written."""
        if self._broken is None:
            name = self._disk.image.name()
            self._broken = StorageError(
                f"'{name}' can no longer be written, because {why} ({cause}); close it, and check "
                "it before it is used again",
                filename=name,
            )
            if isinstance(cause, ConflictError):  # that it is somebody else's now is all there is
                self._broken = cause
            self._disk.forbid_writing()

    @asynccontextmanager
    async def condemning(self) -> AsyncGenerator[None]:
        """An image that contradicts itself in here is not written any more."""
        try:
            yield
        except CorruptImageError as error:
            await self.condemn(error)
            raise

    async def condemn(self, error: CorruptImageError) -> None:
        """The image contradicts itself: stop writing, and mark it, as far as that can be done."""
        if self._broken is not None:
            return
        self._broken = CorruptImageError(
            f"{error}; nothing more is written to it",
            offset=error.offset,
            field=error.field,
            value=error.value,
        )
        self._disk.forbid_writing()
        if self._disk.header.version > 2:  # noqa: PLR2004 (a version is its own best name)
            features = self._disk.header.incompatible_features | layout.CORRUPT
            try:
                await self._disk.image.write(
                    features.to_bytes(8, "big"), layout.INCOMPATIBLE_FEATURES_OFFSET
                )
                await self._disk.image.sync()
            except StorageError:
                return  # its damage will be met again
            self._disk.header = attrs.evolve(self._disk.header, incompatible_features=features)
