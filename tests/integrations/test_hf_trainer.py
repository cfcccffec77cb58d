"""The Trainer of transformers. Not in CI: with its tokenizers it weighs 140 MB."""

import copy

import pytest
import torch

import kdlib

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(50, (20, 7), generator=generator)
    return [
        {"x": {"input_ids": row, "attention_mask": torch.ones_like(row)}, "y": n % 3} for n, row in enumerate(words)
    ]


@pytest.fixture
def of_language(rows):
    """A distiller of two small BERTs without dropout."""

    def bert(layers):
        sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes, **none)
        model = transformers.BertForSequenceClassification(config)
        return kdlib.Tapped(model, logits="logits", hidden="bert.encoder.last_hidden_state")

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kdlib.Distiller(
            bert(1),
            kdlib.SameInput(kdlib.freeze(bert(2))),
            soft=kdlib.SoftLabels.hinton(2.0),
            hidden=kdlib.points.HiddenCosine(tap="hidden"),
        )


def test_the_trainer_trains_as_fit_does(case, example, tmp_path):
    example("hf_trainer").train(case.distiller, case.loader, case.epochs, tmp_path)
    assert case.same_as_fit()


def test_models_of_transformers_train_as_fit_does(of_language, rows, example, tmp_path):
    fitted = copy.deepcopy(of_language)
    kdlib.fit(fitted, rows, epochs=2, batch=8, device="cpu", progress=False)
    example("hf_trainer").train(of_language, kdlib.Loader(rows, batch=8), 2, tmp_path)
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, of_language.state_dict()[name]), name


def test_a_data_set_and_a_collator_do_for_a_loader(of_language, rows, example, tmp_path):
    class Plain(example("hf_trainer").DistillationTrainer):
        get_train_dataloader = transformers.Trainer.get_train_dataloader

    before = copy.deepcopy(of_language.state_dict())
    optimizer = of_language.attach(torch.optim.Adam(of_language.parameters()))
    arguments = transformers.TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=5, remove_unused_columns=False, use_cpu=True
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    Plain(
        of_language,
        arguments,
        train_dataset=rows,
        data_collator=torch.utils.data.default_collate,
        optimizers=(optimizer, constant),
    ).train()
    assert int(of_language.step) == 4
    assert not torch.equal(
        before["student.model.classifier.weight"], of_language.state_dict()["student.model.classifier.weight"]
    )
