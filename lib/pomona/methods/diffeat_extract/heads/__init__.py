"""Classifiers trained by stochastic gradient descent on what a frozen diffusion model computes.

`modules` holds the heads of the first paper (arXiv 2307.08702), `difformer` and `diffeed` those of its successor (arXiv
2311.17921), `learning` the recipe that the released code trains them all by. Where the papers are silent, which is the
rule, the released code decides.
"""
