"""`python -m fcrn_fused` prints `show_config()`."""

from .config import show_config

print(show_config())
