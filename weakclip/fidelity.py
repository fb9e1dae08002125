"""Compare every step with the numbers that the published implementation computed.

weakclip fidelity DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from weakclip import cli, registry
from weakclip.runtime.command_line import input_folder
from weakclip.runtime.errors import UserError


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip fidelity", description="Compare with the released code's numbers.")
    parser.add_argument("folder", metavar="DIR", type=input_folder, help="golden directory that a run of the released code wrote")
    folder = parser.parse_args(arguments).folder
    fidelity = registry.load("weakclip.evaluation.fidelity")
    rows = list(fidelity.compare(folder))
    print(fidelity.table(rows))
    if failed := [row.name for row in rows if not row.passed]:
        some = registry.load("weakclip.checkpoints.state_dict:some")
        raise UserError(f"{len(failed)} of {len(rows)} numbers differ from the released code's: {some(failed)}")
    print(f"all {len(rows)} within their limits")


if __name__ == "__main__":
    cli.run(main)
