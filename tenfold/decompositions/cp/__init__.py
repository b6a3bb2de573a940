"""CP: sums of rank-one tensors, by alternating least squares and what keeps their terms from cancelling."""
