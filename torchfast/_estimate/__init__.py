"""How much GPU memory a training step will need."""
