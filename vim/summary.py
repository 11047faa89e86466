"""How large a model is and what an image costs: `python main.py --summary --model NAME`.

Counted by torch's FLOP counter; our operations register their formulas, which count both directions.
"""

from collections import Counter

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Two products, (L, E) x (E, S) and (L, S) x (S, E), of each head: torch knows them of its GPU kernels alone."""
    return sdpa_flop_count(query, key, value)


# What scaled_dot_product_attention calls on a CPU.
ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def summary(model: nn.Module, size: tuple[int, int], in_chans: int = 3) -> str:
    """A table of parameters and forward GFLOPs of one image, a row for each part of `model`."""
    image = torch.zeros(1, in_chans, *size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        model.eval()(image)
    parameters, operations = _parameters_by_part(model), Counter()
    for module, counts in counter.get_flop_counts().items():
        path = module.split(".")[1:]
        # A list of blocks is never called itself: its members are.
        in_list = len(path) == 2 and isinstance(getattr(model, path[0], None), nn.ModuleList)
        if len(path) == 1 or in_list:
            operations[path[0]] += sum(counts.values())
    total = counter.get_total_flops()
    operations["(outside of these)"] = total - sum(operations.values())
    rows = [(part, parameters[part], operations[part]) for part in dict.fromkeys([*parameters, *operations])]
    rows = [row for row in rows if row[1] or row[2]]
    count = sum(parameters.values())
    lines = [f"{'part':<20} {'parameters':>14} {'GFLOPs':>10}"]
    lines += [f"{part:<20} {number:>14,} {flops / 1e9:>10.3f}" for part, number, flops in rows]
    lines.append(f"{'total':<20} {count:>14,} {total / 1e9:>10.3f}")
    by_kind = ", ".join(f"{kind} {flops / 1e9:.3f}" for kind, flops in _by_operation(counter))
    lines.append(f"one image of {size[0]} x {size[1]}, forward; a multiplication and an addition are 2 FLOPs")
    lines.append(f"by operation: {by_kind}")
    return "\n".join(lines)


def _parameters_by_part(model: nn.Module) -> Counter:
    """Parameters of each child; those that the model holds itself count under their own names."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    return counts


def _by_operation(counter: FlopCounterMode) -> list[tuple[str, int]]:
    counts = Counter()
    for operation, flops in counter.get_flop_counts()["Global"].items():
        counts[str(operation).removeprefix("aten.")] += flops
    return counts.most_common()
