"""The example's commands by name: `python -m examples.text_detection COMMAND --help`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "train the network and show what it learnt",
    "detect": "find words in pictures",
    "evaluate": "score a trained network on labelled pictures",
    "make-data": "write generated pictures in SynthText's format",
    "keras-question": "the 2017 question answered with one figure",
}


def main() -> None:
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("usage: python -m examples.text_detection COMMAND ...\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:15} {purpose}")
        sys.exit(0 if name in ("--help", "-h") else 2)
    module = importlib.import_module("." + name.replace("-", "_"), __package__)
    module.main(sys.argv[2:])


if __name__ == "__main__":
    main()
