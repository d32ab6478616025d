"""The parser of every command: argparse with our help screens and one-line errors.

Help starts with usage, purpose and examples; options follow. argparse's own layout differs between versions of Python;
ours does not, so tests compare screens and the reference is generated from the same parser. For an unknown flag or
choice, the error suggests the nearest one.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from .terminal import WIDEST, columns, paint, printable

MISUSED = 2
HELP_COLUMN = 33
"""Column at which descriptions of options start."""


def flag_spelling(argument: str) -> str:
    """An argument with dashes for underscores in its flag: `--scaling_mode` and `--scaling-mode` are the same.

    >>> flag_spelling("--actcal_lora=my_lora.safetensors")
    '--actcal-lora=my_lora.safetensors'
    """
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint with the most similar known word, or "".

    >>> did_you_mean("inpsect", ["inspect", "observe"])
    'did you mean inspect?'
    """
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def in_brackets(hint: str) -> str:
    """A hint as the end of a message.

    >>> "unknown" + in_brackets("try another"), in_brackets("")
    ('unknown (try another)', '')
    """
    return f" ({hint})" if hint else ""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with our help and our errors.

    Paragraphs of the epilog that start with "example" are printed above the options, others below them.

    Attributes:
        hints: what to use instead of a flag of another program.
        origins: the options that a configuration file set, as argparse's errors name them, and where.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"add_help": False, "allow_abbrev": False, **settings})
        self._positionals.title = "arguments"
        self.hints: Mapping[str, str] = {}
        self.origins: dict[str, str] = {}

    # misuse

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`. Unknown flags are reported first: they often cause the other errors."""
        words = list(sys.argv[1:] if args is None else args)
        if self.subcommands() is None:
            for word in words[: words.index("--")] if "--" in words else words:
                name = word.partition("=")[0]
                if name.startswith("--") and name not in self._option_string_actions:
                    hint = self.hints.get(name) or did_you_mean(name, self.flags())
                    self.error(f"unknown option {name}{in_brackets(hint)}")
        if not self._get_positional_actions():
            named = {"-i", "--input"} & {word.partition("=")[0] for word in words}
            for word in self.strays(words):
                hint = f"did you mean -i {word}?" if "-i" in self._option_string_actions and not named else ""
                self.error(f"unexpected argument {word!r}{in_brackets(hint)}")
        return super().parse_known_args(words, namespace)

    def strays(self, words: Sequence[str]) -> Iterator[str]:
        """The words that are neither a flag nor its value."""
        left = iter(words)
        for word in left:
            action = self._option_string_actions.get(word)
            if not word.startswith("-"):
                yield word
            elif action is not None and action.nargs is None:
                next(left, None)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), known) or f"choose from {', '.join(known)}"
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{in_brackets(hint)}")

    def error(self, message: str) -> NoReturn:
        """Print the error and how to get help, and exit."""
        message = re.sub(r"^argument (?=\S+: )", "", message)
        message = re.sub(r"^unrecognized arguments: (\S+).*", r"unexpected argument '\1'", message)
        name, colon, problem = message.partition(": ")
        message = self.origins.get(name, name) + colon + problem
        wrong = f"{paint('error:', 'bad', sys.stderr)} {printable(message)}"
        self.exit(MISUSED, f"{wrong}\nsee: {self.prog} --help\n")

    # contents

    def subcommands(self) -> argparse._SubParsersAction[Any] | None:
        """The actions of the command ("install", ...), if it has any."""
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)

    def flags(self) -> list[str]:
        """The long flags, without hidden ones."""
        actions = (action for action in self._actions if action.help != argparse.SUPPRESS)
        return [flag for action in actions for flag in action.option_strings if flag.startswith("--")]

    # help

    def format_usage(self) -> str:
        """The usage line with everything that is required."""
        if self.usage is not None:
            return f"usage: {self.usage}\n"
        needed = [
            f"{action.option_strings[0]} {action.metavar}"
            for action in self._actions
            if action.option_strings and (action.required or (action.dest == "output" and action.default is None))
        ]
        places = map(_place, self._get_positional_actions())
        call = " ".join(["usage:", self.prog, *places, *needed, "[options]"])
        return textwrap.fill(call, min(columns(), WIDEST), subsequent_indent=" " * 7, break_on_hyphens=False) + "\n"

    def format_help(self) -> str:
        """The help screen."""
        width = min(columns(), WIDEST)
        paragraphs = [self.description or "", *(self.epilog or "").strip("\n").split("\n\n")]
        texts = [block if "\n  " in block else textwrap.fill(block, width) for block in paragraphs]  # or a table
        blocks = [self.format_usage().rstrip(), *(text for text in texts if text.startswith("example"))]
        blocks[1:1] = texts[:1]
        blocks += [_group(group, width) for group in self._action_groups]
        blocks += [text for text in texts[1:] if not text.startswith("example")]
        return "\n\n".join(_headed(block) for block in blocks if block) + "\n"


def _headed(block: str) -> str:
    """A block with a bold heading."""
    heading, colon, rest = block.partition(":")
    return paint(heading + colon, "head", sys.stdout) + rest if colon and "\n" not in heading else block


def _group(group: argparse._ArgumentGroup, width: int) -> str:
    """A group of options with its title, or ""."""
    lines = []
    for action in group._group_actions:
        if isinstance(action, argparse._SubParsersAction):
            lines += [_explained(one.dest, one.help or "", width) for one in action._get_subactions()]
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            name = ", ".join(action.option_strings) + (f" {action.metavar}" if action.nargs != 0 else "")
            lines.append(_explained(name if action.option_strings else _place(action), action.help or "", width))
    return "\n".join([f"{group.title}:", *lines]) if lines else ""


def _explained(name: str, text: str, width: int) -> str:
    """A name with its wrapped description in the next column."""
    head = f"  {name}".ljust(HELP_COLUMN)
    if not head.endswith("  "):
        head += "\n" + " " * HELP_COLUMN
    lines = textwrap.wrap(text, max(width - HELP_COLUMN, 20), break_on_hyphens=False)
    return (head + f"\n{' ' * HELP_COLUMN}".join(lines)).rstrip()


def _place(action: argparse.Action) -> str:
    """A positional argument: "STATS...", "[MODEL]"."""
    name = str(action.metavar)
    return {"+": f"{name}...", "*": f"[{name}...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def follow(parser: Parser, words: Sequence[str]) -> tuple[Parser, list[str]]:
    """The parser of the action in a command line, and the action's name: `comfyui install` -> ["install"]."""
    actions = parser.subcommands()
    name = words[0] if words else None
    return (parser, []) if actions is None or name not in actions.choices else (actions.choices[name], [str(name)])
