"""
A private LSTM on text
======================

Which language is a name written in? An LSTM reads names of countries, languages and currencies byte by byte, and is
trained so that no single name can be told from it. ``nn.LSTM`` is taken as it is: there is no private variant of it.
"""

# %%
# Data and model
# --------------
#
# Both are those of the training script, ``gallery/training/train.py``. Tokens are bytes: a vocabulary made of the words
# that occur would tell about the private texts before training has begun.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from train_data import load_data
from train_models import make_model

from perexample import check, plan
from perexample.privacy import make_private

torch.manual_seed(0)
data = load_data("names")
x, y = (torch.stack(part) for part in zip(*(data.test[i] for i in range(len(data.test))), strict=True))
for tokens, label in list(zip(x, y, strict=True))[:5]:
    print(f"{data.classes[label]}  {bytes(t - 1 for t in tokens.tolist() if t).decode()}")

model = make_model("lstm", data)
print(plan(model))

# %%
# Are the gradients right?
# ------------------------
#
# Names differ in length; padding is left out of the mean over time. ``check`` compares every parameter, those of the
# LSTM too, with one backward per example in float64.

report = check(model, torch.nn.CrossEntropyLoss(), x[:6], y[:6])
print(report)
assert max(row.error for row in report.rows) < 1e-9

# %%
# Training
# --------

private = make_private(
    model,
    torch.optim.SGD(model.parameters(), lr=4.0),
    data.train,
    target_epsilon=3.0,
    target_delta=1e-4,
    epochs=25,
    batch_size=1000,
    public_size=len(data.train),
    max_norm=1.0,
)
accuracy, steps = [], []
for tokens, labels in private:
    with private:
        F.cross_entropy(model(tokens), labels).backward()
    private.step()
    if private.steps % 6 == 0:
        with torch.no_grad():
            accuracy.append((model(x).argmax(1) == y).float().mean().item())
        steps.append(private.steps)
most = y.bincount().max().item() / len(y)
print(f"test accuracy {accuracy[-1]:.1%} at epsilon {private.epsilon():.2f}; the commonest language is {most:.1%}")
assert private.epsilon() <= 3.0
assert accuracy[-1] > 0.45

# %%
# What is taken for what
# ----------------------

with torch.no_grad():
    predicted = model(x).argmax(1)
confusion = torch.zeros(10, 10)
confusion.index_put_((y, predicted), torch.ones(len(y)), accumulate=True)
confusion /= confusion.sum(1, keepdim=True)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
left.plot(steps, accuracy, color="tab:green")
left.axhline(most, color="gray", linestyle=":", label="commonest language")
left.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
left.legend(frameon=False)
right.imshow(confusion, cmap="Blues", vmin=0, vmax=1)
right.set(xticks=range(10), yticks=range(10), xlabel="taken for", ylabel="language of the name")
right.set_xticklabels(data.classes)
right.set_yticklabels(data.classes)
plt.show()
