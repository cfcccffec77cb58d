"""scikit-learn's handwritten digits and a small network for them: a data set that needs no download."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlib.data import Parts, TensorPart
from kdlib.errors import DataError
from kdlib.keyed import keyed


def digits(
    *, train: Annotated[int, Field(ge=10)] = 100, valid: Annotated[int, Field(ge=0)] = 0, seed: int = 0
) -> Parts:
    """Return the 1797 images of 8 x 8 pixels of the UCI digits (Alpaydin and Kaynak 1998), scaled to [0, 1].

    Training and validation images are drawn by the seed, as many of each class as possible; the rest is the test part.

    Args:
        train: training images, at least 10; training and validation together leave at least 100 for the test.
        valid: validation images, 0 for none.
        seed: keys the split.

    Raises:
        DataError: scikit-learn is not installed, or too few images would be left to test on.

    Example:
        >>> data = digits(train=100, valid=50)
        >>> len(data.train), len(data.valid), len(data.test), tuple(data.train[(0, 0)]["x"].shape)
        (100, 50, 1647, (64,))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("The digits come with scikit-learn: pip install 'kdlib-asc[asc]'.") from None
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    if len(x) - train - valid < 100:
        raise DataError(f"train={train} and valid={valid} leave fewer than 100 of the {len(x)} digits to test on.")
    shuffled = torch.randperm(len(x), generator=keyed(seed, "digits")).tolist()
    seen = [0] * 10
    rounds = []
    for index in shuffled:  # sorted by how many of its class came before it, so that every prefix is balanced
        rounds.append(seen[labels[index]])
        seen[labels[index]] += 1
    order = [index for _, index in sorted(zip(rounds, shuffled, strict=True), key=lambda pair: pair[0])]

    classes = tuple("0123456789")

    def part(indices: list[int]) -> TensorPart:
        return TensorPart(x[indices], labels[indices], ids=[f"digit-{index}" for index in indices], classes=classes)

    return Parts(
        train=part(order[:train]),
        valid=part(order[train : train + valid]) if valid else None,
        test=part(order[train + valid :]),
        classes=classes,
    )


class DigitsMLP(nn.Module):
    """A network of one hidden layer: 64 pixels, ``width`` rectified units (the embedding), ``classes`` logits.

    Args:
        width: hidden units, at least 1.
        classes: at least 2.

    Example:
        >>> import torch
        >>> {name: tuple(tap.shape) for name, tap in DigitsMLP(width=16)(torch.zeros(2, 64)).items()}
        {'logits': (2, 10), 'embedding': (2, 16)}
    """

    def __init__(self, *, width: Annotated[int, Field(ge=1)] = 16, classes: Annotated[int, Field(ge=2)] = 10) -> None:
        super().__init__()
        self.width = width
        self.classes = classes
        self.hidden = nn.Linear(64, width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the taps for pixels (B, 64)."""
        embedding = torch.relu(self.hidden(x))
        return {"logits": self.output(embedding), "embedding": embedding}
