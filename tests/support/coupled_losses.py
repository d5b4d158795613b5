"""Losses that compare rows, most of them only where labels differ or are the same, beside honest ones on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_embedding_loss,
    cross_entropy,
    mse_loss,
    normalize,
    one_hot,
    soft_margin_loss,
)
from torch.utils.data import default_collate

from dp_flash_hf.integrations.accelerate import LoopAdapter
from dp_flash_hf.training.session import PrivateTraining
from tests.support.trainers import config

Loss = Callable[[Any, dict[str, Tensor]], Any]
WIDTH, CLASSES = 6, 3


class Scores(nn.Module):
    """A hidden layer, a score of every row, and logits of three classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.hidden, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 1 + CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (rows, 8), scores (rows,), logits (rows, classes)."""
        hidden = torch.tanh(self.hidden(x))
        out = self.head(hidden)
        return hidden, out[:, 0], out[:, 1:]


def rows(seed: int, n: int = 60, positives: float = 0.1) -> list[dict[str, Tensor]]:
    """Rows of which a tenth is positive, with a label of every kind."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        positive = bool(torch.rand((), generator=generator) < positives)
        made.append(
            {
                "x": torch.randn(WIDTH, generator=generator),
                "y": torch.tensor(float(positive)),
                "sign": torch.tensor(1.0 if positive else -1.0),
                "kind": torch.tensor(int(positive)),
                "tags": torch.tensor([float(positive), 0.0, 0.0]),
            }
        )
    return made


def checked(
    loss: Loss, data: Any, *, seed: int = 0, model: nn.Module | None = None, collate: Callable[[Any], Any] = default_collate
) -> PrivateTraining:
    """A training of these rows that has passed its checks; they raise where they refuse it."""
    model = Scores(seed) if model is None else model
    training = PrivateTraining(
        config(),
        data,
        LoopAdapter(model, Accelerator(cpu=True), loss),
        expected_batch_size=min(8, len(data)),
        steps=50,
        epochs=0.0,
        max_examples=16,
        max_tokens=None,
        strategy="bookkeeping",
    )
    training.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    training.check(training.loader(data, collate, steps=1, first_step=0))
    return training


def _pairs(batch: dict[str, Tensor], name: str = "y") -> Tensor:
    """(rows, rows) bool: whether the label of the first is above that of the second."""
    return batch[name].unsqueeze(1) > batch[name].unsqueeze(0)


def _differences(scores: Tensor) -> Tensor:
    return scores.unsqueeze(1) - scores.unsqueeze(0)


def cosent(model: Any, batch: dict[str, Tensor]) -> Any:
    """https://kexue.fm/archives/8847: log(1 + sum over pairs)."""
    worse = (-20 * _differences(model(batch["x"])[1]))[_pairs(batch)]
    return torch.logsumexp(torch.cat([worse.new_zeros(1), worse]), 0)


def ranknet(model: Any, batch: dict[str, Tensor]) -> Any:
    """Burges et al. 2005."""
    differences = _differences(model(batch["x"])[1])[_pairs(batch)]
    return nn.functional.softplus(-differences).sum() / max(len(differences), 1)


def mse_and_rank(model: Any, batch: dict[str, Tensor]) -> Any:
    return mse_loss(model(batch["x"])[1], batch["y"]) + 0.1 * ranknet(model, batch)


def margin(model: Any, batch: dict[str, Tensor]) -> Any:
    """Scores of positive rows above those of all negative ones."""
    apart = _differences(model(batch["x"])[1])[_pairs(batch, "sign")]
    return (1 - apart).clamp(min=0).sum()


def balanced(model: Any, batch: dict[str, Tensor]) -> Any:
    """Cross entropy with a weight that is the batch's ratio of negative to positive rows."""
    positive = batch["y"].sum()
    weight = torch.where(positive > 0, (len(batch["y"]) - positive) / positive.clamp(min=1), torch.ones(()))
    return binary_cross_entropy_with_logits(model(batch["x"])[1], batch["y"], pos_weight=weight)


def pearson(model: Any, batch: dict[str, Tensor]) -> Any:
    scores, y = model(batch["x"])[1], batch["y"]
    scores, y = scores - scores.mean(), y - y.mean()
    return 1 - (scores * y).sum() / (scores.norm() * y.norm() + 1e-8)


def triplet(model: Any, batch: dict[str, Tensor]) -> Any:
    """Schroff et al. 2015, over all triplets of the batch."""
    distance = torch.cdist(model(batch["x"])[0], model(batch["x"])[0])
    same = batch["kind"].unsqueeze(1) == batch["kind"].unsqueeze(0)
    others = same & ~torch.eye(len(same), dtype=torch.bool)
    terms = (distance.unsqueeze(2) - distance.unsqueeze(1) + 0.5).clamp(min=0)
    return (terms * (others.unsqueeze(2) & ~same.unsqueeze(1))).sum()


def centres(model: Any, batch: dict[str, Tensor]) -> Any:
    """Distances to the batch's centre of the same class: two rows of one class are needed."""
    hidden, _, logits = model(batch["x"])
    of_class = one_hot(batch["kind"], CLASSES).to(hidden.dtype)
    centre = (of_class.T @ hidden) / of_class.sum(0).clamp(min=1).unsqueeze(1)
    return cross_entropy(logits, batch["kind"]) + (hidden - centre[batch["kind"]]).square().sum(1).mean()


def smoothed_by_prior(model: Any, batch: dict[str, Tensor]) -> Any:
    prior = one_hot(batch["kind"], CLASSES).float().mean(0)
    return cross_entropy(model(batch["x"])[2], 0.9 * one_hot(batch["kind"], CLASSES) + 0.1 * prior)


def weighted_by_frequency(model: Any, batch: dict[str, Tensor]) -> Any:
    """Focal loss, of classes that are rare in the batch above all."""
    each = cross_entropy(model(batch["x"])[2], batch["kind"], reduction="none")
    frequency = one_hot(batch["kind"], CLASSES).float().mean(0)[batch["kind"]]
    return ((1 - (-each).exp()).square() * each * (1.5 - frequency)).mean()


def in_batch_contrastive(model: Any, batch: dict[str, Tensor]) -> Any:
    hidden = normalize(model(batch["x"])[0], dim=1)
    return cross_entropy(hidden @ hidden.T * 5, torch.arange(len(hidden)))


def supervised_contrastive(model: Any, batch: dict[str, Tensor]) -> Any:
    """Khosla et al. 2020: rows without another one of their class add nothing."""
    hidden = normalize(model(batch["x"])[0], dim=1)
    eye = torch.eye(len(hidden), dtype=torch.bool)
    shares = (hidden @ hidden.T * 5).masked_fill(eye, -torch.inf).log_softmax(1)
    same = (batch["kind"].unsqueeze(1) == batch["kind"].unsqueeze(0)) & ~eye
    return -shares[same].sum()


def worst_rows(model: Any, batch: dict[str, Tensor]) -> Any:
    """Distributionally robust: weights fall with the distance from the batch's largest loss."""
    each = cross_entropy(model(batch["x"])[2], batch["kind"], reduction="none")
    return (each * (each.detach() - each.detach().max()).exp()).mean()


def scaled_by_variance(model: Any, batch: dict[str, Tensor]) -> Any:
    scores = model(batch["x"])[1]
    return (scores - batch["y"]).square().mean() / (1 + scores.var(correction=0).detach())


def marginal_entropy(model: Any, batch: dict[str, Tensor]) -> Any:
    """Classes used alike over the batch."""
    logits = model(batch["x"])[2]
    mean = logits.float().softmax(1).mean(0)
    return cross_entropy(logits.float(), batch["kind"]) - 0.1 * torch.special.entr(mean).sum()


def weighted_by_tags(model: Any, batch: dict[str, Tensor]) -> Any:
    """Several labels a row, each with the weight that the batch gives it."""
    positive = batch["tags"].sum(0)
    weight = (len(batch["tags"]) - positive + 1) / (positive + 1)
    return binary_cross_entropy_with_logits(model(batch["x"])[2], batch["tags"], pos_weight=weight)


NAMED: list[Loss] = [cosent, ranknet, mse_and_rank, margin, balanced, pearson]
COUSINS: list[Loss] = [
    triplet,
    centres,
    smoothed_by_prior,
    weighted_by_frequency,
    in_batch_contrastive,
    supervised_contrastive,
    worst_rows,
    scaled_by_variance,
    marginal_entropy,
    weighted_by_tags,
]


def of_scores(model: Any, batch: dict[str, Tensor]) -> Any:
    return mse_loss(model(batch["x"])[1], batch["y"])


def of_one_logit(model: Any, batch: dict[str, Tensor]) -> Any:
    return binary_cross_entropy_with_logits(model(batch["x"])[1], batch["y"], pos_weight=torch.tensor(9.0))


def of_signs(model: Any, batch: dict[str, Tensor]) -> Any:
    return soft_margin_loss(model(batch["x"])[1], batch["sign"])


def of_hinges(model: Any, batch: dict[str, Tensor]) -> Any:
    return (1 - model(batch["x"])[1] * batch["sign"]).clamp(min=0).mean()


def of_classes(model: Any, batch: dict[str, Tensor]) -> Any:
    return cross_entropy(model(batch["x"])[2], batch["kind"], label_smoothing=0.1)


def of_tags(model: Any, batch: dict[str, Tensor]) -> Any:
    return binary_cross_entropy_with_logits(model(batch["x"])[2], batch["tags"])


def of_pairs_in_a_row(model: Any, batch: dict[str, Tensor]) -> Any:
    logits: Tensor = model.head(model.hidden(batch["x"]))
    return cosine_embedding_loss(logits[:, :2], logits[:, 2:], batch["sign"])


def of_two_labels(model: Any, batch: dict[str, Tensor]) -> Any:
    return of_scores(model, batch) + of_classes(model, batch)


HONEST: list[Loss] = [of_scores, of_one_logit, of_signs, of_hinges, of_classes, of_tags, of_pairs_in_a_row, of_two_labels]
