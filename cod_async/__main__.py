"""``python -m cod_async`` is ``cod``."""

import sys

from cod_async.cli import main

sys.exit(main())
