"""`python -m conversion SOURCE TARGET` and `python -m conversion inspect SOURCE`."""

import sys

from conversion.cli import main

if __name__ == "__main__":
    sys.exit(main())
