"""Name a block of tokens by its contents and everything before it.

A block's key is the digest of its parent's key and its own tokens, so two requests
share a key exactly as far as they share a prefix. Keys are the same in every process,
which lets a router compare prefixes with workers it only talks to. Knows no block pool.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

TOKEN_BYTES = array("i").itemsize
ROOT = b""
"""The parent of a first block."""


def row(tokens: Sequence[int]) -> array[int]:
    """Tokens side by side in memory, four bytes each; always a copy."""
    return array("i", tokens)


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, four each: what is hashed, and what a hit is verified against."""
    return (tokens if isinstance(tokens, array) and tokens.typecode == "i" else row(tokens)).tobytes()


def child_key(parent: bytes, contents: bytes) -> bytes:
    """The 16-byte key of a block with these `packed` tokens after the block called `parent`."""
    return blake2b(parent + contents, digest_size=16).digest()


def contents_of(tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """The packed tokens of each full block of `tokens`; a last block that is not full is left out."""
    contents, block_bytes = packed(tokens), block_tokens * TOKEN_BYTES
    ends = range(block_bytes, len(contents) + 1, block_bytes)
    return [contents[end - block_bytes : end] for end in ends]


def block_keys(tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of the full blocks of `tokens`; a last block that is not full has none."""
    keys: list[bytes] = []
    extend_keys(keys, contents_of(tokens, block_tokens))
    return keys


def extend_keys(keys: list[bytes], contents: Iterable[bytes]) -> None:
    """Add the keys of the blocks that follow those with `keys`, as `child_key` makes them."""
    parent = keys[-1] if keys else ROOT
    for of_block in contents:
        parent = blake2b(parent + of_block, digest_size=16).digest()
        keys.append(parent)
