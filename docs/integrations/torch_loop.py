"""A distiller in a loop of plain torch."""

import torch


def train(distiller, loader, epochs):
    # attach: after each step the optimizer moves the distiller's clock, which schedules and moving teachers read.
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters()))
    distiller.train()
    for _ in range(epochs):
        for batch in loader:
            losses = distiller(batch)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
