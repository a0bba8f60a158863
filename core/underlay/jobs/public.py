"""The public names of ``underlay.jobs``; the package has them from here (see ``underlay.lazy``)."""

from underlay.jobs.amend import amend, amend_options
from underlay.jobs.bench import BenchResult, bench
from underlay.jobs.bitmap import (
    DirtyRange,
    add_bitmap,
    bitmaps,
    clear_bitmap,
    dirty_ranges,
    disable_bitmap,
    enable_bitmap,
    merge_bitmap,
    remove_bitmap,
)
from underlay.jobs.check import check, repair
from underlay.jobs.commit import Committed, commit
from underlay.jobs.compare import ComparisonResult, Difference, compare
from underlay.jobs.convert import convert
from underlay.jobs.copying import Copied
from underlay.jobs.create import create
from underlay.jobs.dd import DdResult, dd
from underlay.jobs.digest import Digest, digest
from underlay.jobs.info import image_info_json, info
from underlay.jobs.many import Conversion, convert_many
from underlay.jobs.map import MapEntry, map_image
from underlay.jobs.measure import measure
from underlay.jobs.picture import Picture, picture
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.rebase import Rebased, rebase
from underlay.jobs.resize import Resized, resize
from underlay.jobs.salvage import SalvageCallback, Unreadable
from underlay.jobs.snapshot import apply_snapshot, create_snapshot, delete_snapshot, snapshots
from underlay.jobs.storage import StorageInfo, check_storage, collect_storage, storage_info

__all__ = [
    "BenchResult",
    "Committed",
    "ComparisonResult",
    "Conversion",
    "Copied",
    "DdResult",
    "Difference",
    "Digest",
    "DirtyRange",
    "MapEntry",
    "Picture",
    "Progress",
    "ProgressCallback",
    "Rebased",
    "Resized",
    "SalvageCallback",
    "StorageInfo",
    "Unreadable",
    "add_bitmap",
    "amend",
    "amend_options",
    "apply_snapshot",
    "bench",
    "bitmaps",
    "check",
    "check_storage",
    "clear_bitmap",
    "collect_storage",
    "commit",
    "compare",
    "convert",
    "convert_many",
    "create",
    "create_snapshot",
    "dd",
    "delete_snapshot",
    "digest",
    "dirty_ranges",
    "disable_bitmap",
    "enable_bitmap",
    "image_info_json",
    "info",
    "map_image",
    "measure",
    "merge_bitmap",
    "picture",
    "rebase",
    "remove_bitmap",
    "repair",
    "resize",
    "snapshots",
    "storage_info",
]
