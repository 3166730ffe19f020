"""The zoo's command line: `python -m zoo [--zoo DIR] VERB ...`.

Exit codes: 0 fine, 2 wrong usage or input (one line on stderr that says what to do), 1 anything
else. Heavy libraries are imported by the verbs that need them, so that listings answer at once.
"""

import sys

from zoo.cli import add, derive, exchange, keep, measure, variants, work
from zoo.cli.app import main

# Rooms of verbs: each registers its own when it is imported.
__all__ = ["add", "derive", "exchange", "keep", "main", "measure", "variants", "work"]

if __name__ == "__main__":
    sys.exit(main())
