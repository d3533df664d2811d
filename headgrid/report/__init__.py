"""One self-contained page about a run. A leaf: nothing imports it but the command line, and it loads no torch."""
