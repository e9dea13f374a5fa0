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
# # Quantize a diffusion pipeline
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hfquant/hfquant/blob/main/notebooks/02_diffusion_pipeline.ipynb)
#
# This notebook records the inputs of a pipeline's denoiser and quantizes it to 4-bit weights and 8-bit activations. An
# affiner then corrects the remaining error at each denoising step. The outputs saved in this notebook come from
# `pipeline_id = "digits"`, the small pipeline that ships with hfquant, so your images and numbers will differ.

# %%
# %pip install -q "hfquant[compare,demo]"

# %% tags=["parameters"]
pipeline_id = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
calls = [
    {"prompt": "a red bicycle against a brick wall"},
    {"prompt": "a bowl of oranges, watercolour"},
    {"prompt": "a lighthouse at night, long exposure"},
    {"prompt": "portrait of an old fisherman"},
]
steps = 20
preset = "w4a8-gptq"

# %%
import torch
from diffusers import DiffusionPipeline

import hfquant

dtype = torch.float16 if torch.cuda.is_available() else torch.float32
device = "cuda" if torch.cuda.is_available() else "cpu"


def load():
    if pipeline_id == "digits":
        from hfquant.demo import load_digits_pipeline

        return load_digits_pipeline().to(device)
    return DiffusionPipeline.from_pretrained(pipeline_id, torch_dtype=dtype).to(device)


real, pipe = load(), load()

# %% [markdown]
# ## Calibrate and quantize
#
# `quantize_pipeline` runs the pipeline on the given calls, records the denoiser's inputs at timesteps spread over each
# run, and quantizes the denoiser with them as calibration data.

# %%
hfquant.quantize_pipeline(pipe, calls, preset, num_inference_steps=steps)
denoiser = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
print(*str(denoiser.quant_report).splitlines()[:8], sep="\n")

# %% [markdown]
# ## Compare images
#
# Both pipelines start from the same noise, so their images can be compared directly.

# %%
import matplotlib.pyplot as plt

from hfquant.report.images import compare_pipelines

full_calls = [{**call, "num_inference_steps": steps} for call in calls]


def show(found, title):
    figure, axes = plt.subplots(2, len(found.images), figsize=(2 * len(found.images), 4.4), squeeze=False)
    for column, pair in enumerate(found.images):
        for row, image in enumerate(pair):
            axes[row][column].imshow(image.movedim(0, -1).numpy())
            axes[row][column].axis("off")
    figure.suptitle(f"{title}: full precision above, quantized below")
    plt.show()


before = compare_pipelines(real, pipe, full_calls)
print(*(f"{figure.name}: {figure}" for figure in before.figures), sep="\n")
show(before, preset)

# %% [markdown]
# ## Correct the error with an affiner
#
# An affiner corrects the quantized denoiser's prediction with an affine map per timestep, fitted on runs of both
# pipelines. If the maps do not help on runs from other noise, the affiner corrects nothing, as in the saved outputs.

# %%
affiner = hfquant.load_affiner({"stepper": {"max_timestep": steps}}, calls, real, pipe)
affiner.attach(pipe)
after = compare_pipelines(real, pipe, full_calls)
print(*(f"{figure.name}: {figure}" for figure in after.figures), sep="\n")
show(after, f"{preset} with the affiner")

# %% [markdown]
# ## Save and load
#
# Save the affiner in the pipeline's subfolder `affiner`, and `load_pipeline` attaches it again.

# %%
pipe.save_pretrained("quantized")
affiner.save_pretrained("quantized/affiner")
again = hfquant.affiner.load_pipeline(type(pipe), "quantized")
assert again.affiner is not None
