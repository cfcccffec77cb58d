"""
Temperature and soft labels
===========================

A soft label is the teacher's whole distribution over the classes. The temperature T divides the logits before the
softmax: at T = 1 a sure teacher says little beside its first choice, at a large T all that is left of a distribution is
the order of the logits. The teacher here is a network trained on 100 handwritten digits.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import kdlib
from kdlib.digits import digits

torch.set_num_threads(1)  # networks this small are slower on two
data = digits(train=100)
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
kdlib.fit(
    kdlib.Distiller(kdlib.Tapped(network, logits=""), hard=kdlib.HardLabels()),
    data.train,
    epochs=60,
    progress=False,
)
teacher = kdlib.freeze(kdlib.Tapped(network, logits=""))

# %%
# Two test images
# ---------------
# The images with the median and with the largest entropy at T = 1, among those that the teacher gets right.

test = data.test.x
labels = torch.as_tensor(data.test.labels)
logits = teacher(test)["logits"]
right = (logits.argmax(1) == labels).nonzero().flatten()
p = logits[right].softmax(1)
entropy = -(p * p.clamp_min(1e-12).log()).sum(1)
order = right[entropy.argsort()]
chosen = [int(order[len(order) // 2]), int(order[-1])]

temperatures = (1.0, 2.0, 5.0, 10.0)
figure, axes = plt.subplots(2, len(temperatures) + 1, figsize=(11, 4.4), layout="constrained")
for row, index in zip(axes, chosen, strict=True):
    row[0].imshow(test[index].reshape(8, 8), cmap="gray_r")
    row[0].set(title=f"test image {index}", xlabel=f"a {labels[index]}", xticks=[], yticks=[])
    for axis, temperature in zip(row[1:], temperatures, strict=True):
        axis.bar(range(10), (logits[index] / temperature).softmax(0))
        axis.set(title=f"T = {temperature:g}", ylim=(0, 1), xticks=range(10))

# %%
# What the student's gradient is made of
# --------------------------------------
# The gradient of soft labels at the student's logits is S (softmax(z_S / S) - softmax(z_T / T)), where S is the
# student's temperature. In the paper's form S = 1, and the teacher alone is softened. In Hinton's form S = T, and the
# factor T² keeps the gradient from vanishing. The figure shows the mean norm of that gradient over the test images for
# a student that knows nothing yet (all logits 0), with the factor and without it.

zeros = torch.zeros_like(logits)
settings = torch.logspace(0, 1.5, 25).tolist()


def norm(point):
    student = zeros.clone().requires_grad_()
    loss = point({"logits": student}, {"logits": logits}, {})
    (gradient,) = torch.autograd.grad(loss, student)
    return (gradient.norm(dim=1) * len(student)).mean().item()  # the point is a mean over the rows


paper = [norm(kdlib.SoftLabels(temperature=T)) for T in settings]
hinton = [norm(kdlib.SoftLabels.hinton(T)) for T in settings]
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(settings, paper, label="paper: teacher alone softened, S = 1")
axis.plot(settings, hinton, label="Hinton: S = T, times T²")
without = [value / T**2 for value, T in zip(hinton, settings, strict=True)]
axis.plot(settings, without, "--", label="the same without T²")
axis.set(xscale="log", yscale="log", xlabel="temperature T", ylabel="gradient norm")
axis.legend()

# %%
# Without the factor Hinton's gradient falls as 1 / T², so that a weight that was right at one temperature is wrong at
# another. With it the gradient tends to a constant, (z_T - mean z_T) / K for a student at 0. In the paper's form
# nothing is rescaled: the target becomes uniform as T grows, and what a student at 0 can learn from it falls as 1 / T.
#
# That a softer label teaches better is not shown here: that is a matter of the data, and to be measured.

plt.show()
