"""A rank that waits in a collective which never ends, and counts the other host as lost after `SILENCE_S`."""

import sys
from functools import partial

import torch
import torch.distributed as dist

from headgrid import cli
from headgrid.errors import HeadgridError
from headgrid.runtime import launch

SILENCE_S = 2.0

if __name__ == "__main__":
    launch.lifeline = partial(launch.lifeline, beat_s=0.2, silence_s=SILENCE_S)
    try:
        with launch.joined("gloo"):
            sys.stdout.write("waiting\n")
            sys.stdout.flush()
            dist.recv(torch.zeros(1), 1 - dist.get_rank())  # both wait for the other
    except HeadgridError as error:
        cli.show(error)
        sys.exit(error.exit_code)
