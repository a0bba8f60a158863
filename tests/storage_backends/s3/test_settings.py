"""What options, addresses and waits mean. No server is asked."""

from __future__ import annotations

import pytest

from underlay.errors import OptionError, StorageError
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.location import locate
from underlay_storage.s3.multipart import Part, plan
from underlay_storage.s3.retrying import TransientError, UnreachedError
from underlay_storage.s3.settings import Settings

from .workloads import Waits

MIB = 1 << 20


@pytest.mark.parametrize(
    ("url", "bucket", "key"),
    [
        ("s3://bucket/disk", "bucket", "disk"),
        ("s3://bucket/a folder/disk?.qcow2#1", "bucket", "a folder/disk?.qcow2#1"),
        ("s3://bucket/a%20b", "bucket", "a%20b"),
        ("s3+blocks://bucket/prefix/", "bucket", "prefix"),
        ("https://host:8443/a%20b/c", "host:8443", "a b/c"),
    ],
)
def test_an_address_names_a_bucket_and_a_key(url: str, bucket: str, key: str) -> None:
    location = locate(url)
    assert (location.bucket, location.key) == (bucket, key)
    assert locate(str(location)) == location


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3:///key",
        "s3://key:secret@bucket/disk",
        "https://user:secret@host/disk",
        "https://host/disk?X-Amz-Signature=secret",
        "https://host/disk#secret",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/a\nb",
        "s3://a bucket/b",
        "https://h\u00f6st/b",
    ],
)
def test_an_address_that_names_nothing_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(OptionError) as caught:
        locate(url)
    assert "secret" not in str(caught.value)


def test_a_name_is_seen_from_the_folder_of_its_image() -> None:
    location = locate("s3://bucket/images/disk.qcow2")
    assert location.beside("base.raw") == "s3://bucket/images/base.raw"
    assert location.beside("../base.raw") == "s3://bucket/base.raw"
    assert location.beside("../../../base.raw") == "s3://bucket/base.raw"
    assert location.beside("/base.raw") == "s3://bucket/base.raw"
    assert location.beside("s3://other/base.raw") == "s3://other/base.raw"


def test_options_are_text_or_values() -> None:
    text = Settings.read(
        {"cache": "8M", "deadline": "5", "anonymous": "on", "path_style": "off", "parallel": "2"}
    )
    values = Settings.read(
        {"cache": 8 * MIB, "deadline": 5, "anonymous": True, "path_style": False, "parallel": 2}
    )
    assert text == values
    assert Settings.read({"region": None}) == Settings.read({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("colour", "red"),
        ("cache", "1"),
        ("cache", "much"),
        ("deadline", 0),
        ("deadline", 1.5),
        ("parallel", 1000),
        ("part_size", "4M"),
        ("block_size", 100_000),
        ("anonymous", "perhaps"),
        ("endpoint", "storage.test"),
        ("endpoint", 9000),
        ("endpoint", "http://key:secret@storage.test"),
        ("endpoint", "http://storage.test?a=b"),
        ("endpoint", "http://a storage"),
        ("session_token", "secret\n"),
        ("region", ""),
        ("access_key_id", "alone"),
    ],
)
def test_an_option_that_cannot_be_is_named(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        Settings.read({name: value})
    assert caught.value.option == name


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("s3", "block_size", "2M"),
        ("s3", "grace", "60"),
        ("gs", "access_key_id", "name"),
        ("gs", "region", "here"),
        ("az", "session_token", "secret"),
        ("az", "path_style", "off"),
        ("https", "access_key_id", "name"),
        ("https", "endpoint", "http://storage.test"),
        ("http", "single_writer", "on"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(scheme: str, name: str, value: str) -> None:
    pair = {"secret_access_key": "secret"} if name == "access_key_id" else {}
    location = locate(f"{scheme}://somewhere/disk")
    with pytest.raises(OptionError, match=f"{scheme}:// has no use for {name}") as caught:
        ObjectClient.connect(location, Settings.read({name: value, **pair}))
    assert caught.value.option == name
    assert value not in str(caught.value)


def test_secrets_do_not_show() -> None:
    given = {"access_key_id": "secret-1", "secret_access_key": "secret-2"}
    assert "secret-" not in repr(Settings.read({**given, "session_token": "secret-3"}))
    with pytest.raises(OptionError) as caught:
        Settings.read({**given, "session_token": ["secret-3"]})
    assert "secret-" not in str(caught.value)


# -- parts


def test_parts_cover_everything_and_only_the_last_is_small() -> None:
    for size in (5 * MIB + 1, 17 * MIB, 1 << 40, 5 << 40):
        parts = plan(size, part_size=5 * MIB)
        assert len(parts) <= 10_000
        end = 0
        for part in parts:
            assert part.start == end
            end += part.length
        assert end == size
        assert all(part.length >= 5 * MIB for part in parts[:-1])


def test_what_did_not_change_is_copied_in_large_parts() -> None:
    parts = plan(
        200 * MIB,
        part_size=16 * MIB,
        changed=[(100 * MIB, 1), (111 * MIB, 2 * MIB)],
        present=199 * MIB,
    )
    assert parts == [
        Part(0, 64 * MIB, copied=True),
        Part(64 * MIB, 32 * MIB, copied=True),
        Part(96 * MIB, 16 * MIB),
        Part(112 * MIB, 16 * MIB),
        Part(128 * MIB, 64 * MIB, copied=True),
        Part(192 * MIB, 8 * MIB),  # the present object is shorter
    ]


# -- waits


def failing() -> None:
    raise TransientError("it rains")


def test_o1_waits_grow_and_are_random_and_end_before_the_deadline() -> None:
    least, most = Waits(), Waits()
    for clock, chance in ((least, 0.0), (most, 1.0)):
        with pytest.raises(StorageError, match=r"Could not go out: it rains \(tried \d+ times"):
            clock.retrying(chance).run(failing, doing="go out")
        assert clock.waits == sorted(clock.waits)
        assert clock.waits[5] > 10 * clock.waits[0]
        assert 15 < clock.now - 100 < 30
    assert least.waits[0] == most.waits[0] / 2 == 0.05
    assert max(most.waits) == 5


def test_a_server_that_was_never_there_is_not_waited_for_as_long() -> None:
    clock = Waits()

    def unreached() -> None:
        raise UnreachedError("nobody listens")

    with pytest.raises(StorageError, match="nobody listens"):
        clock.retrying(1.0).run(unreached, doing="go out")
    assert 2 < clock.now - 100 < 4


def test_a_single_fault_is_recovered_from_however_long_it_took() -> None:
    clock = Waits()
    attempts = iter([100, 0])

    def attempt() -> str:
        took = next(attempts)
        clock.now += took
        if took:
            raise TransientError("too slow")
        return "done"

    assert clock.retrying(0.5).run(attempt, doing="wait") == "done"
