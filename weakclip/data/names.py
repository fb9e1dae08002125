"""Names of images, which may be anything that a file system holds, and keys of samples, which name members of a tar.

A name is the path of an image below its folder, without the suffix, such as "trip/Fähre 1.2". Masks are written under the name.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata

LONGEST = 80
"""Characters of a key, so that KEY.cam.npz fits into the 100 bytes of a plain tar header."""

# A member's part begins at the first dot of its name. "%" introduces an escaped byte.
_UNSAFE = re.compile(rb"[^ -~]|[./\\%]")


def key_of(name: str) -> str:
    """Return the key of the sample with this name: the name itself where it is 1 to 80 ASCII characters without . / \\ and %.

    In other names these bytes, and those of UTF-8, become %XX, which can be undone. What is then longer than 80 characters ends
    in a hash. Both Unicode normal forms of a name have the same key.
    """
    data = os.fsencode(composed(name))
    key = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], data).decode("ascii")
    return key if len(key) <= LONGEST else f"{key[: LONGEST - 17]}~{hashlib.sha256(data).hexdigest()[:16]}"


def composed(name: str) -> str:
    """Return a name in Unicode's normal form C, in which names are compared. macOS writes form D."""
    return unicodedata.normalize("NFC", name)


def names_a_file(name: str) -> bool:
    """Return whether a name of untrusted origin can be a file's, and stays below the folder that it is written to."""
    *folders, last = name.split("/")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(last) and "\0" not in name and not {"", ".", ".."} & {*folders}


def printable(name: str) -> str:
    """Return a name for messages and drawings, with control characters and bytes outside of Unicode as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)
