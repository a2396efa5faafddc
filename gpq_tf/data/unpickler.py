"""Pickles, read by an unpickler that runs no code.

A pickle is a program for a stack machine, and the usual unpickler lets it call any function. Here it may build lists,
dicts whose keys are strings, tuples, strings and numbers. What else it names must be in its reader's table of
stand-ins, functions that check what they are given; nothing is imported or called on the word of a file.
"""

import pickle
import pickletools

# An opcode of one byte can take 70 bytes of memory; a batch of 10,000 images written by Python 3 has 80,000 of them.
MAX_OPCODES = 1_000_000

# What Python 2 and 3 write at protocols 2 to 4 for numbers, strings, containers, arrays and tensors.
# fmt: off
ADMITTED = [
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINGET",
    "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
]
# fmt: on


class RefusedError(Exception):
    """The pickle asks for something that is not read; stand-ins raise it with a sentence that begins with "it"."""


def unpickle(file, stand_ins=None, set_state=None, load_persistent=None):
    """Read one pickle.

    Args:
        file: binary file in memory; it is left behind the pickle.
        stand_ins: dict of (module, name) -> what stands for it; only functions that check their arguments may be
            callable.
        set_state: dict of type -> function of (object, state), for what may be given a state.
        load_persistent: function of a persistent id -> what stands for it, or None to refuse those.

    Returns:
        what was pickled: numbers, strings (those of Python 2 as bytes), lists, tuples, dicts and stand-ins' values.

    Raises:
        ValueError: if the pickle is damaged or asks for anything else. It says what was found, not in which file.

    Example:
        >>> import io
        >>> unpickle(io.BytesIO(pickle.dumps({"labels": [3, 5]})))
        {'labels': [3, 5]}
    """
    try:
        return _Unpickler(file, stand_ins or {}, set_state or {}, load_persistent).load()
    except RefusedError as error:
        raise ValueError(f"{error}; nothing but arrays, strings, lists, dicts and numbers is read") from error
    except Exception as error:  # a damaged program fails anywhere, with nearly any exception
        raise ValueError(f"it is damaged, cut off or no pickle ({type(error).__name__} while reading)") from error


class _Opcodes(dict):
    """Opcode -> method, for the admitted ones; refuses others, and too many."""

    left = MAX_OPCODES

    def __getitem__(self, code):
        self.left -= 1
        if self.left < 0:
            raise RefusedError(f"it has more than {MAX_OPCODES:,} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code):
        known = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        if code not in known:
            raise ValueError(f"no opcode: {code}")
        raise RefusedError(f"it asks for the opcode {known[code]}")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose memo is a dict: an index however large takes no memory."""

    def __init__(self, file, stand_ins, set_state, load_persistent):
        super().__init__(file, encoding="bytes")
        self.stand_ins, self.set_state = stand_ins, set_state
        handlers = dict(self.handlers)
        if load_persistent is not None:
            self.persistent_load = load_persistent
            handlers["BINPERSID"] = pickle._Unpickler.load_binpersid
        self.dispatch = _Opcodes({getattr(pickle, name)[0]: handler for name, handler in handlers.items()})

    def find_class(self, module, name):
        if (module, name) not in self.stand_ins:
            wanted = f"{module[:80]}.{name[:80]}"
            raise RefusedError(f"it asks for {wanted if wanted.isprintable() else repr(wanted)}")
        return self.stand_ins[module, name]

    def load_setitems(self):
        items = self.pop_mark()
        # Only strings: the hash of nested tuples can take for ever.
        if not all(type(key) in (bytes, str) for key in items[::2]):
            raise RefusedError("it has a dict whose keys are not strings")
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise ValueError("no dict to fill")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key in self.stack[-1]:
                raise RefusedError(f"it has a dict with the key {key[:80]!r} twice")
            self.stack[-1][key] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.metastack.append(self.stack)
        self.stack = [key, value]
        self.load_setitems()

    def load_build(self):
        # pickle's own would set attributes of whatever is on the stack.
        state = self.stack.pop()
        kind = type(self.stack[-1])
        if kind not in self.set_state:
            raise RefusedError(f"it sets the state of a {kind.__name__}")
        self.set_state[kind](self.stack[-1], state)

    handlers = {name: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in ADMITTED}  # noqa: RUF012
    handlers |= {"SETITEMS": load_setitems, "SETITEM": load_setitem, "BUILD": load_build}
