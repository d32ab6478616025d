"""How the choice of scales is asked for; shared by the commands that solve statistics."""

from __future__ import annotations

import argparse

from ..options import SolveOptions, add_options


def add_solving_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How scales and precisions are chosen from statistics.

    Returns:
        The group, for further flags.
    """
    group = parser.add_argument_group("solving")
    add_options(group, SolveOptions)
    return group
