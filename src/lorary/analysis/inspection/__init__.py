"""What a trained adapter has become: spectra, intruder dimensions, magnitude and direction, first gradients."""
