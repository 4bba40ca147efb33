"""Seeds that depend on what they are for, not on the process or the platform."""

from __future__ import annotations

import hashlib


def seed_from(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` alone, not on the process or the platform."""
    text = "\x1f".join(str(part) for part in parts).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
