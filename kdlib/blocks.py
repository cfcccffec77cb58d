"""The blocks of a recipe as they are written. What is left to a plugin is a table with a ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdlib.schedules import Schedule
from kdlib.settings import RecipePath, Strict

Block = dict[str, Any]


class Optimizer(Strict):
    """An optimizer of torch and its settings; what is not given is torch's default."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.momentum is not None and self.kind != "sgd":
            raise ValueError(f"momentum is a setting of sgd, not of {self.kind}")
        return self

    def keywords(self) -> dict[str, float]:
        """Return what to pass beside parameters and lr."""
        given = {"weight_decay": self.weight_decay, "momentum": self.momentum}
        return {name: value for name, value in given.items() if value is not None}


class Train(Strict):
    """The settings of one training; they are those of :func:`kdlib.fit`."""

    epochs: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = 32
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    select: Literal["best", "last"] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    clip: Annotated[float, Field(gt=0)] | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1
    workers: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None


class Pretrain(Strict):
    """A first training: the model with some settings changed, whose weights are carried over by name and shape."""

    model: Block = Field(default_factory=dict)
    train: Block = Field(default_factory=dict)


class Inference(Strict):
    """How a teacher runs while it labels for a student (``teacher.inference``); it is trained as ``train`` says.

    ``precision`` and ``layout`` are those of the student's training where they are not given. With a precision a copy
    of the teacher has its weights and inputs in that type. ``compile`` takes it through ``torch.compile``, which costs
    seconds at the start; a training gains nothing by that and is not compiled.
    """

    precision: Literal["fp32", "bf16"] | None = None
    layout: Literal["contiguous", "channels_last"] | None = None
    compile: bool = False


class TeacherBlock(Strict):
    """The teacher: trained on hard labels, or loaded; and how it runs while it labels."""

    model: Block | None = None
    train: Block = Field(default_factory=dict)
    inference: Inference = Inference()
    weights: RecipePath | None = None
    pretrain: Pretrain | None = None
    cross_fit: Annotated[int, Field(ge=2)] | None = None


class StudentBlock(Strict):
    """The student: where it starts, and whether the same training without a teacher stands beside it."""

    model: Block | None = None
    train: Block = Field(default_factory=dict)
    start: Annotated[Literal["random", "teacher"] | RecipePath, Field(union_mode="left_to_right")] = "random"
    control: bool = False


class SystemBlock(Strict):
    """One teacher and one student on one kind of features."""

    features: Block | None = None
    model: Block | None = None
    teacher: TeacherBlock = TeacherBlock()
    student: StudentBlock = StudentBlock()
    source: Block | None = None
    points: dict[str, Block] = Field(default_factory=dict)
    train: Block = Field(default_factory=dict)


class Fusion(Strict):
    """How the scores of the systems become one."""

    kind: Literal["mean"] = "mean"
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    normalise: Literal["none", "z", "log_softmax"] = "none"


class CacheBlock(Strict):
    """Where features are kept from run to run: exactly, or in half the room."""

    folder: RecipePath
    dtype: Literal["float32", "float16"] = "float32"


class RecipeBlock(SystemBlock):
    """A recipe as it is written: one system at the top level, or several under ``systems``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "run"
    data: Block
    systems: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Block] = Field(default_factory=dict)
    scorer: Block | None = None
    fusion: Fusion | None = None
    cache: CacheBlock | None = None


class PointKeys(Strict):
    """What a point's block may hold beside the plugin's own settings."""

    weight: Annotated[float, Field(ge=0)] | Schedule = 1.0
    epochs: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=2, max_length=2)
    teacher: str | None = None
