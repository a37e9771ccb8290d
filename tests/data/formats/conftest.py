import uuid

import pytest

from jaxcl.data.formats import find_records


def read(records):
    """Everything that some records hold: places as text, and records."""
    return [(str(where), dict(record)) for part in records.parts() for where, record in records.read(part)]


def read_all(scheme, place):
    found = find_records(scheme, str(place), text_field="text")
    assert list(found.splits) == ["all"]
    return read(found.splits["all"])


@pytest.fixture
def rows():
    """Reads a source of one split: its records."""
    return lambda scheme, place: [record for _, record in read_all(scheme, place)]


@pytest.fixture
def placed():
    """Reads a source of one split: its records with their places, without the folder."""
    return lambda scheme, place: [
        (where.replace("\\", "/").rpartition("/")[2], record) for where, record in read_all(scheme, place)
    ]


@pytest.fixture
def memory():
    """A folder of its own in fsspec's file system in memory, as a URL."""
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    system, inner = fsspec.core.url_to_fs(url)
    if system.exists(inner):
        system.rm(inner, recursive=True)
