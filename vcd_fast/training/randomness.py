"""Random numbers by name instead of by history.

Every draw of a run is a function of (run seed, purpose, indices), so nothing random has to be saved, the number of ranks does not
matter, and a run resumed at step 317 draws what an undisturbed one would have drawn there.
"""

from __future__ import annotations

import hashlib

import torch


def indexed_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on all arguments and on nothing else."""
    name = ":".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def indexed_generator(seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `indexed_seed`. On the CPU by default: the same numbers whatever the device."""
    return torch.Generator(device).manual_seed(indexed_seed(seed, purpose, *indices))
