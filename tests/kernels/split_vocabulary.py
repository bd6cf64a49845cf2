"""One of two ranks with a part of the vocabulary each; prints how far it is from the whole head in fp64."""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.distributed as dist

from cod_kernels import KernelInputError, linear_logprob, linear_segment_loss
from cod_kernels.linear_logprob.chunks import FirstProduct
from cod_kernels.linear_logprob.reference import linear_logprob_reference

ROWS, WIDTH, SIZES = 50, 12, (70, 43)


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(sum(SIZES), WIDTH, generator=generator)
    bias = torch.randn(sum(SIZES), generator=generator)
    targets = torch.randint(sum(SIZES), (ROWS,), generator=generator)
    g, h = torch.randn(2, ROWS, generator=generator)
    start = SIZES[0] * rank
    mine = slice(start, start + SIZES[rank])
    found: dict[str, float] = {}
    products: tuple[FirstProduct, ...] = ("plain", "fused")
    for softcap, product in itertools.product((None, 5.0), products):
        leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
        truth = linear_logprob_reference(leaves[0], leaves[1], targets, 0.8, leaves[2], softcap)
        ((truth[0] * g).sum() + (truth[1] * h).sum()).backward()
        own = [hidden.clone().requires_grad_(), *(t[mine].clone().requires_grad_() for t in (weight, bias))]
        values = linear_logprob(
            own[0], own[1], targets, temperature=0.8, bias=own[2], softcap=softcap, return_entropy=True,
            process_group=dist.group.WORLD, vocab_start=start, chunk_rows=16, first_product=product,
        )  # fmt: skip
        ((values[0] * g).sum() + (values[1] * h).sum()).backward()
        for name, a, b in (("logprob", values[0], truth[0]), ("entropy", values[1], truth[1])):
            found[f"{name}_{softcap}_{product}"] = float((a - b).abs().max())
        rights = (leaves[0].grad, leaves[1].grad[mine], leaves[2].grad[mine])  # type: ignore[index]
        for name, leaf, right in zip(("hidden", "weight", "bias"), own, rights, strict=True):
            found[f"d_{name}_{softcap}_{product}"] = float((leaf.grad - right).norm() / right.norm())  # type: ignore[operator, union-attr]
    behavior = truth[0].detach().float() + 0.1 * g
    ids, advantages, weights = (
        torch.arange(ROWS) // 10,
        torch.randn(5, generator=generator),
        torch.full((5,), 1 / ROWS),
    )
    full = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss, *_ = linear_segment_loss(*full, targets, behavior.double(), ids, advantages, weights)
    loss.backward()
    for product in products:
        own = [hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()]
        part, _, logprob = linear_segment_loss(
            *own, targets, behavior, ids, advantages, weights, process_group=dist.group.WORLD,
            vocab_start=start, chunk_rows=32, first_product=product,
        )  # fmt: skip
        part.backward()
        found[f"loss_{product}"] = float((part - loss).abs())
        for name, ours, right in (
            ("hidden", own[0].grad, full[0].grad),
            ("weight", own[1].grad, full[1].grad[mine]),  # type: ignore[index]
        ):
            found[f"loss_d_{name}_{product}"] = float((ours - right).norm() / right.norm())  # type: ignore[operator, union-attr]
        for name, tensor in (("logprob", logprob), ("hidden", own[0].grad)):
            same = [torch.empty_like(tensor) for _ in range(2)]  # type: ignore[arg-type]
            dist.all_gather(same, tensor)
            found[f"ranks_differ_{name}_{product}"] = float(not torch.equal(*same))
    lost = targets.clone()
    lost[3] = 113
    for product in products:
        try:
            linear_logprob(
                hidden, weight[mine], lost, process_group=dist.group.WORLD, vocab_start=start,
                first_product=product,
            )  # fmt: skip
            found[f"lost_target_{product}"] = 1.0
        except KernelInputError as error:
            is_named = "targets[3] = 113 is in no rank's part" in str(error)
            found[f"lost_target_{product}"] = float(not is_named)
    dist.destroy_process_group()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
