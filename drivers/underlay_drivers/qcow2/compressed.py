"""Encoding clusters, and decoding them whatever their streams claim. Pure and thread-safe.

Nothing is allocated by a size that a stream declares: output is bounded by the cluster, and zstd's
window by what every decoder has to offer.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Final

from underlay.errors import CorruptImageError

if TYPE_CHECKING:
    from zstandard import ZstdCompressor, ZstdDecompressor

__all__ = ["compress", "decompress"]

#: RFC 8878, 3.1.1.1.2: what a decoder should support, and more than a cluster.
_WINDOW_MAX: Final = 8 << 20
#: Raw deflate. QEMU writes with a 4 KiB window; reading takes any.
_RAW_DEFLATE: Final = -15
#: Raw deflate with the window that every reader of qcow2 has.
_RAW_DEFLATE_4K: Final = -12
_DEFLATED: Final = 8
#: isal's best; much faster than zlib's default, which it equals.
_ISAL_LEVEL: Final = 2


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


def _decompress_zstd(raw: memoryview, out: memoryview) -> str | None:
    import zstandard

    try:
        declared = zstandard.get_frame_parameters(raw).content_size
        # What a frame declares is allocated for it, so that has to be looked at first.
        if declared not in (len(out), zstandard.CONTENTSIZE_UNKNOWN):
            return f"its zstd frame holds {declared} bytes, not {len(out)}"
        # One whole frame, and an error if it holds more; what follows it belongs to other clusters.
        data = _zstd_decompressor().decompress(raw, max_output_size=len(out))
    except zstandard.ZstdError as error:
        return f"bad zstd frame ({error})"
    if len(data) != len(out):
        return f"its zstd frame ends after {len(data)} of {len(out)} bytes"
    out[:] = data
    return None


def compress(compression_type: int, data: memoryview) -> bytes | None:
    """The encoded form of a cluster, or None where that would not be smaller."""
    if compression_type == 0:
        module = _deflate_module()
        level = -1 if module.__name__ == "zlib" else _ISAL_LEVEL
        stream = module.compressobj(level, _DEFLATED, _RAW_DEFLATE_4K)
        encoded: bytes = stream.compress(data) + stream.flush()
    else:
        encoded = _zstd_compressor().compress(data)
    return encoded if len(encoded) < len(data) else None


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
    zstd: ZstdDecompressor | None = None
    zstd_encoder: ZstdCompressor | None = None


_per_thread = _PerThread()


def _zstd_decompressor() -> ZstdDecompressor:
    """One a thread: they are dear to make, and must not be shared."""
    decompressor = _per_thread.zstd
    if decompressor is None:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
        _per_thread.zstd = decompressor
    return decompressor


def _zstd_compressor() -> ZstdCompressor:
    compressor = _per_thread.zstd_encoder
    if compressor is None:
        import zstandard

        compressor = zstandard.ZstdCompressor()
        _per_thread.zstd_encoder = compressor
    return compressor
