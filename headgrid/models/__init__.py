"""Hugging Face checkpoints: what config.json says, where the weights are, and the ranks reading only their own."""
