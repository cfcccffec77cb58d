"""A distiller's step beside loops by hand and beside other libraries, on the same batches from the same weights."""

import copy
import importlib.util
import logging

import pytest
import torch
import torch.nn.functional as F

import kdlib
from kdlib.bench import (
    HINT,
    SIZES,
    TEMPERATURE,
    Trained,
    alone_by_hand,
    by_distiller,
    by_hand,
    distilled,
    loss_by_hand,
    made,
    marked,
    tapped,
)
from kdlib.sources import SameInput, Stored
from kdlib.storing import build_store
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(3600)]  # theirs, on import
INPUTS = {"spectrogram": (SpectrogramCNNGRU, (2, 249, 256)), "raw": (WaveCNN, (2, 479_999))}
BATCH = 8


def lightning(teacher, student, batches):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = student

        def training_step(self, batch, _):
            return loss_by_hand(teacher, self.student, batch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.student.parameters())

    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=1, accelerator="cpu", **off).fit(Module(), batches)


def accelerate(teacher, student, batches):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(student, torch.optim.Adam(student.parameters()))
    for batch in batches:
        loss = loss_by_hand(teacher, model, batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


class _Hint(torch.nn.modules.loss._Loss):
    def forward(self, student, teacher):
        return F.mse_loss(student, teacher, reduction="sum") / (2 * len(student))


def modelopt(teacher, student, batches):
    import modelopt.torch.distill as mtd

    config = {
        "teacher_model": copy.deepcopy(teacher),
        "criterion": {
            ("output", "output"): mtd.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean"),
            ("embedding", "embedding"): _Hint(),
        },
        "loss_balancer": mtd.StaticLossBalancer([1 - HINT, HINT]),
    }
    model = mtd.convert(copy.deepcopy(student), mode=[("kd_loss", config)])
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    for batch in batches:
        model(batch["x"])
        loss = model.compute_kd_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model.state_dict()
    student.load_state_dict({name: trained[name] for name in student.state_dict()})


def textbrewer(teacher, student, batches, folder):
    import textbrewer

    logging.getLogger("Distillation").setLevel(logging.ERROR)

    def adaptor(batch, taps):
        return {"logits": (taps["logits"],), "hidden": (taps["embedding"],)}

    width = student.embedding.out_features
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": HINT * width / 2}
    training = textbrewer.TrainingConfig(output_dir=str(folder), log_dir=None, device="cpu", ckpt_frequency=1)
    distillation = textbrewer.DistillationConfig(
        temperature=TEMPERATURE,
        kd_loss_type="ce",
        kd_loss_weight=(1 - HINT) * TEMPERATURE**2,
        hard_label_weight=0,
        intermediate_matches=[match],
    )
    distiller = textbrewer.GeneralDistiller(training, distillation, teacher, student, adaptor, adaptor)
    with distiller:
        distiller.train(
            torch.optim.Adam(student.parameters()),
            batches,
            num_epochs=1,
            batch_postprocessor=lambda batch: (batch["x"],),
        )


PEERS = {
    "Lightning": ("pytorch_lightning", lightning),
    "Accelerate": ("accelerate", accelerate),
    "ModelOpt": ("modelopt", modelopt),
    "TextBrewer": ("textbrewer", textbrewer),
}


NEITHER = {
    "torchdistill": "needs torchvision, which does not import beside torch for CPUs",
    "timm": "needs torchvision, too",
}


def split(loops):
    """Return our loops, and the others."""
    ours = {name: loop for name, loop in loops.items() if name.startswith("kdlib")}
    return ours, {name: loop for name, loop in loops.items() if name not in ours}


def same_weights(hand, loops):
    """Return what the table says of a part: how far its final weights are from those of the loop by hand."""

    def said(part):
        difference = loops[part].differs(hand)
        assert difference <= 1e-6, f"{part} trained something else: {difference}"
        ours = max(loop.differs(hand) for name, loop in loops.items() if name.startswith("kdlib"))
        assert ours <= 1e-6
        return f"final weights differ by {max(difference, ours):.1g}"

    return said


def test_tiny_network_beside_by_hand_and_beside_other_libraries(compare, keep, tmp_path):
    size = SIZES["tiny"]
    teacher, student, _, batches = made(size)
    loops = {
        "kdlib.Tapped: a hook and the output": Trained(distilled, tapped(teacher), student, batches),
        "kdlib, the networks' own taps": Trained(by_distiller, SameInput(kdlib.freeze(teacher)), student, batches),
        "by hand": Trained(by_hand, teacher, student, batches),
    }
    for name, (module, loop) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            keep(f"tiny step: {name}", what=f"tiny network, {name}", value="not run: it is not installed")
            continue
        run = loop if name != "TextBrewer" else lambda *args: textbrewer(*args, tmp_path)
        loops[name] = Trained(run, teacher, student, batches)
    for name, reason in NEITHER.items():
        keep(f"tiny step: {name}", what=f"tiny network, {name}", value=f"not run: {reason}")
    said = same_weights(loops["by hand"], loops)
    compare("tiny step", "a step, tiny network", *split(loops), rounds=21, checked=said)


def test_spectrogram_network_beside_by_hand(compare):
    network, shape = INPUTS["spectrogram"]
    teacher, student = network(classes=10).eval().requires_grad_(False), network(classes=10)
    batches = [{"x": torch.randn(BATCH, *shape), "y": torch.randint(10, (BATCH,))} for _ in range(1)]
    source = SameInput(kdlib.freeze(copy.deepcopy(teacher)))
    loops = {
        "kdlib": Trained(distilled, source, student, batches, 0),
        "by hand": Trained(by_hand, teacher, student, batches, 0),
    }
    what = "a step, spectrogram network, 8 clips of 10 s"
    compare("spectrogram step", what, *split(loops), rounds=7, checked=same_weights(loops["by hand"], loops))


@pytest.mark.parametrize("name", INPUTS)
def test_stored_targets_beside_the_student_alone(compare, name, tmp_path):
    network, shape = INPUTS[name]
    student = network(classes=10)
    part = kdlib.TensorPart(torch.randn(BATCH, *shape), torch.arange(BATCH) % 10)
    source = SameInput(kdlib.freeze(network(classes=10)))
    build_store(source, part, tmp_path, batch=BATCH)
    index = torch.arange(BATCH)
    batches = [{"x": part.x, "y": index % 10, "index": index, "epoch": torch.zeros_like(index)}]
    loops = {
        "kdlib, stored soft labels": Trained(distilled, Stored(folder=tmp_path), student, marked(batches), 0),
        "student alone, by hand": Trained(alone_by_hand, None, student, batches, 0),
    }
    online = Trained(distilled, source, student, batches, 0)
    online()

    def said(part):
        difference = loops["kdlib, stored soft labels"].differs(online)
        assert difference <= 1e-5
        return f"final weights differ by {difference:.1g} from those with the teacher online"

    compare(f"stored, {name}", f"a step, {name} network, 8 clips of 10 s", *split(loops), rounds=11, checked=said)
