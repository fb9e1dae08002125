"""The command `weakclip COMMAND ...`, also as python -m weakclip."""

from __future__ import annotations

from weakclip import cli


def main() -> None:
    cli.run(cli.main)


if __name__ == "__main__":
    main()
