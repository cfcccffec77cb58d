"""The blocks of a recipe as they are written. What is left to a plugin is a table with a ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from kdlib.schedules import Schedule
from kdlib.settings import RecipePath, Strict

Block = dict[str, Any]


class Written(Strict):
    """A block whose fields are explained by the docstrings below them, here, in the schema and in the reference."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Optimizer(Written):
    """An optimizer of torch and its settings; what is not given is torch's default."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer of torch."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The learning rate; with `schedule = "one_cycle"` its peak."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay; of `adamw` decoupled."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum, of `sgd` only."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.momentum is not None and self.kind != "sgd":
            raise ValueError(f"momentum is a setting of sgd, not of {self.kind}")
        return self

    def keywords(self) -> dict[str, float]:
        """Return what to pass beside parameters and lr."""
        given = {"weight_decay": self.weight_decay, "momentum": self.momentum}
        return {name: value for name, value in given.items() if value is not None}


class Train(Written):
    """The settings of one training; they are those of :func:`kdlib.fit`."""

    epochs: Annotated[int, Field(ge=1)]
    """Passes over the training part; `teacher.train` or `student.train` may give it for one role."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Rows a batch; the last of an epoch has what is left."""
    optimizer: Optimizer = Optimizer()
    """A table with `kind` and `lr`."""
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    """The learning rate over all optimizer steps: held, torch's OneCycleLR, or a cosine to 0."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Keys everything random of the training."""
    device: str = "auto"
    """`auto` takes CUDA where there is one, else the processor; or a device of torch such as `cuda:1`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward under autocast; weights stay float32."""
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    """`channels_last` is faster for 2-D convolutions on many machines."""
    select: Literal["best", "last"] | None = None
    """Keep the epoch of the lowest validation loss, or the last; without it `best` where there is a validation part."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many epochs without a better validation loss."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches an optimizer step; batch norm still sees single batches."""
    batch_norm: Literal["local", "sync"] = "local"
    """Of several ranks: each normalises by its own rows, or by those of all (on CUDA only)."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load clips; their number changes no result."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Threads of torch during the training; results are equal to the bit at an equal number."""


class Pretrain(Written):
    """A first training: the model with some settings changed, whose weights are carried over by name and shape."""

    model: Block = Field(default_factory=dict)
    """Settings of the model that are changed for the first training."""
    train: Block = Field(default_factory=dict)
    """Keys of `train` that are changed for it."""


class Inference(Written):
    """How a teacher runs while it labels for a student; it is trained as ``train`` says."""

    precision: Literal["fp32", "bf16"] | None = None
    """A copy with its weights and inputs in this type; without it as the student's training."""
    layout: Literal["contiguous", "channels_last"] | None = None
    """Without it as the student's training."""
    compile: bool = False
    """Through `torch.compile`, which takes seconds at the start and a C++ compiler."""


class TeacherBlock(Written):
    """The teacher: trained on hard labels, or loaded; and how it runs while it labels."""

    model: Block | None = None
    """Settings that differ from `model`, or another kind of model."""
    train: Block = Field(default_factory=dict)
    """Keys of `train` that differ for the teacher."""
    inference: Inference = Inference()
    """A table with `precision`, `layout` and `compile`: how it runs while it labels for a student."""
    weights: RecipePath | None = None
    """Load the teacher from this file instead of training it."""
    pretrain: Pretrain | None = None
    """A first training that the weights start from; so does a student that starts at random."""
    cross_fit: Annotated[int, Field(ge=2)] | None = None
    """So many teachers, each trained without one part of the recordings, which it then labels."""


class StudentBlock(Written):
    """The student: where it starts, and whether the same training without a teacher stands beside it."""

    model: Block | None = None
    """Settings that differ from `model`, or another kind of model."""
    train: Block = Field(default_factory=dict)
    """Keys of `train` that differ for the student."""
    start: Annotated[Literal["random", "teacher"] | RecipePath, Field(union_mode="left_to_right")] = "random"
    """Where its weights start: `random`, the `teacher`'s, or a file."""
    control: bool = False
    """Train the same network beside it for as many updates on hard labels alone: the rows `continued` or `alone`."""


class SystemBlock(Written):
    """One teacher and one student on one kind of features."""

    features: Block | None = None
    """What a network eats is made of the data by this; without it the data as it is."""
    model: Block | None = None
    """The network, of both roles where they do not say otherwise."""
    teacher: TeacherBlock = TeacherBlock()
    """A table about the teacher."""
    student: StudentBlock = StudentBlock()
    """A table about the student."""
    source: Block | None = None
    """What the teacher sees; without it one network is trained, on hard labels."""
    points: dict[str, Block] = Field(default_factory=dict)
    """Where student and teacher are compared: a table of points by names of yours."""
    train: Block = Field(default_factory=dict)
    """Settings of all trainings of the system."""


class Fusion(Written):
    """How the scores of the systems become one."""

    kind: Literal["mean"] = "mean"
    """The scores are averaged."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """The weight of a system by its name, 1 where none is given."""
    normalise: Literal["none", "z", "log_softmax"] = "none"
    """Before the average: nothing, mean 0 and variance 1 over the training part, or log-softmax."""


class CacheBlock(Written):
    """Where features are kept from run to run: exactly, or in half the room."""

    folder: RecipePath
    """The folder; runs may share it."""
    dtype: Literal["float32", "float16"] = "float32"
    """`float16` takes half the room and rounds to 11 significant bits."""


class RecipeBlock(SystemBlock):
    """A recipe as it is written: one system at the top level, or several under ``systems``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "run"
    """The run's name, and that of its folder under `runs/`."""
    data: Block
    """The data set."""
    systems: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Block] = Field(default_factory=dict)
    """Several systems by name; of the keys of a system then only `train` stands at the top level, their default."""
    scorer: Block | None = None
    """A classifier on the embeddings of each finished network; without it the scores are log-softmax."""
    fusion: Fusion | None = None
    """How the scores of several systems become one."""
    cache: CacheBlock | None = None
    """Where features are kept from run to run."""


class PointKeys(Written):
    """What a point's block may hold beside the plugin's own settings."""

    weight: Annotated[float, Field(ge=0)] | Schedule = 1.0
    """The factor of the point in the total, or a schedule of it; at 0 it is not computed."""
    epochs: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=2, max_length=2)
    """First epoch in which the point counts, and first in which it does not any more, from 0."""
    teacher: str | None = None
    """Which of several teachers the point sees: it gets the taps under this name."""
