"""Convert checkpoints of the released implementation to our format and back. Code in an input file is never executed.

weakclip convert released.pth OUT.safetensors   the authors' weights, for --weights and clip.pretrained
weakclip convert ViT-B-16.pt OUT.safetensors    OpenAI's archive, for clip.pretrained
weakclip convert runs/voc OUT.safetensors       a run's best weights and its CLIP in one file
weakclip convert runs/voc OUT.pth               the same in the released layout
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weakclip import cli, registry
from weakclip.config import ConfigError
from weakclip.runtime.command_line import output_file


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip convert", description="Convert released checkpoints to our format and back.")
    parser.add_argument(
        "source", metavar="IN", type=Path, help="released .pth, OpenAI's .pt, a run's directory, our .safetensors"
    )
    parser.add_argument("out", metavar="OUT", type=output_file, help=".safetensors: ours; .pth: the released layout")
    parser.add_argument("--classes", metavar="NAME|FILE", help="voc, coco or a file of names, where K is ambiguous")
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"{options.out}: must end in .safetensors (our format) or .pth (the released layout)")
    released = registry.load("weakclip.models.released")
    checkpoint = released.read(options.source, options.classes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    released.write(checkpoint, options.out)
    print("\n".join((released.summary(checkpoint.ours), *checkpoint.notes, f"written: {options.out}")))


if __name__ == "__main__":
    cli.run(main)
