"""Import paths: what is loaded only when it is used exists."""

from __future__ import annotations

import re

from weakclip import registry
from weakclip.cli import VERBS


def test_every_path_that_the_package_loads_exists(repo):
    """A path is text, which neither mypy nor import-linter checks."""
    sources = [path.read_text() for path in (repo / "weakclip").rglob("*.py")]
    loaded = {path for text in sources for path in re.findall(r"\bload\(\s*\"(weakclip[\w.:]*)\"", text)}
    assert len(loaded) > 5
    for path in (*loaded, *(verb.main for verb in VERBS.values())):
        assert registry.load(path)
