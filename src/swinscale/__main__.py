"""``python -m swinscale`` and ``torchrun -m swinscale``."""

import sys

from swinscale.cli import main

sys.exit(main())
