"""Divergence, log-probabilities and entropy on logits that lie in pieces of the vocabulary on tensor-parallel ranks.

No rank ever holds a row's whole logits: maxima, sums of exponentials and the divergence itself are summed over the
group. All is fp32. Rows are independent, so context parallelism needs nothing.

Of a teacher's k likeliest tokens only, the others count as one event, "another token": the divergence is then that of
the coarser distributions, never more than the whole one and zero where that is. To spread the teacher's mass over the k
alone instead would teach the student that nothing else ever comes (arXiv 2503.16870, section 3).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def divergence(student: Tensor, teacher: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """KL(teacher || student) of every row, both at ``temperature``.

    Args:
        student, teacher: logits [n, vocabulary / ranks]; gradients go to the student's only.
        group: the tensor-parallel ranks, each with its piece of the vocabulary, in order.

    Returns:
        fp32 [n], the same on all ranks.
    """
    return _Full.apply(student, teacher, temperature, group)


def top_k_divergence(
    student: Tensor, ids: Tensor, log_probabilities: Tensor, temperature: float, group: ProcessGroup
) -> Tensor:
    """KL(teacher || student) where the teacher tells its k likeliest tokens only.

    Args:
        student: logits [n, vocabulary / ranks].
        ids: int [n, k] of the whole vocabulary, no id twice in a row, the same on all ranks.
        log_probabilities: the teacher's, at ``temperature``, [n, k].
        temperature: of the student.
        group: as for :func:`divergence`.

    Returns:
        fp32 [n], the same on all ranks.
    """
    return _TopK.apply(student, ids, log_probabilities, temperature, group)


def likeliest(logits: Tensor, k: int, temperature: float, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of every row.

    Args:
        logits: [n, vocabulary / ranks].
        k: at most the vocabulary.
        group: as for :func:`divergence`.

    Returns:
        ids int64 [n, k] and log-probabilities at ``temperature``, fp32 [n, k], likeliest first; the same on all ranks.
    """
    scores = _log_softmax(logits, temperature, group)
    values, ids = scores.topk(min(k, scores.size(1)), dim=1)
    if group.size() > 1:
        ids = ids + group.rank() * scores.size(1)
        values, ids = (torch.cat(_gathered(part, group), 1) for part in (values, ids))
        values, places = values.topk(k, dim=1)
        ids = ids.gather(1, places)
    return ids, values


def token_log_probabilities(logits: Tensor, labels: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """Log-probability of one token of every row.

    Args:
        logits: [n, vocabulary / ranks]; left as they are.
        labels: int64 [n], of the whole vocabulary.
        group: as for :func:`divergence`.

    Returns:
        fp32 [n], the same on all ranks.
    """
    return _LogProbability.apply(logits, labels, temperature, group)


def entropy(logits: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """Entropy of every row in nats, fp32 [n]; arguments as :func:`token_log_probabilities`."""
    return _Entropy.apply(logits, temperature, group)


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
        log_p = _log_softmax(logits, temperature, group)
        place = labels - group.rank() * log_p.size(1)
        here = (place >= 0) & (place < log_p.size(1))
        place = place.where(here, 0).unsqueeze(1)
        told = _sum(log_p.gather(1, place)[:, 0].where(here, 0), group)
        # Of log p(label) the gradient is one at the label, less p everywhere.
        ctx.save_for_backward(log_p.exp_().neg_().scatter_add_(1, place, here.float().unsqueeze(1)))
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return told

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _gradient(ctx, grad)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
        log_p = _log_softmax(logits, temperature, group)
        p = log_p.exp()
        total = -_sum(torch.special.xlogy(p, p).sum(1), group)
        ctx.save_for_backward(-p * (log_p.clamp(min=torch.finfo(torch.float32).min) + total.unsqueeze(1)))
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _gradient(ctx, grad)[:3]


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
        log_q, log_p = (_log_softmax(logits, temperature, group) for logits in (student, teacher))
        p = log_p.exp()
        total = log_p.sub_(log_q).mul_(p).sum(1)
        ctx.save_for_backward(log_q.exp_().sub_(p))  # q - p is the gradient already
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return _sum(total, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _gradient(ctx, grad)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, ids: Tensor, log_p: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
        log_q = _log_softmax(student, temperature, group)
        rows, size = log_q.shape
        place = ids.long() - group.rank() * size
        here = (place >= 0) & (place < size)
        place = place.where(here, size)  # one column more than there is, for the tokens of other ranks
        told = _sum(torch.nn.functional.pad(log_q, (0, 1)).gather(1, place), group)

        log_p = log_p.float()
        p, q = log_p.exp(), log_q.exp_()
        others = torch.ones(rows, size + 1, dtype=torch.bool, device=q.device).scatter_(1, place, False)[:, :size]
        # From the sum of the others, because 1 - the rest would be lost in rounding.
        q_rest = _sum((q * others).sum(1), group).clamp(min=torch.finfo(torch.float32).tiny)
        whole = ids.size(1) == size * group.size()
        p_rest = torch.zeros_like(q_rest) if whole else (1 - p.sum(1)).clamp(min=0)
        total = (p * (log_p - told)).sum(1) + torch.special.xlogy(p_rest, p_rest / q_rest)

        share = (p_rest / q_rest).unsqueeze(1)
        mass = (p.sum(1) + p_rest).unsqueeze(1)  # 1 but for rounding
        wanted = torch.zeros(rows, size + 1, device=q.device).scatter_add_(1, place, p)[:, :size]
        ctx.save_for_backward(q * (mass - share * others) - wanted)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return *_gradient(ctx, grad), None


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (difference,) = ctx.saved_tensors
    return (difference * (grad.float() / ctx.temperature).unsqueeze(1)).to(ctx.dtype), None, None, None


def _log_softmax(logits: Tensor, temperature: float, group: ProcessGroup) -> Tensor:
    """fp32 [n, vocabulary / ranks], a tensor of its own."""
    scores = logits.float() / temperature
    highest = scores.amax(1, keepdim=True)
    if group.size() > 1:
        torch.distributed.all_reduce(highest, op=ReduceOp.MAX, group=group)
    scores -= highest
    return scores.sub_(_sum(scores.exp().sum(1, keepdim=True), group).log_())


def _sum(values: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def _gathered(values: Tensor, group: ProcessGroup) -> list[Tensor]:
    pieces = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(pieces, values.contiguous(), group=group)
    return pieces
