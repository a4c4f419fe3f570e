"""`python -m agentlightning`: the command `agl` where no script of that name is, as after `pip install --target`."""

import sys

from agentlightning.cli import main

sys.exit(main())
