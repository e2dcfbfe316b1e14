"""Damage to files, made systematically: what a reader must refuse by name, or read to the same values."""

import copy
import dataclasses
import itertools
import json
import math
import struct

import numpy as np

DEEP = "<deep>"
NEST = '{"a":' * 5000 + "1" + "}" * 5000
VALUES = (None, math.nan, math.inf, -math.inf, -1, 0, 10**30, -0.5, 1.5, 10**400, True, "x", "", "1", [], [1], [None], {},
          {"x": 1}, {"0": None}, DEEP)  # fmt: skip


def _places(data, at=()):
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        yield (*at, key)
        yield from _places(value, (*at, key))


def damaged_json(text, every=1, start=0):
    """(what was done, the text) of every entry replaced by every value, left out, or there twice; each `every`-th of them."""
    data = json.loads(text)
    cases = [((), value) for value in VALUES] + [
        ((*at,), value) for at in _places(data) for value in (*VALUES, "<out>", "<twice>")
    ]
    for at, value in cases[start::every]:
        changed = copy.deepcopy(data)
        if not at:
            changed = value
        else:
            node = changed
            for key in at[:-1]:
                node = node[key]
            if value == "<out>":
                del node[at[-1]]
            elif value == "<twice>":
                if not isinstance(node, dict):
                    continue
                node["<twice>"] = node[at[-1]]
            else:
                node[at[-1]] = value
        said = json.dumps(changed).replace(json.dumps(DEEP), NEST)
        if at and value == "<twice>":
            said = said.replace('"<twice>"', json.dumps(at[-1]))
        yield f"{'.'.join(map(str, at))} = {str(value)[:40]}", said.encode()
    for cut in range(0, len(text), max(1, len(text) // 7 * every)):
        yield f"cut to {cut} bytes", text[:cut].encode()
    yield "not UTF-8", b"\xff" + text.encode()
    yield "zeros", bytes(len(text))


def damaged_safetensors(data, every=1):
    """The same for the header of a safetensors file, and its other bytes cut off or too many."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length].decode(), data[8 + length :]
    for what, changed in damaged_json(header, every):
        yield what, struct.pack("<Q", len(changed)) + changed + rest
    entries = [k for k in json.loads(header) if k != "__metadata__"]
    for one, other in list(itertools.pairwise(entries))[:1]:
        changed = json.loads(header)
        changed[one]["data_offsets"] = changed[other]["data_offsets"]
        changed = json.dumps(changed).encode()
        yield f"{one} overlaps {other}", struct.pack("<Q", len(changed)) + changed + rest
    yield "bytes left over", data + b"\0" * 8
    for size in (0, length - 1, 2**40, 2**63):
        yield f"a header of {size} bytes", struct.pack("<Q", size) + data[8:]
    yield from cut(data, 9)


def cut(data, parts=9):
    """A file of bytes cut at several lengths."""
    for n in sorted({0, 1, 7, 8, 9, *(len(data) * k // parts for k in range(1, parts)), len(data) - 1}):
        if n < len(data):
            yield f"cut to {n} bytes", data[:n]


def flipped(data, count=40, seed=0):
    """A file of bytes with one of them changed."""
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(data), count):
        yield f"byte {at} changed", data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]


def check(file, variants, read, sound, named=None):
    """Every variant of a file is refused with an error that names it (or its folder, `named`), or is read to what is sound.

    Returns how many were refused. The file is put back.
    """
    whole, refused, wrong = file.read_bytes(), 0, []
    try:
        for what, changed in variants:
            file.write_bytes(changed)
            try:
                found = read()
            except (ValueError, OSError) as error:
                refused += 1
                if str(named or file.parent) not in str(error):
                    wrong.append(f"{what}: the error does not name the file: {str(error)[:200]}")
                continue
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
                continue
            if (why := sound(found)) is not None:
                wrong.append(f"{what}: read silently ({why})")
    finally:
        file.write_bytes(whole)
    assert not wrong, f"{file.name}: {len(wrong)} wrong\n" + "\n".join(wrong[:60])
    return refused


def odd_number(config):
    """The first number in nested dataclasses, dicts and tuples that is negative, infinite or no number; else None."""
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        config = [x for k, x in config.items() if k not in ("feature_layer", "mean")]
    if isinstance(config, list | tuple):
        return next((odd for x in config if (odd := odd_number(x)) is not None), None)
    if isinstance(config, int | float) and not isinstance(config, bool) and not 0 <= config < math.inf:
        return config
    return None
