"""Whether there is time for more of the same: more combinations, kills, preemptions and signals, real time limits."""

import os

LONG = os.environ.get("QWLIT_LONG") == "1"
