"""Scenes as files of ICDAR 2015, with a byte order mark and CRLF."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from examples.text_detection.scene import Scene


def write_icdar(folder: Path, scenes: Iterable[Scene], suffix: str) -> None:
    folder.mkdir()
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.picture).save(folder / f"img_{index}.{suffix}")
        lines = [
            ",".join([*map(str, np.rint(quad).astype(int).ravel()), word])
            for quad, word in zip(scene.quads, scene.words, strict=True)
        ]
        (folder / f"gt_img_{index}.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
