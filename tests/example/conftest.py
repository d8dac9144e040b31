"""The examples stand beside the package, not in it: their folder is put on the path last."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

_NEEDED = ("cv2", "matplotlib", "PIL", "scipy", "shapely", "skimage", "tqdm", "wonderwords")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]


class _Skipped(pytest.Module):
    """A file whose imports would fail: one skipped test, with the reason."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(
            f"no {', no '.join(_MISSING)}: pip install -r examples/text_detection/requirements.txt",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> object:
    if _MISSING and module_path.parent == Path(__file__).parent:
        return _Skipped.from_parent(parent, path=module_path)
    return None
