"""`python -m convert_to_quant` is the command line."""

from .cli import main

raise SystemExit(main())
