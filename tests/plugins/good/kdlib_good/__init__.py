"""A point of a third party."""

from torch.nn.functional import cosine_similarity

import kdlib


class HiddenCosine:
    """One minus the cosine similarity of one tap (Jung et al. 2018).

    Args:
        tap: the tap of both sides.
    """

    def __init__(self, *, tap: str = "embedding") -> None:
        self.tap = tap

    def __call__(self, student, teacher, batch):
        """Return the loss of the batch."""
        return 1 - cosine_similarity(student[self.tap], teacher[self.tap]).mean()


@kdlib.hookimpl
def kdlib_points():
    return {"good_cosine": HiddenCosine}
