"""Why what becomes of some hostile images is not what QEMU makes of them.

``test_verdicts`` holds us to this: each difference has a reason here, and each reason a difference.
"""

from __future__ import annotations

import attrs

__all__ = ["REASONS", "Reason"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@attrs.frozen(kw_only=True)
class Reason:
    """One way to differ, and for which recipes."""

    #: What the table calls it.
    name: str
    theirs: str
    ours: str
    why: str
    #: Which parts of a verdict it may make differ.
    aspects: tuple[str, ...] = attrs.field(converter=_words)
    #: The names of the recipes; with each of them it does.
    recipes: tuple[str, ...] = attrs.field(converter=_words)


REASONS = (
    Reason(
        name="alone",
        theirs="checks an image with all that it names open, and cannot without; one that lies "
        "upon itself is opened until there are no more files to open",
        ours="checks the image alone",
        why="nothing else can make its tables sound or not",
        aspects="check",
        recipes="data-file-nameless data-file-missing data-file-json "
        "backing-missing backing-control backing-not-utf-8 backing-parent backing-nbd "
        "backing-nbd-unix backing-http backing-fat backing-itself backing-format-unknown",
    ),
    Reason(
        name="bitmaps",
        theirs="refuses the image",
        ours="reads the disk, and says that the bitmaps are lost; a writer clears the bit that "
        "says that they are valid, or stops where they lie upon other metadata",
        why="no byte of the disk depends on its bitmaps",
        aspects="info read check write",
        recipes="bitmaps-23-bytes bitmaps-none bitmaps-65536 bitmaps-reserved bitmaps-unaligned "
        "bitmaps-2-40 bitmaps-past-end bitmaps-in-refcounts bitmap-granularity-64 "
        "bitmap-type-9 bitmap-name-65535 bitmap-table-2-32 bitmap-reserved-flag "
        "bitmap-table-in-header",
    ),
    Reason(
        name="cut",
        theirs="reads what a file does not have as zeroes, and inflates them",
        ours="an error; half a cluster of plain data is the exception: its rest reads as zeroes",
        why="what is lost shall not look like data",
        aspects="read write",
        recipes="l1-entry-past-the-end l1-entry-near-2-56 l2-entry-past-the-end "
        "l2-entry-near-2-56 extended-past-the-end extended-one-past-the-end cut-before-data "
        "cut-in-compressed-data cut-before-l2-table cut-in-l2-table",
    ),
    Reason(
        name="encrypted",
        theirs="tells of the image as if all was well with it, or crashes",
        ours="says that it is encrypted",
        why="nothing here reads encrypted images",
        aspects="info",
        recipes="crypt-luks crypt-aes",
    ),
    Reason(
        name="gate",
        theirs="opens what the image names, and shows it to whoever reads the disk; a data file "
        "is written to as well",
        ours="asks the gate, which here allows the image's own folder",
        why="whoever made the image chose the name",
        aspects="read write",
        recipes="data-file-absolute backing-absolute backing-device backing-json backing-file-url",
    ),
    Reason(
        name="header",
        theirs="takes the first of two answers, reads on where the header says that it ends, "
        "reads a name from among its fields, or lets a field pass that contradicts another",
        ours="refuses the image",
        why="two readers of such a header see two images",
        aspects="info read check write",
        recipes="raw-data-bit header-length-105 extensions-without-end extension-twice "
        "backing-in-header",
    ),
    Reason(
        name="l1-table",
        theirs="reads a table that the file does not have as zeroes: a disk without data",
        ours="refuses the image",
        why="a lost disk is not an empty one",
        aspects="info read write",
        recipes="l1-size-32m l1-at-0 l1-past-end",
    ),
    Reason(
        name="marked",
        theirs="fails to write, and says nothing to the next reader",
        ours="marks the image as corrupt too",
        why="it is, and somebody should look at it",
        aspects="write",
        recipes="extended-compressed-with-bitmap compressed-past-the-end compressed-in-the-header "
        "compressed-beyond-2-56",
    ),
    Reason(
        name="metadata",
        theirs="shows the image's own tables as data, or takes one for another; a write to what "
        "it takes for an L2 table ends in an assertion that fails",
        ours="an error; in a refcount block and in the entry's own table a read does not see it, "
        "and a write stops",
        why="a table in the place of data is no data",
        aspects="read write",
        recipes="data-file-itself l1-entry-header l1-entry-l1-table l1-entry-refcount-table "
        "l1-entry-refcount-block l2-entry-header l2-entry-l1-table l2-entry-refcount-table",
    ),
    Reason(
        name="nul",
        theirs="cuts the name off at its NUL byte, and opens what is left",
        ours="refuses the image",
        why="whoever checked the name before saw another one",
        aspects="info read check write",
        recipes="data-file-nul backing-nul",
    ),
    Reason(
        name="overlap",
        theirs="notices a write to its own tables at the last moment, and marks the image",
        ours="refuses to open it for writing, and leaves every byte as it was",
        why="the header alone shows it",
        aspects="write",
        recipes="reftable-at-0 reftable-past-end",
    ),
    Reason(
        name="probing",
        theirs="finds the format of the backing file out",
        ours="an error that says so",
        why="the guest of a raw backing image could choose it, and through it a file",
        aspects="read write",
        recipes="backing-format-absent",
    ),
    Reason(
        name="repairable",
        theirs="believes what it should not, and stops at a write to what it takes for metadata",
        ours="never takes offset 0 for free or for a directory, and goes on",
        why="the lie leaves no doubt of what is true",
        aspects="write",
        recipes="bitmaps-bit header-free",
    ),
    Reason(
        name="reserved",
        theirs="ignores bits that have no meaning yet",
        ours="an error for what they belong to; a refcount table with one is read, not written",
        why="they would mean something else to whoever set them",
        aspects="read write",
        recipes="l1-entry-reserved-0 l1-entry-reserved-8 l1-entry-reserved-56 "
        "l1-entry-reserved-62 l2-entry-reserved-1 l2-entry-reserved-8 l2-entry-reserved-56 "
        "l2-entry-reserved-61 l2-entry-reserved-alone extended-zero-flag block-reserved",
    ),
    Reason(
        name="snapshots",
        theirs="refuses the image",
        ours="reads the disk, and not its snapshots; a writer stops, as it cannot know what "
        "they hold",
        why="no byte of the disk depends on its snapshots",
        aspects="info read write",
        recipes="snapshot-id-65535 snapshot-name-65535 snapshot-extra-2-32 snapshot-extra-1025",
    ),
    Reason(
        name="stops",
        theirs="writes on, over tables that are contradicted: into clusters that others have too, "
        "that a snapshot holds, or that its counts call free",
        ours="a writer stops at the contradiction",
        why="a write that is refused can be made again; one that went over other data cannot",
        aspects="write",
        recipes="snapshots-at-0 snapshots-past-end l2-table-shared l2-entry-host-not-guest "
        "compressed-into-the-next-cluster block-shared data-free shared-data-counts-once "
        "snapshot-l1-unaligned snapshot-l1-past-the-end snapshot-table-is-l1-table "
        "snapshot-l1-is-active-l1 snapshot-l1-is-refcount-table",
    ),
    Reason(
        name="unchecked",
        theirs="tells, of an image whose refcount table has no cluster, a corruption",
        ours="tells that it cannot be checked, as of any image whose header is refused",
        why="nothing was checked",
        aspects="check",
        recipes="reftable-clusters-0",
    ),
)
