"""A distiller in a loop of Accelerate."""

import torch
from accelerate import Accelerator


def train(distiller, loader, epochs):
    accelerator = Accelerator()
    # attach first: what prepare returns may be wrapped, and has no attach.
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    model, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            losses = model(batch)
            optimizer.zero_grad()
            accelerator.backward(losses.total)
            optimizer.step()
