"""Training towards low rank: ADMM, the LC algorithm, low-rank priors, SVGD."""
