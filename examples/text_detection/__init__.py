"""Text detection with the fully-convolutional regression network of Gupta, Vedaldi and Zisserman.

The data takes one way: a `Scene` (picture and word boxes) comes out of `generator` or `labelled`,
`grid` turns its boxes into the seven target maps, `model` predicts them, `training` lowers
`fcrn_fused.FCRNLoss` between the two, `detection` reads boxes back out of the predicted maps and
`scoring` scores them.

Source: "Synthetic Data for Text Localisation in Natural Images", CVPR 2016, arXiv 1604.06646.
"""
