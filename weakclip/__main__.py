"""The command `weakclip COMMAND ...`, also as python -m weakclip."""

from __future__ import annotations

from weakclip.runtime import environment


def main() -> None:
    environment.run("weakclip.cli:main")


if __name__ == "__main__":
    main()
