"""Files of records: JSON, text, CSV and parquet, plain or compressed, on disk or behind URLs, read part by part.

`find_records` turns the `scheme:rest` of a source into the records of its splits. Nothing is read whole: memory is
bounded by a few blocks, whatever the size of the files.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.data.formats.base import Found, ListRecords, Numbering, Part, Record, Records, Where
    from jaxcl.data.formats.find import SCHEMES, find_records
    from jaxcl.data.formats.storage import is_url

__all__ = [
    "SCHEMES",
    "Found",
    "ListRecords",
    "Numbering",
    "Part",
    "Record",
    "Records",
    "Where",
    "find_records",
    "is_url",
]
