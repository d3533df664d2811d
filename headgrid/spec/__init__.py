"""What is run: model and workload as frozen values. Standard library only."""
