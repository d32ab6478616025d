"""`python -m convert_to_quant` runs the command line."""

from .cli import main

raise SystemExit(main())
