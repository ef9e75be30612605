"""How large a chunk will be when it is unpacked, from its file alone.

A chunk is one frame of Zstandard (RFC 8878) with a CRC-32C behind it. Its decoder asks for as much memory as all frames
of a file declare, before a byte is compared: a file of some kilobytes could ask for gigabytes.
"""

from __future__ import annotations

from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

__all__ = ["frame_fault", "text_fault"]

_MAGIC = b"\x28\xb5\x2f\xfd"
_CRC = 4
#: By the flags in a frame's header: the bytes of the window, of the dictionary's name and of the content's size.
_DICTIONARY, _SIZE = (0, 1, 2, 4), (0, 2, 4, 8)
_RLE, _RESERVED = 1, 3


def frame_fault(content: bytes, *, expected: int | None, most: int) -> str | None:
    """Why a chunk's file must not be unpacked.

    Args:
        content: of the file.
        expected: how many bytes must come out; None where that is not known.
        most: how many may come out then.

    Returns:
        What is wrong, in words; None if it is one frame that declares what it must.

    Example:
        >>> from numcodecs.zstd import Zstd
        >>> chunk = Zstd().encode(bytes(100)) + bytes(4)
        >>> frame_fault(chunk, expected=100, most=0), frame_fault(chunk, expected=99, most=0)
        (None, 'it unpacks to 100 bytes where 99 were expected')
        >>> frame_fault(chunk + chunk, expected=100, most=0)
        'it is no single frame of Zstandard with a checksum behind it'
    """
    try:
        size, end = _frame(content)
    except (IndexError, ValueError):
        size, end = 0, -1
    if end != len(content) - _CRC:
        return "it is no single frame of Zstandard with a checksum behind it"
    if size != expected if expected is not None else size > most:
        return f"it unpacks to {size} bytes where {f'at most {most}' if expected is None else expected} were expected"
    return None


def text_fault(content: bytes, count: int) -> str | None:
    """Why a chunk of texts must not be read: its decoder makes as many as the chunk says before it looks for them.

    Args:
        content: of a file of which :func:`frame_fault` found nothing.
        count: how many texts there must be.

    Returns:
        What is wrong, in words; None if it says that it holds so many.
    """
    try:
        plain = bytes(Zstd().decode(content[:-_CRC]))
    except (RuntimeError, ValueError) as error:
        return str(error)
    said = int.from_bytes(plain[:4], "little")
    return None if len(plain) >= 4 and said == count else f"it holds {said} texts where {count} were expected"


def _frame(content: bytes) -> tuple[int, int]:
    """The size that the first frame declares, and the byte behind it."""
    if content[:4] != _MAGIC:
        raise ValueError
    flags = content[4]
    single, checked = bool(flags & 0x20), bool(flags & 0x04)
    position = 5 + (not single) + _DICTIONARY[flags & 3]
    length = _SIZE[flags >> 6] or (1 if single else 0)
    if not length:
        raise ValueError  # it does not say how large it is
    size = int.from_bytes(content[position : position + length], "little") + (256 if length == 2 else 0)
    position += length
    last = False
    while not last:
        if position + 3 > len(content):
            raise ValueError
        block = int.from_bytes(content[position : position + 3], "little")
        last, kind = bool(block & 1), (block >> 1) & 3
        if kind == _RESERVED:
            raise ValueError
        position += 3 + (1 if kind == _RLE else block >> 3)
    return size, position + (4 if checked else 0)
