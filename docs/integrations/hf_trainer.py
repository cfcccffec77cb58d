"""A distiller in the Trainer of Hugging Face transformers."""

import torch
from transformers import Trainer, TrainingArguments


class DistillationTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = model(inputs)
        return (losses.total, losses) if return_outputs else losses.total

    def get_train_dataloader(self):
        return self.train_dataset  # a kdlib.Loader: batches in fit's order


def train(distiller, loader, epochs, folder):
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    arguments = TrainingArguments(folder, num_train_epochs=epochs, max_grad_norm=0, remove_unused_columns=False)
    DistillationTrainer(distiller, arguments, train_dataset=loader, optimizers=(optimizer, constant)).train()
