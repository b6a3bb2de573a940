"""A language model, compressed without training: tenfold beside the methods of the field, under one protocol."""
