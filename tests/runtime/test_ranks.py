"""Several processes: rows of every rank leave at layers of their own, whatever holds the weights."""

import pytest

from tests.helpers.ranks import on_two_ranks

pytestmark = pytest.mark.full  # two processes each

START = """
import os, sys
import torch, torch.distributed as dist
import dyvte
from dyvte.policies import OraclePolicy
from tests.helpers.batches import batch, VISUAL_ID
from tests.helpers.models import tiny_llava
from tests.helpers.reference import greedy_cached
from tests.runtime.test_gates import make_gates

rank = int(os.environ["RANK"])
exits = [[0, 1, 2, 4, -1, 3], [4, 3, 1, 1, -1, 0]][rank]
freezes = [[0, 0, 2, 1, 0, 2], [1, 3, 0, 1, 0, 0]][rank]
oracle = dyvte.VisualExit.from_policy(OraclePolicy(exits))
schedule = dyvte.VisualExit.from_policy(OraclePolicy(exits, freezes))
plain, processor = tiny_llava()
inputs = batch(processor)


def alone(policy, model=plain):
    with policy(model) as run:
        logits, tokens, _ = greedy_cached(model, inputs, [VISUAL_ID], 4)
    return logits, tokens, run.exit_layers.tolist()


def check(got, expected):
    assert got[2] == expected[2], (got[2], expected[2])
    assert (got[0] - expected[0]).abs().max() < 1e-4, (got[0] - expected[0]).abs().max()
    assert torch.equal(got[1], expected[1])


def done():
    print(f"rank {rank} exact", file=sys.stderr, flush=True)
    dist.barrier()
    os._exit(0)  # DeepSpeed may abort while the interpreter shuts down


expected = alone(oracle)
assert expected[2] == exits
"""

ZERO3 = """
import deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from deepspeed.utils import set_z3_leaf_modules

deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
model, _ = tiny_llava()
model.requires_grad_(True)
set_z3_leaf_modules(model, [type(model.get_decoder().layers[0])])
engine = deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
})[0]
engine.eval()
assert next(engine.module.get_decoder().layers[0].parameters()).numel() == 0, "weights are not sharded"
with torch.no_grad():
    check(alone(oracle, engine), expected)
    check(alone(schedule, engine), alone(schedule))
done()
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel

def last_loss(model):
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with oracle(model) as run:
        logits = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
    assert run.exit_layers.tolist() == exits
    model.zero_grad()
    logits.float().log_softmax(-1)[:, 7].sum().backward()
    return logits.detach()

dist.init_process_group("gloo")
model, _ = tiny_llava()
model.get_decoder().layers.requires_grad_(True)
logits = last_loss(model)
mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
for grad in mine.values():
    dist.all_reduce(grad)
wrapped = DistributedDataParallel(model)
assert torch.equal(last_loss(wrapped), logits)
# different exits per rank, gradients averaged as without exits
assert all(v.abs().max() > 0 for v in mine.values())
for name, p in model.named_parameters():
    if p.requires_grad:
        torch.testing.assert_close(p.grad, mine[name] / 2, rtol=1e-4, atol=1e-6)
with torch.no_grad():
    check(alone(oracle, wrapped), expected)
    check(alone(schedule, wrapped), alone(schedule))
assert not any("forward" in vars(module) for module in model.modules())
done()
"""

FSDP2 = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

mesh = init_device_mesh("cpu", (2,))
model, _ = tiny_llava()
for layer in model.get_decoder().layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
weight = next(model.get_decoder().layers[0].parameters())
assert isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel(), "weights are not sharded"
with torch.no_grad():
    check(alone(oracle, model), expected)
    check(alone(schedule, model), alone(schedule))
    gates = dyvte.VisualExit(make_gates())
    check(alone(gates, model), alone(gates))
done()
"""

TENSOR_PARALLEL = """
import tempfile
from transformers import LlavaForConditionalGeneration

dist.init_process_group("gloo")
folder = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(folder)
if rank == 0:
    plain.save_pretrained(folder[0])
dist.barrier()
model = LlavaForConditionalGeneration.from_pretrained(folder[0], tp_plan="auto", device_map=None).eval()
weight = model.get_decoder().layers[0].mlp.gate_proj.weight
whole = plain.get_decoder().layers[0].mlp.gate_proj.weight
assert getattr(weight, "to_local", lambda: weight)().numel() < whole.numel(), "weights are not sharded"
model.generation_config = plain.generation_config
# the ranks run one batch
shared = dyvte.VisualExit.from_policy(OraclePolicy([0, 1, 2, 4, -1, 3]))
frozen = dyvte.VisualExit.from_policy(OraclePolicy([2, 1, 3, 4, -1, 3], [0, 1, 2, 0, 0, 3]))
gates = dyvte.VisualExit(make_gates())
with torch.no_grad():
    for policy in (shared, frozen, gates):
        got = alone(policy, model)
        check(got, alone(policy))
        decisions = [None, None]
        dist.all_gather_object(decisions, got[2])
        assert decisions[0] == decisions[1]
assert len(set(got[2])) >= 3, got[2]
done()
"""


@pytest.mark.parametrize(
    "script", [ZERO3, DDP, FSDP2, TENSOR_PARALLEL], ids=["ZeRO-3", "DDP", "FSDP2", "tensor parallel"]
)
def test_two_ranks_equal_one_process(script, tmp_path):
    on_two_ranks(tmp_path, START + script)
