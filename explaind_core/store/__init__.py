"""A run on disk: layout, checksums, locks, compression. It knows bytes, not what they mean.

It may import errors, naming, progress, tensors, trees, data and rules.
"""

from __future__ import annotations

from explaind_core.store.compression import pack, unpack
from explaind_core.store.integrity import damages
from explaind_core.store.json_schema import COUNT, STEP, mismatch
from explaind_core.store.locations import locate, write_error
from explaind_core.store.run_store import FORMAT, RunStore
from explaind_core.store.scratch import WorkingFolder
from explaind_core.store.size import StoreSize, check_space, store_size
from explaind_core.store.store_files import MANIFEST_NAME, VERSION, StoredFile, StoreFiles
from explaind_core.store.tensor_file import DTYPES
from explaind_core.store.write_queue import WriteQueue, settle

__all__ = [
    "COUNT",
    "DTYPES",
    "FORMAT",
    "MANIFEST_NAME",
    "STEP",
    "VERSION",
    "RunStore",
    "StoreFiles",
    "StoreSize",
    "StoredFile",
    "WorkingFolder",
    "WriteQueue",
    "check_space",
    "damages",
    "locate",
    "mismatch",
    "pack",
    "settle",
    "store_size",
    "unpack",
    "write_error",
]
