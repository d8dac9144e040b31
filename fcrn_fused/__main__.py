"""`python -m fcrn_fused` prints what serves which device."""

from .config import show_config

print(show_config())
