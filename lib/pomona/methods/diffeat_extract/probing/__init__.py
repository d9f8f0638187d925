"""What features know of the labels: which images are learned from, a linear classifier, and what its answers come to.

In order: `splits.task` parts the images, `splits.draws` chooses the labelled ones, `logistic.logistic` learns from each
draw, `outcomes.accuracy` and `outcomes.difference` give intervals over draws and test images. A sweep chooses by
`splits.validation`, which leaves the test images alone.
"""
