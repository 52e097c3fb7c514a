"""Trains with a decoder whose second call runs out of memory; prints the error as a user would see it."""

import sys

import torch

from vcd_fast.config import parse
from vcd_fast.models.wan.adapter import WanI2V
from vcd_fast.training.loop import OutOfMemory, train

decode, calls = WanI2V.decode, 0


def failing(self, *arguments, **options):
    global calls
    calls += torch.is_grad_enabled()
    if calls == 2:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\nmore"
        )
    return decode(self, *arguments, **options)


WanI2V.decode = failing
config, _ = parse(sys.argv[1:], "worker")
try:
    train(config)
except OutOfMemory as error:
    print("MESSAGE", error, sep="\n")
