"""Text detection with the fully-convolutional regression network of Gupta, Vedaldi and Zisserman.

The data takes one way: a `Scene` (picture and word boxes) comes out of `generator` or
`synthtext`, `grid` turns its boxes into the seven target maps, `model` predicts them,
`train` lowers `fcrn_fused.FCRNLoss` between the two, `detect` reads boxes back out of the
predicted maps and `evaluate` scores them.

Source: "Synthetic Data for Text Localisation in Natural Images", CVPR 2016, arXiv 1604.06646.
"""
