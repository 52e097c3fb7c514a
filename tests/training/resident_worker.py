"""Run by test_resident_weights.py on two ranks: what a rank holds while it trains; prints one JSON line on rank 0.

Arguments: a folder for the run and the folder of pictures.
"""

import gc
import json
import sys
import warnings
from unittest import mock

import torch
import torch.distributed as dist

from vcd_fast.config import compose
from vcd_fast.training import engine as engines
from vcd_fast.training import loop

SETTINGS = {
    "model": {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1, "dtype": "bfloat16"},
    "lora": {"rank": 2, "alpha": 4},
    "rollout": {"sampling_steps": 1},
    "reward": {"num_projections": 4, "frames_per_step": 1},
    "training": {"device": "cpu", "max_train_steps": 2, "sample_every": 0, "checkpoint_every": 0, "zero": 3},
}


def main(folder, pictures):
    warnings.simplefilter("once")
    torch.set_num_threads(1)
    engines.init_distributed(torch.device("cpu"))
    output = {"training": {"output": f"{folder}/run"}, "data": {"pictures": pictures}}
    run = loop.Run(compose("wan", "tiny", SETTINGS, output), torch.device("cpu"), [])
    seen = []

    def watched(*arguments, **options):
        gc.collect()
        modules = {type(found).__name__ for found in gc.get_objects() if isinstance(found, torch.nn.Module)}
        base = {name: p for name, p in run.model.transformer.named_parameters() if not p.requires_grad}
        lora = dict(run.parameters)
        before = {name: p.ds_tensor.clone() for name, p in lora.items()}
        seen.append(
            {
                "encoders": sorted(name for name in modules if "UMT5" in name or "CLIP" in name or "Encoder3d" in name),
                "decoder": "WanDecoder3d" in modules,
                "whole": [name for name, p in base.items() if p.numel() > 0],
                "sharded": len(base),
                "numbers": sum(p.ds_numel for p in base.values()),
                "here": sum(p.ds_tensor.numel() for p in base.values()),
                "base dtypes": sorted({str(p.ds_tensor.dtype) for p in base.values()}),
                "lora dtypes": sorted({str(p.ds_tensor.dtype) for p in lora.values()}),
            }
        )
        done = original(*arguments, **options)
        assert all(torch.equal(p.ds_tensor, before[name]) for name, p in lora.items())  # only the step changes them
        return done

    original = loop.micro_step
    with mock.patch.object(loop, "micro_step", watched):
        summary = run.train()
    dist.barrier()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"steps": seen, "summary": summary}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
