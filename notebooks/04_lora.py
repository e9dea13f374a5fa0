# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a LoRA adapter on a quantized model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hfquant/hfquant/blob/main/notebooks/04_lora.ipynb)
#
# The weights stay at 4 bits, and a low-rank adapter in float is trained on top of them. Gradients pass through the
# quantized layers as if rounding were the identity (straight-through). The outputs saved in this notebook come from a
# tiny random model that the project's tests use, so your numbers will differ.

# %%
# %pip install -q hfquant peft

# %% tags=["parameters"]
model_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
texts = ["The quick brown fox jumps over the lazy dog. " * 8, "Pack my box with five dozen liquor jugs. " * 8]
steps, rank = 30, 8

# %%
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfquant
from hfquant import HfQuantConfig

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=HfQuantConfig("w4a16"), dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
model.print_trainable_parameters()

# %%
batches = [tokenizer(text, return_tensors="pt", truncation=True, max_length=128).input_ids for text in texts]
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
losses = []
for step in range(steps):
    ids = batches[step % len(batches)]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"

# %% [markdown]
# ## Save and reload the adapter

# %%
model.eval()
model.save_pretrained("adapter")
from peft import PeftModel

base = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=HfQuantConfig("w4a16"), dtype=torch.float32)
again = PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    assert torch.equal(again(batches[0]).logits, model(batches[0]).logits)
hfquant.__version__
