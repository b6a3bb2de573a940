"""Alternating least squares over blocks of unknowns: tensor rings and block terms."""
