"""
LoRA on a causal language model
===============================

A language model is trained on public text. Then small low-rank matrices (LoRA,
`Hu et al. 2021 <https://arxiv.org/abs/2106.09685>`_) are trained privately on text that is not public: only these have
gradients, so that only these are clipped and get noise.
"""

# %%
# A small GPT-2, trained on public text
# -------------------------------------
#
# The texts are names of countries, languages and currencies (bundled with the gallery; tokens are bytes). Those in nine
# languages are the public text. The model is that of ``transformers``, two layers small, and begins at random: nothing
# is downloaded.

import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils.data import TensorDataset
from train_data import load_data
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from perexample.privacy import make_private

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
set_seed(0)
data = load_data("names")
private_class = data.classes.index("tr")
pairs = [data.train[i] for i in range(len(data.train))] + [data.test[i] for i in range(len(data.test))]
names, language = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
public, secret = names[language != private_class], names[language == private_class]
secret, held_out = secret[150:], secret[:150]
print(f"{len(public)} public names, {len(secret)} private ones in Turkish, and {len(held_out)} to test with")

sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 32}
dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=data.vocabulary, bos_token_id=0, eos_token_id=0, **sizes, **dropout))


def losses_of(model, ids):
    """``[N]``: the mean over each name's own tokens, so that the divisor of one name knows nothing of others."""
    ids = F.pad(ids, (1, 0))  # token 0 begins a name, and ends it
    logits = model(input_ids=ids[:, :-1]).logits.transpose(1, 2)
    kept = torch.cumprod(ids[:, 1:-1] != 0, 1)  # what comes before the end
    kept = F.pad(kept, (1, 0), value=1)  # and the end itself
    tokens = F.cross_entropy(logits, ids[:, 1:], reduction="none")
    return (tokens * kept).sum(1) / kept.sum(1)


def held_out_loss(model):
    with torch.no_grad():
        return losses_of(model, held_out).mean().item()


optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(200):
    ids = public[torch.randint(len(public), (64,))]
    optimizer.zero_grad()
    losses_of(model, ids).mean().backward()
    optimizer.step()
before = held_out_loss(model)
print(f"after public training: {before:.3f} nats per token on Turkish names")

# %%
# LoRA, privately
# ---------------
#
# ``peft`` puts its matrices into the model and freezes everything else. ``make_private`` takes the result as it is.

state = {name: value.clone() for name, value in model.state_dict().items()}
config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
model = get_peft_model(model, config)
trained = [p for p in model.parameters() if p.requires_grad]
every = sum(p.numel() for p in model.parameters())
print(f"{sum(p.numel() for p in trained)} of {every} numbers are trained")

private = make_private(
    model,
    torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0),
    TensorDataset(secret),
    target_epsilon=3.0,
    target_delta=1e-4,
    epochs=16,
    batch_size=250,
    public_size=len(secret),
    max_norm=1.0,
)
curve = [before]
for (ids,) in private:
    with private:
        losses_of(model, ids).mean().backward()
    if private.step() and private.steps % 5 == 0:
        curve.append(held_out_loss(model))
after = held_out_loss(model)
print(f"after private LoRA: {after:.3f} at epsilon {private.epsilon():.2f}")
assert private.epsilon() <= 3.0
assert after < before - 0.1
assert all(hasattr(p, "clipped_sum") == p.requires_grad for p in model.parameters())

# %%
# The same without privacy, for comparison.

plain = GPT2LMHeadModel(model.get_base_model().config)
plain.load_state_dict(state)
plain = get_peft_model(plain, config)
optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
plain_curve = [before]
for step in range(1, private.steps + 1):
    ids = secret[torch.rand(len(secret)) < private.sample_rate]
    optimizer.zero_grad()
    losses_of(plain, ids).mean().backward()
    optimizer.step()
    if step % 5 == 0:
        plain_curve.append(held_out_loss(plain))

# %%
# What it learnt
# --------------
#
# Names that the model makes up, before and after: the base is what ``disable_adapter`` leaves.


def made_up(count=6):
    start = torch.zeros(count, 1, dtype=torch.long)
    settings = {"do_sample": True, "top_k": 20, "max_new_tokens": 24, "pad_token_id": 0}
    ids = model.generate(start, attention_mask=torch.ones_like(start), **settings)
    return [bytes(t - 1 for t in row[1:].tolist() if t).decode(errors="replace") for row in ids]


model.eval()
set_seed(1)
with model.disable_adapter():
    print("before:", ", ".join(made_up()))
print("after: ", ", ".join(made_up()))

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
steps = range(0, 5 * len(curve), 5)
axis.axhline(before, color="gray", linestyle=":", label="public training only")
axis.plot(steps, curve, color="C0", label=f"private LoRA, epsilon {private.epsilon():.1f}")
axis.plot(range(0, 5 * len(plain_curve), 5), plain_curve, color="C1", linestyle="--", label="LoRA without privacy")
axis.set(xlabel="step", ylabel="loss on held-out names, nats per token")
axis.legend(frameon=False)
plt.show()
