import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpq_tf.convert import crc32c as module
from gpq_tf.convert.crc32c import crc32c

import gpq_files


@pytest.mark.parametrize(
    ("content", "checksum"),
    [  # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values(content, checksum):
    assert crc32c(content) == checksum


@given(st.binary(max_size=300))
def test_equals_the_definition(content):
    assert crc32c(content) == gpq_files.crc32c_bit_by_bit(content)


@pytest.mark.parametrize("n_bytes", [0, 1, 6, 7, 8, 20, 21, 22])
def test_pieces_are_joined(monkeypatch, n_bytes):
    monkeypatch.setattr(module, "_PIECE", 7)
    content = bytes(range(100, 100 + n_bytes))
    assert crc32c(content) == gpq_files.crc32c_bit_by_bit(content)
