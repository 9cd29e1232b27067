"""`python -m fxfreeze` is the command `fxfreeze`."""

import sys

from fxfreeze.cli import main

sys.exit(main())
