"""For tests/fuzz: what it begins with, and changes that leave a tar a tar and JSON JSON, so that they get further."""

import contextlib
import json
import random

import atheris
import images
import test_hostile as hostile
from test_layers import BASE, CASES

LOWER = images.layer(BASE)  # in order; the odd ones lie on it
NAMES = "|.|..|d|d/f|s/x|etc|etc/deep/x|link/x|/mnt/v|/mnt/v/sub|../mnt/v/secret|.wh.etc|d/.wh.f|etc/.wh..wh..opq|.wh.."
NUMBERS = [b"0", b"1", b"7777", b"37777777777", b"-1", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"", b"x"]
FIELDS = [(156, 1, [bytes([kind]) for kind in b"01234567xgLKSMZ\0"])]  # of a header: place, length, values
FIELDS += [(place, length, NAMES.encode().split(b"|")) for place, length in ((0, 100), (157, 100), (345, 155))]
FIELDS += [(place, 8, NUMBERS) for place in (100, 108, 116, 329, 337)] + [(place, 12, NUMBERS) for place in (124, 136)]
VALUES = [*hostile.OTHER_VALUES, True, 0, 2**63, 1e999, "", "x" * 5000, [], {}, ["a\0"]]


def heads(tar):
    return [place for place in range(0, len(tar) - 511, 512) if tar[place + 257 : place + 262] == b"ustar"]


def mutate_tar(data, size, seed):
    pick, tar = random.Random(seed), bytearray(data)
    for _ in range(pick.randint(0, 4) if heads(tar) else 0):
        (head, other), (place, length, values) = pick.choices(heads(tar), k=2), pick.choice(FIELDS)
        tar[head + place : head + place + length] = pick.choice(values).ljust(length, b"\0")[:length]
        content = slice(head + 512, head + 1024)  # a pax header's, perhaps
        if pick.random() < 0.2:
            tar[content] = atheris.Mutate(bytes(tar[content]), 512).ljust(512, b"\0")
        elif pick.random() < 0.2:  # another entry goes before this one
            tar[head:head] = tar[other : other + 512 * pick.randint(1, 3)]
    for head in heads(tar):  # the checksums, or nothing else would count
        tar[head + 148 : head + 156] = b" " * 8
        tar[head + 148 : head + 156] = b"%06o\0 " % sum(tar[head : head + 512])
    return bytes(tar[:size]) if tar != data else atheris.Mutate(data, size)


def mutate_json(data, size, seed):
    pick = random.Random(seed)
    with contextlib.suppress(ValueError, IndexError, RecursionError):
        whole = json.loads(data[1:])
        whole = hostile.changed(whole, pick.choice(list(hostile.paths(whole))), pick.choice(VALUES))
        return data[:1] + json.dumps(whole).encode() if pick.random() < 0.9 else atheris.Mutate(data, size)
    return atheris.Mutate(data, size)


def tars(victim):
    """Those of the tests."""
    layers = [layer for layers in [*CASES.values(), *hostile.ESCAPES.values()] for layer in layers]
    found = [images.layer(hostile.aimed(layer, victim)) for layer in layers]
    found += [tar for tar in [*hostile.ODD.values(), *hostile.BLOBS.values()] if len(tar) < 1 << 14]
    return [tar.rstrip(b"\0") + bytes(1024 - len(tar.rstrip(b"\0")) % 512) for tar in found]


def documents(layout):
    """Those of the tests, after a letter that tells what they are."""
    return [kind[:1].encode() + json.dumps(make(layout)).encode() for kind, make in hostile.DOCUMENTS.items()]
