"""A run on disk: layout, checksums, locks, compression. It knows bytes, not what they mean.

It may import errors, naming, progress, tensors, trees, data and rules.
"""

from __future__ import annotations

from explaind_core.store.compression import pack, unpack
from explaind_core.store.durable import sync, sync_folders
from explaind_core.store.folder_contents import exists, is_folder, names_in, size_of
from explaind_core.store.integrity import damages
from explaind_core.store.json_files import MANIFEST_NAME, VERSION
from explaind_core.store.json_schema import COUNT, STEP, mismatch
from explaind_core.store.locations import (
    UNFINISHED,
    is_local,
    locate,
    read_bytes,
    reason,
    remove_unfinished,
    replace,
    write_error,
)
from explaind_core.store.readable_size import parse_size, readable_size
from explaind_core.store.run_store import FORMAT, LOG_NAME, RunStore
from explaind_core.store.scratch import WorkingFolder
from explaind_core.store.size import StoreSize, check_space, store_size
from explaind_core.store.store_files import StoredFile, StoreFiles
from explaind_core.store.tensor_file import DTYPES
from explaind_core.store.write_queue import WriteQueue, settle
from explaind_core.store.writing_lock import LockWords, WritingLock

__all__ = [
    "COUNT",
    "DTYPES",
    "FORMAT",
    "LOG_NAME",
    "MANIFEST_NAME",
    "STEP",
    "UNFINISHED",
    "VERSION",
    "LockWords",
    "RunStore",
    "StoreFiles",
    "StoreSize",
    "StoredFile",
    "WorkingFolder",
    "WriteQueue",
    "WritingLock",
    "check_space",
    "damages",
    "exists",
    "is_folder",
    "is_local",
    "locate",
    "mismatch",
    "names_in",
    "pack",
    "parse_size",
    "read_bytes",
    "readable_size",
    "reason",
    "remove_unfinished",
    "replace",
    "settle",
    "size_of",
    "store_size",
    "sync",
    "sync_folders",
    "unpack",
    "write_error",
]
