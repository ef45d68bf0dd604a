"""`python -m preftune COMMAND`: the command `preftune`, for `accelerate launch -m preftune refl`."""

import sys
from pathlib import Path

from preftune.programs import main

if __name__ == "__main__":
    here = Path.cwd()
    if sys.path and Path(sys.path[0]) == here != Path(__file__).resolve().parents[1]:
        del sys.path[
            0
        ]  # -m puts the working directory first, where a user's rewards.py would hide the package
    sys.exit(main())
