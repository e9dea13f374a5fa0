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
# # Quantize a language model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hfquant/hfquant/blob/main/notebooks/01_language_model.ipynb)
#
# This notebook quantizes the linear layers of a model of 135 million parameters from 32 to 4.42 bits per weight in two
# ways: rounding the weights as they are loaded, and calibrating with GPTQ. It compares both with full precision, then
# saves the calibrated model, loads it again and, if you wish, pushes it to the Hub.

# %%
# %pip install -q "hfquant[compare]"

# %% [markdown]
# Set the parameters below. The defaults fit a Colab machine with a T4. The outputs saved in this notebook come from a
# tiny random model that the project's tests use, so your numbers will differ.

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
# ## Quantize without data
#
# The preset `w4a16` needs no data. It rounds each weight to 4 bits, in groups of 32, as the checkpoint is read.

# %%
rounded = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=HfQuantConfig("w4a16"), dtype=torch.float32
).to(device)
f"{rounded.get_memory_footprint() / 1e6:.0f} MB"

# %% [markdown]
# ## Calibrate with GPTQ
#
# The preset `w4a16-gptq` needs calibration data, here some text. It rotates each layer's inputs in blocks and quantizes
# the weights with GPTQ. `quant_report` lists the error of each layer.

# %%
calibration = {"dataset": dataset, "name": dataset_name, "column": column, "samples": samples, "seqlen": seqlen}
calibrated = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=HfQuantConfig("w4a16-gptq", calibration=calibration), dtype=torch.float32
).to(device)
print(str(calibrated.quant_report).splitlines()[0])
print(*str(calibrated.quant_report).splitlines()[1:6], sep="\n")

# %% [markdown]
# ## Compare with full precision
#
# `compared` measures perplexity, the KL divergence from the full-precision model, and how often both models rank the
# same token first. The text is Python's own language reference, which neither model was calibrated on.

# %%
from hfquant.report.gather import Inputs, compared

inputs = Inputs(samples=8, seqlen=min(seqlen, 256))
for name, model in (("rounded", rounded), ("calibrated", calibrated)):
    print(name, *(f"  {figure.name}: {figure}" for figure in compared(full, model, inputs).figures), sep="\n")

# %% [markdown]
# ## Generate text

# %%
question = tokenizer("The capital of France is", return_tensors="pt").to(device)
for name, model in (("full", full), ("rounded", rounded), ("calibrated", calibrated)):
    answer = model.generate(**question, max_new_tokens=12, do_sample=False)
    print(f"{name}: {tokenizer.decode(answer[0])}")

# %% [markdown]
# ## Save, load and push to the Hub
#
# The saved folder is an ordinary checkpoint with a model card and the tokenizer. Run `import hfquant` before you load
# it. To upload the model, log in and set `push_to` above.

# %%
hfquant.save_pretrained(calibrated, "quantized")
again = AutoModelForCausalLM.from_pretrained("quantized", dtype=torch.float32).to(device)
assert torch.equal(again(**question).logits, calibrated(**question).logits)
if push_to:
    hfquant.push_to_hub(calibrated, push_to)
hfquant.__version__
