"""Small models that differ in nothing but their kernel, on synthetic tasks that ask for what stood earlier.

The tasks are those of Zoology (arXiv 2312.04927) and of induction heads (arXiv 2209.11895) made small. The recipe is
our own: one layer, trained within seconds on one thread. What a model ends with is a result of this recipe and these
steps, not a bound on its kernel.
"""
