"""Token files as older versions wrote them."""

import hashlib
import json
from pathlib import Path

from longnet_dist.data.token_file import PREAMBLE


def without_edges(path: Path, old: Path) -> Path:
    """Write ``old``, the token file ``path`` without the edges of documents, and return it."""
    data = path.read_bytes()
    magic, version, size, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    header = json.loads(data[PREAMBLE.size : PREAMBLE.size + size])
    count = header.pop("edges")["count"]
    text = json.dumps(header).encode().ljust(size)
    preamble = PREAMBLE.pack(magic, version, size, hashlib.sha256(text).digest())
    old.write_bytes(preamble + text + data[PREAMBLE.size + size : len(data) - 8 * count])
    return old
