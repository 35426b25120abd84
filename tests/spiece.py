"""Writes T5's vocabulary as a spiece.model, put together from the tokenizer.json that ComfyUI brings."""

import base64
import json
import struct
from pathlib import Path

UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
KINDS = {0: CONTROL, 1: CONTROL, 2: UNKNOWN}
PIECES = 32000  # the rest of tokenizer.json are the extra ids of T5's training


def field(number, value):
    """One protobuf field: int as varint, float as 32 bits, bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number):
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def write_spiece(tokenizer_json: Path, path: Path) -> None:
    """Field numbers as in sentencepiece_model.proto."""
    source = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    normalizer = source["normalizer"]
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = next(step["precompiled_charsmap"] for step in steps if "precompiled_charsmap" in step)
    parts = []
    for index, (piece, score) in enumerate(source["model"]["vocab"][:PIECES]):
        entry = field(1, piece.encode()) + field(2, float(score)) + field(3, KINDS.get(index, NORMAL))
        parts.append(field(1, entry))
    special_ids = field(40, 2) + field(41, -1) + field(42, 1) + field(43, 0)  # unknown, begin, end, pad
    parts.append(field(2, field(3, UNIGRAM) + special_ids))
    parts.append(field(3, field(2, base64.b64decode(charsmap))))
    path.write_bytes(b"".join(parts))
