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
# # Quantize, compare and push a language model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hfquant/hfquant/blob/main/notebooks/01_language_model.ipynb)
#
# A model of 135 million parameters goes from 32 to 4.2 bits a weight in two ways: rounded as it is loaded, and
# calibrated with GPTQ. Both are compared with full precision, saved, and loaded again.

# %%
# %pip install -q "hfquant[compare]"

# %% [markdown]
# Choose what runs. The defaults fit a Colab machine with a T4; `small` is what the project's tests run.

# %% tags=["parameters"]
model_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "Salesforce/wikitext"
dataset_name = "wikitext-2-raw-v1"
column = "text"
samples, seqlen = 64, 512
push_to = None  # "your-name/SmolLM2-135M-Instruct-w4a16", after huggingface_hub.login()

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfquant
from hfquant import HfQuantConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(model_id)
full = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).to(device).eval()
f"{full.get_memory_footprint() / 1e6:.0f} MB in full precision"

# %% [markdown]
# ## Without data
#
# The preset `w4a16` needs none: each weight is rounded to 4 bits, in groups of 32, while it is read.

# %%
rounded = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=HfQuantConfig("w4a16"), dtype=torch.float32
).to(device)
f"{rounded.get_memory_footprint() / 1e6:.0f} MB"

# %% [markdown]
# ## Calibrated
#
# `w4a16-gptq` reads some text, rotates blocks of each layer's inputs, and solves the layer by GPTQ.

# %%
calibration = {"dataset": dataset, "name": dataset_name, "column": column, "samples": samples, "seqlen": seqlen}
calibrated = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=HfQuantConfig("w4a16-gptq", calibration=calibration), dtype=torch.float32
).to(device)
print(str(calibrated.quant_report).splitlines()[0])
print(*str(calibrated.quant_report).splitlines()[1:6], sep="\n")

# %% [markdown]
# ## How far from full precision?
#
# Perplexity, KL divergence to the full model and how often both rank the same token first, on text that neither was
# calibrated on: Python's own language reference.

# %%
from hfquant.report.gather import Inputs, compared

inputs = Inputs(samples=8, seqlen=min(seqlen, 256))
for name, model in (("rounded", rounded), ("calibrated", calibrated)):
    print(name, *(f"  {figure.name}: {figure}" for figure in compared(full, model, inputs).figures), sep="\n")

# %% [markdown]
# ## It writes

# %%
question = tokenizer("The capital of France is", return_tensors="pt").to(device)
for name, model in (("full", full), ("rounded", rounded), ("calibrated", calibrated)):
    answer = model.generate(**question, max_new_tokens=12, do_sample=False)
    print(f"{name}: {tokenizer.decode(answer[0])}")

# %% [markdown]
# ## Save, load, push
#
# The folder is a plain checkpoint with a model card and the tokenizer; `import hfquant` comes before it is loaded.

# %%
hfquant.save_pretrained(calibrated, "quantized")
again = AutoModelForCausalLM.from_pretrained("quantized", dtype=torch.float32).to(device)
assert torch.equal(again(**question).logits, calibrated(**question).logits)
if push_to:
    hfquant.push_to_hub(calibrated, push_to)
hfquant.__version__
