"""Lightning."""

import copy

import pytest
import torch

import kdlib

pytorch_lightning = pytest.importorskip(
    "pytorch_lightning", reason="pytorch-lightning is not installed: pip install 'kdlib-asc[integrations]'"
)

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6.6 with torch 2.13


@pytest.fixture
def quiet(tmp_path):
    return {
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def test_lightning_trains_as_fit_does(case, example, quiet):
    example("lightning_module").train(case.distiller, case.loader, case.epochs, **quiet, enable_checkpointing=False)
    assert case.same_as_fit()


def test_a_checkpoint_of_lightning_gives_back_student_projector_and_clock_and_holds_no_teacher(case, example, quiet):
    untrained = copy.deepcopy(case.distiller)
    module = example("lightning_module")
    trainer = module.train(case.distiller, case.loader, case.epochs, **quiet)
    (path,) = quiet["default_root_dir"].rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert sorted(saved) == sorted(f"distiller.{name}" for name in case.expected)
    again = module.Distillation(untrained)
    again.load_state_dict(saved)
    case.distiller = again.distiller
    assert case.same_as_fit()
    assert trainer.callback_metrics.keys() == {"soft", "hint", "hard"}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_lightning_resumes_into_the_weights_of_a_run_in_one_piece(case, example, quiet):
    untrained, module = copy.deepcopy(case.distiller), example("lightning_module")
    module.train(case.distiller, case.loader, case.epochs - 1, **quiet)
    (path,) = quiet["default_root_dir"].rglob("*.ckpt")
    loader = kdlib.Loader(case.loader.dataset, batch=case.batch)
    loader.epoch(case.epochs - 1)
    trainer = pytorch_lightning.Trainer(max_epochs=case.epochs, **quiet, enable_checkpointing=False)
    trainer.fit(module.Distillation(untrained), loader, ckpt_path=path, weights_only=True)
    case.distiller = untrained
    assert case.same_as_fit()
