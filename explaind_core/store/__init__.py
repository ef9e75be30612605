"""A run on disk: layout, checksums, locks, compression. It knows bytes, not what they mean.

It may import errors, naming, progress, tensors, trees, data and rules.
"""

from __future__ import annotations

from explaind_core.store.compression import pack, unpack
from explaind_core.store.digest import digest
from explaind_core.store.durable import sync, sync_folders
from explaind_core.store.folder_contents import everything_below, exists, is_folder, names_in, size_of
from explaind_core.store.guarded_files import check_tree
from explaind_core.store.integrity import damages
from explaind_core.store.json_files import MANIFEST_NAME, VERSION
from explaind_core.store.json_schema import (
    ANY_NUMBER,
    COUNT,
    JSON,
    NUMBER,
    POSITIVE,
    Every,
    OneOf,
    Only,
    check_json,
    mismatch,
)
from explaind_core.store.locations import (
    LONGEST_JSON,
    UNFINISHED,
    is_local,
    locate,
    opened,
    read_bytes,
    reason,
    remove_unfinished,
    replace,
    write_error,
)
from explaind_core.store.readable_size import parse_size, readable_size
from explaind_core.store.run_schema import BATCH, LINE, SNAPSHOT, START, step_pattern
from explaind_core.store.run_store import FORMAT, LOG_NAME, RunStore
from explaind_core.store.scratch import WorkingFolder
from explaind_core.store.size import StoreSize, check_space, store_size
from explaind_core.store.store_files import StoredFile, StoreFiles
from explaind_core.store.tensor_file import DTYPES
from explaind_core.store.write_queue import WriteQueue, settle
from explaind_core.store.writing_lock import LockWords, WritingLock

__all__ = [
    "ANY_NUMBER",
    "BATCH",
    "COUNT",
    "DTYPES",
    "FORMAT",
    "JSON",
    "LINE",
    "LOG_NAME",
    "LONGEST_JSON",
    "MANIFEST_NAME",
    "NUMBER",
    "POSITIVE",
    "SNAPSHOT",
    "START",
    "UNFINISHED",
    "VERSION",
    "Every",
    "LockWords",
    "OneOf",
    "Only",
    "RunStore",
    "StoreFiles",
    "StoreSize",
    "StoredFile",
    "WorkingFolder",
    "WriteQueue",
    "WritingLock",
    "check_json",
    "check_space",
    "check_tree",
    "damages",
    "digest",
    "everything_below",
    "exists",
    "is_folder",
    "is_local",
    "locate",
    "mismatch",
    "names_in",
    "opened",
    "pack",
    "parse_size",
    "read_bytes",
    "readable_size",
    "reason",
    "remove_unfinished",
    "replace",
    "settle",
    "size_of",
    "step_pattern",
    "store_size",
    "sync",
    "sync_folders",
    "unpack",
    "write_error",
]
