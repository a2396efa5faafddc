"""CRC-32C (Castagnoli), the checksum of TensorFlow's checkpoints, in array operations."""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed, as iSCSI defines it (RFC 3720, appendix B.4)
_PIECE = 2**20  # bytes handled together, so that memory stays bounded


def crc32c(content):
    """Checksum of bytes.

    Args:
        content: bytes-like.

    Returns:
        int, 0 to 2 ** 32 - 1.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    content = memoryview(content).cast("B")
    state = np.uint32(0xFFFFFFFF)
    for start in range(0, len(content), _PIECE):
        state = _advance(state, content[start : start + _PIECE])
    return int(state) ^ 0xFFFFFFFF


def _advance(state, piece):
    """The state after `piece`.

    for byte in piece: state = shift(state ^ byte, one byte)

    The shift is linear over XOR. So each word of four bytes can be shifted by the number of bytes from its start to
    the end, all the results XORed; neighbours are joined first, then pairs of neighbours, and so on.
    """
    for bit in range(len(piece).bit_length()):
        if len(piece) >> bit & 1:
            state = _shift(state, _tables(bit))
    # Zeros in front change nothing, since what is shifted here starts from zero.
    words = np.frombuffer(bytes(-len(piece) % 4) + piece, "<u4")
    bit = 2
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        words = _shift(words[::2], _tables(bit)) ^ words[1::2]
        bit += 1
    return state ^ _shift(words[0], _tables(2))


def _shift(states, tables):
    """States after as many zero bytes as `tables` stands for: of four bytes each, the XOR of the results of each."""
    result = tables[0].take(states & 0xFF)
    for place in (1, 2, 3):
        result = result ^ tables[place].take(states >> (8 * place) & 0xFF)
    return result


@functools.cache
def _tables(bit):
    """uint32 (4, 256): [place, value] is the state that has `value` in its byte `place`, after 2 ** bit zero bytes."""
    if bit:
        return _shift(_tables(bit - 1), _tables(bit - 1))
    states = np.arange(256, dtype=np.uint32)
    tables = np.stack([states << (8 * place) for place in range(4)])
    for _ in range(8):
        tables = np.where(tables & 1, tables >> 1 ^ _POLYNOMIAL, tables >> 1).astype(np.uint32)
    return tables
