"""A reader of GGUF files and of their blocks, written from the format's description."""

import struct
from pathlib import Path

import numpy as np


def gguf_of(path):
    """Type, shape and bytes of each tensor, as the format's description has them."""
    data, at = Path(path).read_bytes(), 0

    def take(form):
        nonlocal at
        found = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found[0] if len(found) == 1 else found

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind):
        forms = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return take(forms[kind])

    assert data[:4] == b"GGUF"
    at = 4
    version, tensors, pairs = take("I"), take("Q"), take("Q")
    assert version == 3
    known = {}
    for _ in range(pairs):
        name = text()
        known[name] = value(take("I"))
    infos = {}
    for _ in range(tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        infos[name] = shape, take("I"), take("Q")
    start = -(-at // 32) * 32
    sizes = {0: (1, 4), 2: (32, 18), 8: (32, 34), 10: (256, 84), 35: (256, 66), 41: (128, 18), 42: (64, 18)}
    found = {}
    for name, (shape, kind, offset) in infos.items():
        size, count = sizes[kind]
        length = int(np.prod(shape)) // size * count
        raw = np.frombuffer(data, np.uint8, length, start + offset)
        found[name] = DECODERS[kind](raw.reshape(-1, count)).reshape(shape)
    return known, found


def half(raw):
    return raw.copy().view(np.float16).astype(np.float32)


def pairs_of(raw, steps):
    """2-bit codes of which ``steps`` lie in one byte, 32 bytes at a time."""
    parts = raw.reshape(len(raw), -1, 1, 32)
    return (
        np.concatenate([(parts >> 2 * i) & 3 for i in range(steps)], 2).reshape(len(raw), -1).astype(np.float32)
    )


def two_bits(raw):
    return np.stack([(raw >> 2 * i) & 3 for i in range(4)], -1).reshape(len(raw), -1).astype(np.float32)


def k_quant(b):
    scale, least = (np.repeat(part.astype(np.float32), 16, 1) for part in (b[:, :16] & 15, b[:, :16] >> 4))
    return half(b[:, 80:82]) * scale * pairs_of(b[:, 16:80], 4) - half(b[:, 82:]) * least


DECODERS = {
    0: lambda b: b.copy().view(np.float32),
    2: lambda b: half(b[:, :2]) * (np.concatenate([b[:, 2:] & 15, b[:, 2:] >> 4], 1).astype(np.float32) - 8),
    8: lambda b: half(b[:, :2]) * b[:, 2:].copy().view(np.int8),
    10: k_quant,
    35: lambda b: half(b[:, 64:]) * (pairs_of(b[:, :64], 4) - 1),
    41: lambda b: half(b[:, :2]) * (np.unpackbits(b[:, 2:], 1, bitorder="little") * 2.0 - 1).astype(np.float32),
    42: lambda b: half(b[:, :2]) * (two_bits(b[:, 2:]) - 1),
}
