"""Encoding clusters, and decoding them whatever their streams claim. Pure and thread-safe.

Nothing is allocated by a size that a stream declares: output is bounded by the cluster, and zstd's
window by what every decoder has to offer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs

from underlay.driver import Decoder
from underlay.errors import CorruptImageError, OptionError
from underlay.limits import Limits

if TYPE_CHECKING:
    from zstandard import ZstdCompressor

__all__ = ["LEVELS", "ClusterDecoder", "compress", "decompress", "encoder"]

#: RFC 8878, 3.1.1.1.2: what a decoder should support, and more than a cluster.
_WINDOW_MAX: Final = 8 << 20
#: What a frame that does not say how much it holds is said to hold.
_UNDECLARED: Final = -1
#: Raw deflate. QEMU writes with a 4 KiB window; reading takes any.
_RAW_DEFLATE: Final = -15
#: Raw deflate with the window that every reader of qcow2 has.
_RAW_DEFLATE_4K: Final = -12
#: isal's levels, which are much faster than zlib's; the second equals zlib's default.
_ISAL_MOST: Final = 3
_ISAL_LEVEL: Final = 2
#: zstd's quickest strategy with larger tables: as small as its default level makes a cluster of
#: 64 KiB, give or take a percent, in less than three quarters of the time.
_ZSTD_QUICK: Final = {
    "window_log": 21,
    "chain_log": 12,
    "hash_log": 15,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
    "strategy": 1,
}
#: The highest level by compression type.
LEVELS: Final = {0: 9, 1: 22}


@attrs.frozen
class ClusterDecoder(Decoder):
    """Decodes the clusters of one image."""

    compression_type: int
    #: The image's name, for messages.
    image: str
    limits: Limits

    def decode(self, host_length: int, raw: memoryview, out: memoryview) -> None:
        """See ``FormatDriverInstance.decode``."""
        if len(out) > self.limits.decoded_unit:
            what = f"'{self.image}': the size of a compressed cluster"
            self.limits.check("decoded_unit", len(out), what=what)
        decompress(self.compression_type, raw[:host_length], out, name=self.image)


def decompress(compression_type: int, raw: memoryview, out: memoryview, *, name: str) -> None:
    """Fill ``out`` with what ``raw`` decodes to; bytes that follow the stream are ignored.

    Raises:
        CorruptImageError: it decodes to something shorter, or not at all.
    """
    reason = _inflate(raw, out) if compression_type == 0 else _decompress_zstd(raw, out)
    if reason is not None:
        raise CorruptImageError(
            f"'{name}': a compressed cluster cannot be read: {reason}; restore it from a backup",
            field="compressed cluster",
        )


def _inflate(raw: memoryview, out: memoryview) -> str | None:
    module = _deflate_module()
    try:
        data = module.decompressobj(_RAW_DEFLATE).decompress(raw, len(out))
    except module.error as error:
        return f"bad deflate stream ({error})"
    if len(data) != len(out):
        return f"its deflate stream ends after {len(data)} of {len(out)} bytes"
    out[:] = data
    return None


class _ZstdDecoder:
    """Decodes frames, in one thread: it is dear to make, and must not be shared."""

    __slots__ = ("_declared", "_decompress", "_error")

    def __init__(self) -> None:
        import zstandard

        self._declared = zstandard.frame_content_size
        self._decompress = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX).decompress
        self._error = zstandard.ZstdError

    def decode(self, raw: memoryview, out: memoryview) -> str | None:
        """Fill ``out``, or say why that cannot be."""
        size = len(out)
        try:
            declared = self._declared(raw)
            # What a frame declares is allocated for it, so that has to be looked at first.
            if declared not in (size, _UNDECLARED):
                return f"its zstd frame holds {declared} bytes, not {size}"
            # One whole frame, and an error if it holds more; what follows it belongs to others.
            data = self._decompress(raw, size)
        except self._error as error:
            return f"bad zstd frame ({error})"
        if len(data) != size:
            return f"its zstd frame ends after {len(data)} of {size} bytes"
        out[:] = data
        return None


def _decompress_zstd(raw: memoryview, out: memoryview) -> str | None:
    decoder = _per_thread.zstd
    if decoder is None:
        decoder = _per_thread.zstd = _ZstdDecoder()
    return decoder.decode(raw, out)


def encoder(
    compression_type: int, level: int | None = None
) -> Callable[[memoryview], bytes | None]:
    """What encodes a cluster, or gives None where that would not be smaller. Thread-safe.

    ``level`` is from 1 (quickest) to 9 (smallest) with zlib, and to 22 with zstd.

    Raises:
        OptionError: there is no such level.
    """
    most = LEVELS[compression_type]
    if level is not None and not 1 <= level <= most:
        raise OptionError(
            f"The compression level is {level}; it can be from 1 to {most}", option="level"
        )
    if compression_type == 0:
        return partial(_smaller, _deflate(level))
    return partial(_smaller, partial(_compress_zstd, level))


def compress(compression_type: int, data: memoryview) -> bytes | None:
    """The encoded form of a cluster, or None where that would not be smaller."""
    return _default_encoder(compression_type)(data)


@functools.cache
def _default_encoder(compression_type: int) -> Callable[[memoryview], bytes | None]:
    return encoder(compression_type)


def _smaller(encode: Callable[[memoryview], bytes], data: memoryview) -> bytes | None:
    encoded = encode(data)
    return encoded if len(encoded) < len(data) else None


def _deflate(level: int | None) -> Callable[[memoryview], bytes]:
    module = _deflate_module()
    if module.__name__ != "zlib" and (level is None or level <= _ISAL_MOST):
        return partial(module.compress, level=level or _ISAL_LEVEL, wbits=_RAW_DEFLATE_4K)
    import zlib

    return partial(zlib.compress, level=-1 if level is None else level, wbits=_RAW_DEFLATE_4K)


def _compress_zstd(level: int | None, data: memoryview) -> bytes:
    return _zstd_compressor(level).compress(data)


@functools.cache
def _deflate_module() -> Any:
    """One of two modules with the same interface."""
    try:
        from isal import isal_zlib
    except ImportError:  # no wheel for this machine
        import zlib

        return zlib
    return isal_zlib


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.zstd: _ZstdDecoder | None = None
        #: By their level.
        self.zstd_encoders: dict[int | None, ZstdCompressor] = {}


_per_thread = _PerThread()


def _zstd_compressor(level: int | None) -> ZstdCompressor:
    compressor = _per_thread.zstd_encoders.get(level)
    if compressor is None:
        import zstandard

        if level is None:
            parameters = zstandard.ZstdCompressionParameters(**_ZSTD_QUICK)
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
        else:
            compressor = zstandard.ZstdCompressor(level=level)
        _per_thread.zstd_encoders[level] = compressor
    return compressor
