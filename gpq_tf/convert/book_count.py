"""How many books a codebook of the originals has: they store it as a matrix (K, M * d), and M in no file."""

import numbers
import re
import typing


class Named(typing.NamedTuple):
    """What a file's name says of the number of books.

    Attributes:
        n_book: int M, or None when no M makes as many bits.
        said: str, the words for it, such as "48 bits".
        rule: str, what the bits do not fit when they do not, such as "4 bits a book".
    """

    n_book: int | None
    said: str
    rule: str


def named_bits(file_name, bn_word):
    """Read a number of bits in a file's name, such as 48bits.ckpt, as M times the bits of a book.

    Args:
        file_name: str.
        bn_word: int, bits a book, log2 K.

    Returns:
        Named, or None when the name says nothing.

    Example:
        >>> named_bits("48bits.ckpt", bn_word=4)
        Named(n_book=12, said='48 bits', rule='4 bits a book')
    """
    found = re.search(r"(\d+)[ _-]?bit", file_name)
    if not found:
        return None
    n_book, rest = divmod(int(found[1]), bn_word)
    return Named(n_book if n_book and not rest else None, f"{int(found[1])} bits", f"{bn_word} bits a book")


def choose(n_book, size, length, file_name, named):
    """The number of books, and where it comes from.

    Args:
        n_book: int M as the user gives it, or None.
        size: int D = M * d.
        length: int d, of the original's default, where nothing else says M.
        file_name: str, for the error.
        named: Named, what it says, or None.

    Returns:
        (int M, str): M divides D.

    Raises:
        ValueError: if n_book does not divide D, or nothing says M and `length` does not divide D.

    Example:
        >>> choose(None, 144, 12, "20.ckpt", None)
        (12, 'D / 12 for D = 144; give --n_book if it is another')
    """
    if n_book is not None:
        if not isinstance(n_book, numbers.Integral) or isinstance(n_book, bool) or n_book < 1 or size % n_book:
            raise ValueError(
                f"Invalid n_book. Expected a positive integer dividing D={size}. Received: n_book={n_book!r}"
            )
        is_contradicted = named is not None and named.n_book != n_book
        return int(n_book), f"as given; the file's name says {named.said}" if is_contradicted else "as given"
    remark = ""
    if named is not None:
        if named.n_book and size % named.n_book == 0:
            return named.n_book, f"the {named.said} in the file's name"
        remark = f"; the {named.said} in the file's name do not fit {named.rule} and D = {size}"
    if size % length:
        raise ValueError(
            f"Invalid n_book. Expected it to be given, since {file_name!r} does not say it and D={size} "
            f"is no multiple of {length}. Received: None{remark}"
        )
    return size // length, f"D / {length} for D = {size}{remark}; give --n_book if it is another"
