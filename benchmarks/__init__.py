"""The benchmarks: each is run as a file or with `python -m benchmarks.NAME`.

Either way they import each other by bare name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
