"""Make class activation maps from image labels: the samples of `data.labelled`, with CAMs, are written to `data.train`.

weakclip cam --config configs/cam/clip.yaml [--shards 0:8] [key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from weakclip import cli, registry


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip cam", description="Make CAMs from image labels.")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of data.labelled")
    config, options = cli.parse_config(parser, arguments)
    make = registry.load("weakclip.cams.make")
    make.run(config, options.shards)
    labelled = make.open_labelled(config)
    print(f"{config.data.train}: {make.written(config, labelled)} of {len(labelled.shards)} shards with CAMs")


if __name__ == "__main__":
    cli.run(main)
