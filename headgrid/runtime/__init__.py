"""Executes a layout with torch: mesh, collectives, attention, layers, pipeline, cache, engine."""
