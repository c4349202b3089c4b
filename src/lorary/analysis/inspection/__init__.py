"""Measurements of a trained adapter: spectra, intruder dimensions, magnitude and direction, first gradients."""
