"""The lab: what is measured, in which order, how it is kept, and what may be concluded from it."""
