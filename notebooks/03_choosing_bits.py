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
# # Choose the bits of each layer
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hfquant/hfquant/blob/main/notebooks/03_choosing_bits.ipynb)
#
# Layers differ in how much error 4 bits cause, and in how much of that error reaches the model's output. `search_bits`
# measures both and spends a bit budget where it helps most. The outputs saved in this notebook come from a tiny random
# model that the project's tests use, so your numbers will differ.

# %%
# %pip install -q "hfquant[compare]"

# %% tags=["parameters"]
model_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "Salesforce/wikitext"
dataset_name = "wikitext-2-raw-v1"
column = "text"
samples, seqlen = 32, 512
budget = 5.0  # stored bits per weight, including scales
preset = "w4a16-gptq"

# %%
import torch
from transformers import AutoModelForCausalLM

import hfquant

model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
calibration = {"dataset": dataset, "name": dataset_name, "column": column, "samples": samples, "seqlen": seqlen}

# %% [markdown]
# ## Plan 4 bits for every layer
#
# `plan` shows what the preset would do to each layer, without quantizing anything.

# %%
print(hfquant.plan(model, preset))

# %% [markdown]
# ## Search under a budget
#
# `search_bits` returns an ordinary config: the format of most layers, plus an entry for each layer that differs.

# %%
config = hfquant.search_bits(model, calibration, budget, choices=("int4", "int6", "int8"), base=preset)
kinds = [entry["weight_quant"]["type"] for name, entry in config.items() if name != "default"]
{kind: kinds.count(kind) for kind in sorted(set(kinds))}

# %% [markdown]
# ## Quantize and write a report
#
# The report compares the quantized model with the full-precision one.

# %%
hfquant.quantize(model, calibration, config)
model.save_pretrained("mixed")

# %%
from pathlib import Path

from hfquant.report.gather import Inputs, gather
from hfquant.report.page import write

report = gather(Path("mixed"), model_id, Inputs(samples=4, seqlen=min(seqlen, 256)))
write(report, Path("report.html"))
print(*(f"{figure.name}: {figure}" for figure in report.comparison.figures), sep="\n")
