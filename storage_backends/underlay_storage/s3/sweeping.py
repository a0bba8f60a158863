"""What a writer leaves whose process was killed: uploads that nobody will end, and probes.

Nobody sees their parts, and the bucket pays for them. Whoever still uploads sends a part now and
then, so an upload that has got none for as long as the grace period is given up.
"""

from __future__ import annotations

from underlay.errors import UnsupportedOperationError
from underlay.maintenance import Collected
from underlay.steps import Steps, StepsCallback
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import probe_folder
from underlay_storage.s3.requesting import UploadLostError
from underlay_storage.s3.uploads import Begun

__all__ = ["is_over", "sweep"]


def sweep(
    client: ObjectClient,
    key: str,
    *,
    grace: float,
    dry_run: bool = False,
    progress: StepsCallback | None = None,
) -> Collected:
    """See ``Sweepable.sweep``."""
    if not client.location.speaks_s3:
        raise UnsupportedOperationError(
            f"'{client.location.at(key)}': only s3:// tells of uploads that were not ended; "
            "a lifecycle rule of the bucket may clear them away, and Azure does so after a week"
        )
    probes = probe_folder(key)
    now, begun = client.request(
        lambda: client.uploads.begun(key), doing="look for uploads of", key=key
    )
    begun = [one for one in begun if one.key == key or one.key.startswith(f"{probes}/")]
    tried = list(client.listing(probes))
    steps = Steps(progress, len(begun) + len(tried))
    removed: list[int] = []
    waiting = 0
    for upload in begun:
        parts = _parts(client, upload)
        if parts is None:
            pass  # it has ended meanwhile
        elif is_over(max([upload.since, *(since for _, since in parts)]), now, grace):
            removed.append(sum(size for size, _ in parts))
            if not dry_run:
                _abort(client, upload)
        else:
            waiting += 1
        steps.did()
    for probe in tried:
        if is_over(probe.modified, now, grace):
            removed.append(probe.size)
            if not dry_run:
                client.delete([probe.key])
        else:
            waiting += 1
        steps.did()
    steps.end()
    return Collected(removed=len(removed), removed_bytes=sum(removed), waiting=waiting, writers=0)


def is_over(since: float, now: float, grace: float) -> bool:
    """Whether what nobody has needed ``since`` then may go: seconds, by the server's clock."""
    return not grace or now - since > grace


def _parts(client: ObjectClient, upload: Begun) -> list[tuple[int, float]] | None:
    try:
        return client.request(
            lambda: client.uploads.parts(upload.key, upload.upload),
            doing="look at an upload of",
            key=upload.key,
        )
    except UploadLostError:
        return None


def _abort(client: ObjectClient, upload: Begun) -> None:
    try:
        client.request(
            lambda: client.uploads.abort(upload.key, upload.upload),
            doing="end an upload of",
            key=upload.key,
        )
    except UploadLostError:
        return
