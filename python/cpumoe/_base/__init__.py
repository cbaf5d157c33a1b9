"""What every other part may use: checks of tensors, old names, progress, random numbers."""
