"""The theorem: a four-layer network with random weights separates two data sets, simulated and calculated."""
