"""The benchmarks are programs that import each other by bare name; the tests do the same."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for place in (ROOT, ROOT / "benchmarks"):
    if str(place) not in sys.path:
        sys.path.append(str(place))
