"""A distiller in a LightningModule."""

import pytorch_lightning as pl
import torch


class Distillation(pl.LightningModule):
    def __init__(self, distiller):
        super().__init__()
        self.distiller = distiller

    def training_step(self, batch):
        losses = self.distiller(batch)
        self.log_dict(losses.terms)
        return losses.total

    def configure_optimizers(self):
        return self.distiller.attach(torch.optim.Adam(self.distiller.parameters()))


def train(distiller, loader, epochs, **settings):
    trainer = pl.Trainer(max_epochs=epochs, **settings)
    trainer.fit(Distillation(distiller), loader)
    return trainer
