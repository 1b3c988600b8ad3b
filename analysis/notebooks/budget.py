# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # "I have 16 GB and may train 1 % of the parameters: what should I take?"
# Reads `results` (or the folder named by `PARETUNE_RESULTS`). The same question on the command line:
# `python -m analysis recommend results --max-memory 16GB --max-params 1%`

# %%
import os

import matplotlib.pyplot as plt

import analysis
from analysis import compare, front_chance
from analysis.front_table import front_table
from analysis.recommend import candidates, recommend

MEMORY, PARAMETERS = "16GB", "1%"
runs = analysis.load(os.environ.get("PARETUNE_RESULTS", "results"))
runs, note = compare.prepared(runs)
print(note or "one setting per method")

# %% [markdown]
# ## What fits
# A method fits where every seed does. `misses` says why one does not.

# %%
task, model = runs[["task", "model"]].drop_duplicates().sort_values(["task", "model"]).iloc[0]
here = runs[(runs["task"] == task) & (runs["model"] == model)]
fits = candidates(here, MEMORY, PARAMETERS)
fits[["score", "seeds", "trained_params", "total_params", "memory_peak", "misses"]]

# %%
inside = here[here["method"].isin(fits.index[fits["misses"] == ""])]
print(f"{inside['method'].nunique()} of {here['method'].nunique()} methods fit on {task}")

# %% [markdown]
# ## The front inside the budget
# Nothing else is as cheap and as good. `chance` is the share of draws of seeds (and of test rows, where predictions are stored)
# in which the method stays there; `volume` is what the front loses without it.

# %%
table = front_table(inside, ["trained_params"])
table[["method", "trained_params", "score", "front", "chance", "epsilon_front", "volume"]]

# %%
for cost in ("trained_params", "memory_peak"):
    analysis.plots.pareto(analysis.summarise(inside), cost)
    plt.show()

# %% [markdown]
# ## Memory and parameters at once
# Three objectives: few trained parameters, little memory, a high score. More methods are on such a front; it excludes only
# what loses everywhere.

# %%
both = front_table(inside, ["trained_params", "memory_peak"])
both.loc[both["front"], ["method", "trained_params", "memory_peak", "score", "chance"]]

# %% [markdown]
# ## How much score does a smaller budget cost?
# The best mean at each limit. Where the next limit adds less than the noise, the smaller one is enough.

# %%
means = analysis.summarise(inside).sort_values("trained_params")
means["best so far"] = means["score"].cummax()
means[["label", "trained_params", "score", "score_low", "score_high", "best so far"]]

# %% [markdown]
# Methods that are within one point of something no larger can be left out of the choice:

# %%
small = front_chance.epsilon_front(means, {"trained_params": 0, "score": 0.01})
print("enough to know:", ", ".join(small.loc[small["epsilon_front"], "label"]))

# %% [markdown]
# ## The answer, with its evidence

# %%
print(recommend(runs, MEMORY, PARAMETERS))
