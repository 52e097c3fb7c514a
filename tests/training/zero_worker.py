"""Run by test_zero.py, on one rank or two: trains the same tiny clips under several settings; prints one JSON line on rank 0.

Arguments: a folder for the runs, the folder of pictures, and the settings as JSON: {name: overlay}.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from vcd_fast.config import compose
from vcd_fast.training import engine as engines
from vcd_fast.training.loop import Run

# What is compared must not hang on rounding: ZeRO-3 hands the kernels tensors at other addresses, which changes last bits. The sorted
# distance's gradient jumps where two values swap ranks, so the smooth one judges; and AdamW divides by gradients that are nearly
# zero, so its epsilon lies above their noise.
SMALL = {
    "model": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3},
    "lora": {"rank": 2, "alpha": 4},
    "rollout": {"sampling_steps": 3, "backprop": "last:2"},
    "reward": {"distance": "vcd_l2"},
    "training": {
        "device": "cpu",
        "max_train_steps": 3,
        "learning_rate": 2e-4,
        "adam_epsilon": 1e-3,
        "sample_every": 0,
        "checkpoint_every": 0,
        "sample_pictures": 1,
    },
}


def main(folder, pictures, cases):
    warnings.simplefilter("once")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    engines.init_distributed(torch.device("cpu"))
    world = dist.get_world_size()
    found = {}
    for name, overlay in json.loads(cases).items():
        output = f"{folder}/{world}-{name}"
        # one process takes as micro-steps, or as a batch, what two ranks share
        share = {"batch_size" if name == "batch" else "gradient_accumulation": 2 // world}
        share |= {"output": output, "cache": f"{folder}/encodings"}
        config = compose("wan", "tiny", SMALL, {"data": {"pictures": pictures}}, overlay, {"training": share})
        summary = Run(config, torch.device("cpu"), []).train()
        dist.barrier()
        weights = load_file(f"{output}/lora/pytorch_lora_weights.safetensors")
        found[name] = {key: value.flatten().tolist() for key, value in weights.items()}
        assert dist.get_rank() != 0 or summary["updates"] == 3, summary
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
