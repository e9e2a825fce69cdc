"""``python -m colora_ms``: the same as the command ``colora-ms``."""

import sys

from colora_ms.cli import main

sys.exit(main())
