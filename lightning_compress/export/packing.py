"""Codes for sparse and rounded tensors: numpy arrays to bytes and back, exactly. Nothing here knows of torch.

Which entries of a flat tensor are not zero (its positions) is coded as one of

- ``bitmask``: one bit an entry, the first in the lowest bit of the first byte;
- ``rice``: Golomb-Rice codes of the gaps, the numbers of zeros before each non-zero entry. One byte k; the low k bits
  of each gap, packed; the rest of each gap in unary (that many 0 bits, then a 1);
- ``huffman``: the gaps in 8 buckets an octave; a canonical Huffman code of the buckets, then the bits within them;
- ``runs``: the places where zeros and others take turns (uint32: how many; the first entry is one if it is not zero),
  their gaps coded as ``huffman``. Channels and blocks cost next to nothing so.

Integers are coded as one of

- ``packed``: a fixed number of bits each, the lowest bit first;
- ``huffman``: a canonical Huffman code of at most 15 bits. int16, the smallest integer; uint16, the number of lengths;
  4 bits for the length of the code of each integer from the smallest on; the codes, highest bit first.

The functions ``code_…`` return the candidates with their sizes, so that only the smallest has to be made.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]
Flags = NDArray[np.bool_]

LONGEST = 15
"""Bits of the longest Huffman code; its length fits 4 bits."""

_CHUNK = 1 << 20


class Code(NamedTuple):
    """One way to code an array.

    Args:
        name: ``"packed"``, ``"huffman"``, ``"bitmask"``, ``"rice"`` or ``"runs"``.
        size: Its bytes.
        encode: Makes them.
    """

    name: str
    size: int
    encode: Callable[[], bytes]


# --- bits -------------------------------------------------------------------------------------------------------------


def pack(values: Integers, width: int) -> bytes:
    """Return non-negative integers as `width` bits each, the lowest bit first.

    Example::

        >>> pack(np.array([1, 2, 3]), 4).hex()
        '2103'
    """
    if width == 8:
        return values.astype(np.uint8).tobytes()
    shifts = np.arange(width)
    chunks = (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))  # of whole bytes each
    bits = (((chunk.astype(np.int64)[:, None] >> shifts) & 1).astype(np.uint8) for chunk in chunks)
    return b"".join(np.packbits(chunk, bitorder="little").tobytes() for chunk in bits)


def unpack(data: bytes, width: int, count: int) -> Integers:
    """Return the `count` integers that :func:`pack` was given.

    Raises:
        ValueError: If the data has another length.

    Example::

        >>> unpack(bytes.fromhex("2103"), 4, 3).tolist()
        [1, 2, 3]
    """
    if len(data) != -(-count * width // 8):
        raise ValueError(f"{count} integers of {width} bits do not have {len(data)} bytes")
    array = np.frombuffer(data, np.uint8)
    if width == 8:
        return array
    values = np.zeros(count, np.int64)
    for start in range(0, count, _CHUNK):
        part = values[start : start + _CHUNK]
        bits = np.unpackbits(array[start * width // 8 :][: -(-len(part) * width // 8)], bitorder="little")
        for shift in range(width):
            part |= bits[shift : len(part) * width : width].astype(np.int64) << shift
    return values


def _join(codes: Integers, lengths: Integers) -> bytes:
    """Return codes of various lengths behind each other, the highest bit of each first."""
    parts, rest = [], np.zeros(0, np.uint8)
    for start in range(0, len(codes), _CHUNK):
        code, length = codes[start : start + _CHUNK], lengths[start : start + _CHUNK].astype(np.int64)
        ends = np.cumsum(length)
        begins = ends - length + len(rest)
        bits = np.zeros(len(rest) + int(ends[-1]), np.uint8)
        bits[: len(rest)] = rest
        for place in range(int(length.max())):
            has = length > place
            bits[begins[has] + place] = (code[has] >> (length[has] - 1 - place)) & 1
        whole = len(bits) // 8 * 8
        parts.append(np.packbits(bits[:whole]).tobytes())
        rest = bits[whole:]
    return b"".join([*parts, np.packbits(rest).tobytes()])


def _split(data: bytes, lengths: Integers) -> Integers:
    """Return the codes of known lengths that :func:`_join` was given."""
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(data) != -(-int(ends[-1] if len(ends) else 0) // 8):
        raise ValueError("the bits within the buckets are incomplete")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    codes, begins = np.zeros(len(lengths), np.int64), ends - lengths
    for place in range(int(lengths.max(initial=0))):
        has = lengths > place
        codes[has] = codes[has] << 1 | bits[begins[has] + place]
    return codes


# --- Huffman ----------------------------------------------------------------------------------------------------------


def code_lengths(counts: Integers) -> Integers:
    """Return the length of the Huffman code of each symbol, 0 where it does not occur; none is above `LONGEST`.

    Example::

        >>> code_lengths(np.array([8, 0, 1, 1, 2])).tolist()
        [1, 0, 3, 3, 2]
    """
    counts = counts.astype(np.int64)
    while True:
        lengths = np.zeros(len(counts), np.int64)
        heap = [(int(counts[symbol]), int(symbol), [int(symbol)]) for symbol in np.flatnonzero(counts)]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, first, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            lengths[left + right] += 1
            heapq.heappush(heap, (a + b, first, left + right))
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        counts = (counts + 1) // 2  # evens them out; what occurs stays above 0


def _order(lengths: Integers) -> Integers:
    """Return the symbols in the order of their canonical codes."""
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


def huffman(values: Integers) -> Code:
    """Return a Huffman code of integers within ±32,767.

    Example::

        >>> code = huffman(np.array([5, 5, -1, 5]))
        >>> len(code.encode()) == code.size, unhuffman(code.encode(), 4)[0].tolist()
        (True, [5, 5, -1, 5])
    """
    base = int(values.min()) if len(values) else 0
    symbols = values.astype(np.int64) - base
    counts = np.bincount(symbols)
    lengths = code_lengths(counts)
    is_constant = np.count_nonzero(lengths) < 2
    bits = 0 if is_constant else int(counts @ lengths)

    def encode() -> bytes:
        head = np.array([base], "<i2").tobytes() + np.array([len(lengths)], "<u2").tobytes() + pack(lengths, 4)
        if is_constant:
            return head
        codes, order = np.zeros(len(lengths), np.int64), _order(lengths)
        steps = 1 << (LONGEST - lengths[order])
        codes[order] = (np.cumsum(steps) - steps) >> (LONGEST - lengths[order])
        return head + _join(codes[symbols], lengths[symbols])

    return Code("huffman", 4 + -(-len(lengths) // 2) + -(-bits // 8), encode)


def unhuffman(data: bytes, count: int) -> tuple[Integers, int]:
    """Return the `count` integers that :func:`huffman` coded, and how many bytes of the data they took.

    Raises:
        ValueError: If the data is incomplete.
    """
    if len(data) < 4:
        raise ValueError("a Huffman code without its lengths")
    base, size = int(np.frombuffer(data, "<i2", 1)[0]), int(np.frombuffer(data, "<u2", 1, 2)[0])
    begin = 4 + -(-size // 2)
    lengths = unpack(data[4:begin], 4, size)
    order = _order(lengths)
    if len(order) < 2:
        return np.full(count, base + (order[0] if len(order) else 0), np.int64), begin
    width = int(lengths.max())
    spans = 1 << (width - lengths[order])
    if spans.sum() != 1 << width:
        raise ValueError("the lengths are those of no Huffman code")
    symbol_of, length_of = np.repeat(order, spans), np.repeat(lengths[order], spans).astype(np.uint8)

    # A code can begin at any bit. Look up at all of them, how long it were; then only steps are left to be taken.
    stream = np.frombuffer(data, np.uint8, offset=begin)
    values = np.empty(count, np.int64)
    done, bit = 0, 0
    for start in range(0, len(stream), _CHUNK // 8):
        if done == count:
            break
        part = np.zeros(min(_CHUNK // 8, len(stream) - start) + 2, np.uint32)
        ahead = stream[start : start + len(part)]
        part[: len(ahead)] = ahead
        words = part[:-2] << 16 | part[1:-1] << 8 | part[2:]
        windows = ((words[:, None] >> (24 - width - np.arange(8, dtype=np.uint32))) & ((1 << width) - 1)).ravel()
        steps, end = length_of[windows].tobytes(), len(windows)
        begins: list[int] = []
        append = begins.append
        while bit < end:
            append(bit)
            bit += steps[bit]
        found = windows[begins[: count - done]]
        values[done : done + len(found)] = symbol_of[found]
        done += len(found)
        if done == count:
            last = begins[len(found) - 1] if len(found) else 0
            return values + base, begin + start + -(-(last + steps[last]) // 8)
        bit -= end
    if done < count:
        raise ValueError("a Huffman code that breaks off")
    return values + base, begin


# --- positions --------------------------------------------------------------------------------------------------------


def _bucket(gaps: Integers) -> tuple[Integers, Integers]:
    """Return the bucket of each gap and how many bits its place within the bucket has."""
    widths = np.maximum(np.frexp(gaps.astype(np.float64))[1] - 4, 0).astype(np.int64)
    return 8 * widths + (gaps >> widths), widths


def _rice(gaps: Integers) -> Code:
    sizes = [len(gaps) * k + len(gaps) + int((gaps >> k).sum()) for k in range(32)]
    k = int(np.argmin(sizes))
    high = gaps >> k

    def encode() -> bytes:
        bits = np.zeros(int(high.sum()) + len(gaps), np.uint8)
        bits[np.cumsum(high + 1) - 1] = 1
        return bytes([k]) + pack(gaps & ((1 << k) - 1), k) + np.packbits(bits, bitorder="little").tobytes()

    return Code("rice", 1 + -(-len(gaps) * k // 8) + -(-(len(gaps) + int(high.sum())) // 8), encode)


def _unrice(data: bytes, count: int) -> Integers:
    k = data[0] if data else 0
    begin = 1 + -(-count * k // 8)
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(data[begin:], np.uint8), bitorder="little"))
    if len(ones) != count:
        raise ValueError("gaps are missing")
    return (np.diff(ones, prepend=-1) - 1) << k | unpack(data[1:begin], k, count)


def _huffman_gaps(gaps: Integers) -> Code:
    buckets, widths = _bucket(gaps)
    code = huffman(buckets)

    def encode() -> bytes:
        return code.encode() + _join(gaps & ((1 << widths) - 1), widths)

    return Code("huffman", code.size + -(-int(widths.sum()) // 8), encode)


def _unhuffman_gaps(data: bytes, count: int) -> Integers:
    buckets, used = unhuffman(data, count)
    widths = np.maximum(buckets // 8 - 1, 0)
    if widths.max(initial=0) > 40:
        raise ValueError("a gap beyond all sizes")
    return (buckets - 8 * widths) << widths | _split(data[used:], widths)


def _runs(mask: Flags) -> Code:
    turns = np.flatnonzero(np.diff(mask, prepend=False))
    code = _huffman_gaps(np.diff(turns, prepend=-1) - 1)
    return Code("runs", 4 + code.size, lambda: np.array([len(turns)], "<u4").tobytes() + code.encode())


def _unruns(data: bytes, total: int) -> Integers:
    count = int(np.frombuffer(data, "<u4", 1)[0])
    turns = np.cumsum(_unhuffman_gaps(data[4:], count) + 1) - 1
    is_turn = np.zeros(total, np.bool_)
    is_turn[turns] = True
    return np.flatnonzero(np.logical_xor.accumulate(is_turn))


def code_positions(mask: Flags) -> list[Code]:
    """Return the codes of a flat mask, True where an entry is not zero.

    Example::

        >>> {code.name: code.size for code in code_positions(np.arange(1000) % 50 == 0)}
        {'bitmask': 125, 'rice': 19, 'huffman': 27, 'runs': 33}
        >>> {code.name: code.size for code in code_positions(np.arange(1000) < 500)}
        {'bitmask': 125, 'rice': 64, 'huffman': 5, 'runs': 38}
    """
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    bitmask = Code("bitmask", -(-len(mask) // 8), lambda: np.packbits(mask, bitorder="little").tobytes())
    return [bitmask, _rice(gaps), _huffman_gaps(gaps), _runs(mask)]


def read_positions(name: str, data: bytes, count: int, total: int) -> Integers:
    """Return the indices of the `count` non-zero entries among `total`.

    Raises:
        ValueError: If the data does not fit.

    Example::

        >>> code = code_positions(np.array([False, True, True]))[1]
        >>> read_positions(code.name, code.encode(), 2, 3).tolist()
        [1, 2]
    """
    if name == "bitmask":
        positions = np.flatnonzero(unpack(data, 1, total))
    elif name == "runs":
        positions = _unruns(data, total)
    elif name in ("rice", "huffman"):
        positions = np.cumsum((_unrice if name == "rice" else _unhuffman_gaps)(data, count) + 1) - 1
    else:
        raise ValueError(f"no code of positions is called {name!r}")
    if len(positions) != count or (count and positions[-1] >= total):
        raise ValueError(f"not the positions of {count} among {total} entries")
    return positions
