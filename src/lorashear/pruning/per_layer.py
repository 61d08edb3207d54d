"""The per-layer shape: widths follow the scores over all layers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lorashear.pruning.budget import Block, Budget


def layer_counts(budget: Budget) -> dict[str, int]:
    """Group -> number of structures that it loses.

    Takes blocks of all groups in one order, by score lost per parameter saved, as far as the budget goes. Where a coarse
    block (a head) would go past it, finer ones behind it make up what is missing.

    Raises:
        PlanError: when all groups together do not have as many parameters to lose, or what is fixed loses more.
    """
    graph, missing = budget.graph, budget.missing
    beyond = -missing({})  # a residual stream that takes more than the whole budget
    if beyond > 0.005 * budget.whole:
        raise budget.unreachable(budget.target + beyond, "per-layer")
    blocks = sorted(_blocks(budget))

    def prefix(length: int) -> dict[str, int]:
        result: dict[str, int] = {}
        for block in blocks[:length]:
            result[block.name] = max(result.get(block.name, 0), graph[block.name].size - block.kept)
        return result

    out_of_reach = missing(prefix(len(blocks)))
    if out_of_reach > 0.005 * budget.whole:
        raise budget.unreachable(budget.target - out_of_reach, "per-layer")
    low, high = sum(block.required for block in blocks), len(blocks)
    while low < high:  # longest prefix within the budget
        middle = (low + high + 1) // 2
        low, high = (middle, high) if missing(prefix(middle)) >= 0 else (low, middle - 1)
    counts = prefix(low)
    gap = missing(counts)
    next_blocks: dict[str, Block] = {}  # a group's blocks come in their order: the first that is passed over ends it
    for block in blocks[low:]:
        if block.name in next_blocks:
            continue
        more = {**counts, block.name: graph[block.name].size - block.kept}
        if block.parameters <= gap and (rest := missing(more)) >= 0:
            counts, gap = more, rest
        else:
            next_blocks[block.name] = block
    if next_blocks and gap > 0:  # the finest of them, where going past the budget by it comes nearer
        finest = min(next_blocks.values(), key=lambda block: (block.parameters, block))
        more = {**counts, finest.name: graph[finest.name].size - finest.kept}
        counts = more if abs(missing(more)) < gap else counts
    return counts


def _blocks(budget: Budget) -> Iterator[Block]:
    graph, fixed = budget.graph, budget.fixed
    total = graph.kept_parameters(fixed)
    for group in budget.groups:
        per_structure = total - graph.kept_parameters({**fixed, group.name: (0,)})
        order = budget.orders[group.name]
        price = float("-inf")
        widths = budget.widths(group)
        for step, (before, kept) in enumerate(pairwise(widths)):
            lost = float(order.loss[group.size - kept] - order.loss[group.size - before])
            parameters = per_structure * (before - kept)
            if group.size - before >= order.taken:
                price = max(price, lost / parameters)  # a group's blocks come in their order, whatever their lengths
            yield Block(price, step, group.name, kept, lost, parameters)
