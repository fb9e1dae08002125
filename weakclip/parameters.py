"""Print the number of trainable and frozen parameters of a recipe's model, by module.

weakclip parameters --config configs/voc.yaml [key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from weakclip import cli, labels, registry


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip parameters", description="Print parameter counts by module.")
    config = cli.parse_config(parser, arguments)[0]
    model = registry.load("weakclip.models.weakclip")
    counts = model.parameter_counts(model.WeakCLIP(config, labels.class_names(config.classes)))
    for name, count in counts.items():
        if name not in ("trainable", "without gradient", "total"):
            print(f"{name:<24}{count:>13,}")
    share = 100 * counts["trainable"] / counts["total"]
    print(f"{counts['trainable']:,} trainable of {counts['total']:,} ({share:.1f} %)")
    if unused := counts["without gradient"]:
        print(f"{unused:,} of the trainable parameters never get a gradient (matching, adapter.train, prompts.words)")


if __name__ == "__main__":
    cli.run(main)
