"""The client against a real server: what each request gives, and which error says what."""

from __future__ import annotations

from underlay_storage.s3.client import ObjectClient


def test_a_range_comes_with_the_facts_of_the_object(client: ObjectClient, prefix: str) -> None:
    etag = client.put(f"{prefix}/a", bytes(range(100)), write_id="one")
    got = client.get(f"{prefix}/a", 90, 50)
    assert bytes(got.data) == bytes(range(90, 100))
    assert (got.facts.size, got.facts.etag, got.facts.write_id) == (100, etag, "one")
    assert client.head(f"{prefix}/a") == got.facts
