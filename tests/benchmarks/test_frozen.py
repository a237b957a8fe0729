"""The ideal that freezes are timed against computes what the runtime computes: FLOPs, no timings."""

import common
import passes
import pytest
import random_llava
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(run):
    """Of products, attention computed by plain ones."""
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("heads", [[], ["--key-heads", "1"]])
@pytest.mark.parametrize(("f", "k"), [(1, 4), (0, 2), (1, 2), (2, 2)])
def test_the_ideal_of_a_schedule_costs_what_the_runtime_computes(f, k, heads):
    args = common.arguments("").parse_args(["--hidden", "128", "--layers", "4", *heads])
    model = random_llava.build_model(args)
    run = passes.prefill_pass(model, random_llava.make_inputs(model, 1), random_llava.oracle([k], [f]))
    ideal = [
        passes.rest_pass(model, random_llava.make_inputs(model, 1)),
        passes.layer_pass(model, 1, common.TOKENS, 0, f),
        passes.frozen_pass(model, 1, f, k),
        passes.layer_pass(model, 1, common.TEXT, k, 4),
    ]
    assert flops(run) == sum(flops(part) for part in ideal)


def test_schedules_are_read():
    assert [common.schedule(text) for text in ("2:8", "4", "0:0")] == [(2, 8), (4, 4), (0, 0)]
    for text in ("5:4", "a", "1:2:3", ""):
        with pytest.raises(Exception, match="expected F:K"):
            common.schedule(text)
