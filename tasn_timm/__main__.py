"""python -m tasn_timm: see `cli`."""

import sys

from .cli import main
from .errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
