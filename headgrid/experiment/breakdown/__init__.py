"""Where a step's time goes: compute, communication that is exposed, communication that is hidden, nothing at all."""
