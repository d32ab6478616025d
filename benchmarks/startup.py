"""How long the command line takes to answer, against Python itself: help, `inspect`, and what each of them imports.

Why it exists. Whoever types `--help` waits for it, and a shell loop asks many times. An import at the top of one module
is enough to make every answer a second late, and nobody notices who has a warm machine.

Each command and `python -c pass` run in turns (`measure.alternate`), so that a busy machine slows all of them alike.
The target is a median of at most 0.3 s each, Python's own start included; exit 1 where one is missed.

    python benchmarks/startup.py [--repeats 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Command, Contender, alternate, machine, summary

from convert_to_quant.emoji import WEIGHTS

TARGET_SECONDS = 0.3
PYTHON = "python -c pass"
CALLS = {
    "--help": ["--help"],
    "convert --help": ["convert", "--help"],
    "observe --help": ["observe", "--help"],
    "report --help": ["report", "--help"],
    "inspect emoji": ["inspect", str(WEIGHTS)],
}


def imports(arguments: list[str]) -> int:
    """The modules that a call of Python loads."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    return sum(line.startswith("import time:") for line in done.stderr.splitlines()) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="of each call (15)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    calls = {PYTHON: ["-c", "pass"], **{name: ["-m", "convert_to_quant", *words] for name, words in CALLS.items()}}
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, Command([sys.executable, *words], Path(folder))) for name, words in calls.items()]
        measured = alternate(contenders, args.repeats)
    rows = []
    for one in measured:
        name, seconds = one.contender.name, statistics.median(one.seconds)
        rows.append({"call": name, **summary(one.seconds), "modules": imports(calls[name]),
                     "target_met": seconds <= TARGET_SECONDS})  # fmt: skip
        spread = f"{min(one.seconds):.3f} to {max(one.seconds):.3f}"
        print(f"{name:<16} {seconds:.3f} s ({spread}), {rows[-1]['modules']:>4} modules")
    if args.json:
        document = {"machine": machine(), "target_seconds": TARGET_SECONDS, "rows": rows}
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["target_met"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
