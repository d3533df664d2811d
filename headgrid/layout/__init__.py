"""The algebra of the partition: who owns what, who sends what to whom. Pure functions, standard library only."""
