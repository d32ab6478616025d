"""The parser of every command: argparse, with help that fits a screen and misuse that is one line and a hint.

Help begins with what to type: the call, what it does, examples, and only then the options, the most used group first.
It is laid out here and not by argparse, whose layout differs between versions of Python, so that a screen can be
compared and the reference can be generated from the same parser.

A flag or choice that does not exist is answered with the nearest that does.
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
"""Where the explanations of options begin."""


def flag_spelling(argument: str) -> str:
    """An argument with the dashes that the parsers know: `--scaling_mode` and `--scaling-mode` are the same.

    >>> flag_spelling("--actcal_lora=my_lora.safetensors")
    '--actcal-lora=my_lora.safetensors'
    """
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the nearest known word; "" where none is near.

    >>> did_you_mean("inpsect", ["inspect", "observe"])
    'did you mean inspect?'
    """
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def in_brackets(hint: str) -> str:
    """A hint behind a message.

    >>> "unknown" + in_brackets("try another"), in_brackets("")
    ('unknown (try another)', '')
    """
    return f" ({hint})" if hint else ""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with our help and our errors.

    The epilog's paragraphs that begin with "example" stand above the options, the others below them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"add_help": False, "allow_abbrev": False, **settings})
        self._positionals.title = "arguments"
        self.foreign: Mapping[str, str] = {}

    # misuse

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; unknown flags are refused first, since the rest of a mistyped call makes no sense."""
        words = list(sys.argv[1:] if args is None else args)
        if self.subcommands() is None:
            for word in words[: words.index("--")] if "--" in words else words:
                name = word.partition("=")[0]
                if name in self._option_string_actions:
                    continue
                if name.startswith("-") and name in self.foreign:
                    self.error(f"{name} is another program's option ({self.foreign[name]})")
                if name.startswith("--"):
                    self.error(f"unknown option {name}{in_brackets(did_you_mean(name, self.flags()))}")
        if not self._get_positional_actions():
            named = {"-i", "--input"} & {word.partition("=")[0] for word in words}
            for word in self._strays(words):
                hint = f"did you mean -i {word}?" if "-i" in self._option_string_actions and not named else ""
                self.error(f"unexpected argument {word!r}{in_brackets(self.foreign.get(word, hint))}")
        return super().parse_known_args(words, namespace)

    def _strays(self, words: Sequence[str]) -> Iterator[str]:
        """The words that are neither a flag nor the value of one."""
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
        """Say in one line what is wrong with the call, in another where help is, and leave."""
        message = re.sub(r"^argument (?=\S+: )", "", message)
        message = re.sub(r"^unrecognized arguments: (\S+).*", r"unexpected argument '\1'", message)
        wrong = f"{paint('error:', 'bad', sys.stderr)} {printable(message)}"
        self.exit(MISUSED, f"{wrong}\nsee: {self.prog} --help\n")

    # what there is

    def subcommands(self) -> argparse._SubParsersAction[Any] | None:
        """The actions of a command that has some ("install", ...)."""
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)

    def flags(self) -> list[str]:
        """The long flags that are meant for people."""
        actions = (action for action in self._actions if action.help != argparse.SUPPRESS)
        return [flag for action in actions for flag in action.option_strings if flag.startswith("--")]

    # help

    def format_usage(self) -> str:
        """The call in one line: what must be there, then that there are options."""
        if self.usage is not None:
            return f"usage: {self.usage}\n"
        width = min(columns(), WIDEST)
        words = [_named(action) for action in self._actions if action.option_strings and _is_needed(action)]
        places = [_place(action) for action in self._get_positional_actions()]
        call = " ".join(["usage:", self.prog, *places, *words, "[options]"])
        return textwrap.fill(call, width, subsequent_indent=" " * 7, break_on_hyphens=False) + "\n"

    def format_help(self) -> str:
        """The help's screen."""
        width = min(columns(), WIDEST)
        paragraphs = [block for block in (self.epilog or "").strip("\n").split("\n\n") if block]
        examples = [block for block in paragraphs if block.startswith("example")]
        notes = [block for block in paragraphs if not block.startswith("example")]
        groups = [_group(group, width) for group in self._action_groups]
        what = _filled(self.description or "", width)
        blocks = [self.format_usage().rstrip(), what, *examples, *groups, *(_filled(note, width) for note in notes)]
        return "\n\n".join(_headed(block) for block in blocks if block) + "\n"


def _is_needed(action: argparse.Action) -> bool:
    """Whether a call is seldom complete without an option."""
    return action.required or (action.dest == "output" and action.default is None)


def _filled(block: str, width: int) -> str:
    """A paragraph, wrapped; a table stays as it is."""
    return block if "\n  " in block else textwrap.fill(block, width)


def _headed(block: str) -> str:
    """A block with its heading in bold, where there are colours."""
    heading, colon, rest = block.partition(":")
    return paint(heading + colon, "head", sys.stdout) + rest if colon and "\n" not in heading else block


def _group(group: argparse._ArgumentGroup, width: int) -> str:
    """A group of options under its title; "" where it has none to show."""
    lines = [line for action in group._group_actions for line in _option(action, width)]
    return "\n".join([f"{group.title}:", *lines]) if lines else ""


def _option(action: argparse.Action, width: int) -> Iterator[str]:
    """The lines of one option, or of every action of a command."""
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return  # whoever reads this has found --help
    if isinstance(action, argparse._SubParsersAction):
        for one in action._get_subactions():
            yield from _explained(one.dest, one.help or "", width)
        return
    named = _named(action, all_flags=True) if action.option_strings else _place(action)
    yield from _explained(named, action.help or "", width)


def _explained(named: str, text: str, width: int) -> Iterator[str]:
    """What something is called, and beside it, wrapped, what it is for."""
    head = f"  {named}"
    lines = textwrap.wrap(text, max(width - HELP_COLUMN, 20), break_on_hyphens=False) or [""]
    if len(head) > HELP_COLUMN - 2:
        yield head
        head = ""
    yield f"{head.ljust(HELP_COLUMN)}{lines[0]}".rstrip()
    for line in lines[1:]:
        yield " " * HELP_COLUMN + line


def _named(action: argparse.Action, *, all_flags: bool = False) -> str:
    """A flag and its value: "-o OUT", or "-o, --output OUT"."""
    flags = ", ".join(action.option_strings) if all_flags else action.option_strings[0]
    return flags if action.nargs == 0 else f"{flags} {_value(action)}"


def _place(action: argparse.Action) -> str:
    """An argument without a flag: "STATS...", "[MODEL]"."""
    name = "ACTION" if isinstance(action, argparse._SubParsersAction) else _value(action)
    return {"+": f"{name}...", "*": f"[{name}...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _value(action: argparse.Action) -> str:
    """What stands for the value of an argument."""
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def follow(parser: Parser, words: Sequence[str]) -> tuple[Parser, list[str]]:
    """The parser of the action that a call names, and the names on the way to it: `comfyui install` -> ["install"]."""
    names: list[str] = []
    for word in words:
        actions = parser.subcommands()
        if actions is None or word not in actions.choices:
            break
        parser = actions.choices[word]
        names.append(word)
    return parser, names
