"""
Two points in a loop of your own
================================

A wide network teaches a narrow one on 100 handwritten digits, by soft labels and by a hidden layer, in a loop of plain
torch. The test accuracy of each epoch stands beside that of the same narrow network on hard labels alone.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import kdlib
from kdlib.digits import digits
from kdlib.points import FitNet

EPOCHS = 200
torch.set_num_threads(1)  # networks this small are slower on two


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def accuracy(module, part):
    with torch.no_grad():
        return 100 * (module(part.x).argmax(1) == part.labels).float().mean().item()


# %%
# The loop
# --------
# A distiller is a module whose forward returns the losses of a batch. ``prepare`` makes the projector from 16 to 256
# units that the hidden layers need, and comes before the optimizer. ``attach`` has the optimizer move the distiller's
# clock after each step.


def train(distiller, data, seed):
    loader = kdlib.Loader(data.train, batch=25, seed=seed)
    distiller.prepare(next(loader.epoch(kdlib.CLEAN)))
    optimizer = distiller.attach(torch.optim.Adam(distiller.parameters(), lr=2e-3))
    curve, terms = [], []
    for _ in range(EPOCHS):
        for batch in loader:
            losses = distiller(batch)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        curve.append(accuracy(distiller.student.model, data.test))
        terms.append({name: value.item() for name, value in losses.terms.items()})
    return curve, terms


# %%
# Five seeds
# ----------
# The seed draws the 100 training images, the first weights, and the order of the rows. The temperature and the weights
# were written down before the first run and not changed after it.

curves = {"hard labels alone": [], "soft labels and hidden layer": []}
teachers = []
for seed in range(5):
    data = digits(train=100, seed=seed)
    big = network(256, seed)
    alone = kdlib.Distiller(kdlib.Tapped(big, logits=""), hard=kdlib.HardLabels())
    kdlib.fit(alone, data.train, epochs=60, batch=25, seed=seed, progress=False)
    teachers.append(accuracy(big, data.test))

    student = kdlib.Tapped(network(16, seed), logits="")
    curve, _ = train(kdlib.Distiller(student, hard=kdlib.HardLabels()), data, seed)
    curves["hard labels alone"].append(curve)

    distiller = kdlib.Distiller(
        kdlib.Tapped(network(16, seed), logits="", hidden="1"),
        kdlib.SameInput(kdlib.freeze(kdlib.Tapped(big, logits="", hidden="1"))),
        soft=(0.9, kdlib.SoftLabels.hinton(4.0)),
        hint=(0.1, FitNet(tap="hidden")),
        hard=(0.1, kdlib.HardLabels()),
    )
    curve, terms = train(distiller, data, seed)
    curves["soft labels and hidden layer"].append(curve)

# %%
# What came out
# -------------

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for color, (name, runs) in zip(("tab:gray", "tab:blue"), curves.items(), strict=True):
    values = torch.tensor(runs)
    left.plot(values.T, color=color, alpha=0.25, linewidth=1)
    left.plot(values.mean(0), color=color, label=f"{name}: {values[:, -1].mean():.1f} % at the end")
left.axhline(sum(teachers) / len(teachers), color="black", linestyle=":", label="teacher, mean of the seeds")
left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(40, 95))
left.legend(loc="lower right")
for name in terms[0]:
    right.plot([term[name] for term in terms], label=name)
right.set(xlabel="epoch", ylabel="term, unweighted, last batch", yscale="log", title="the last seed's terms")
right.legend()
plt.show()

# %%
# A thin line is one seed, a thick one the mean. The distilled student takes longer and ends level with the one on hard
# labels, within the spread of the seeds: on these data, with these weights, the teacher is of little help. Early
# stopping at epoch 50 would even have called it harmful. To compare methods see the table of all points on the page
# *Points and sources*, which has standard errors, and weights by one rule.
