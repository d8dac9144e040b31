"""Whole uses of fcrn_fused."""
