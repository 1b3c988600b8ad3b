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
# # A first look at a folder of runs
# Reads `results` (or the folder named by `PARETUNE_RESULTS`). Open it in Jupyter with jupytext, or run it:
# `jupytext --to ipynb --execute analysis/notebooks/first_look.py -o first_look.ipynb`

# %%
import os

import matplotlib.pyplot as plt

import analysis

runs = analysis.load(os.environ.get("PARETUNE_RESULTS", "results"))
runs.groupby(["task", "model", "status"]).size().unstack(fill_value=0)

# %% [markdown]
# What failed, and why.

# %%
runs.loc[runs.status != "ok", ["task", "method", "seed", "status", "reason"]]

# %% [markdown]
# Means over seeds with the 95 % t interval. Runs that differ in more than the seed are rows of their own.

# %%
table = analysis.summarise(runs)
table[["task", "model", "label", "n", "score", "score_low", "score_high", "trained_params", "memory_peak", "time_step"]]

# %% [markdown]
# The methods that no other method beats in both score and trained parameters, for each task and model.

# %%
fronts = analysis.pareto(table, cost="trained_params", by=["task", "model"])
fronts.loc[fronts.front.fillna(False), ["task", "model", "label", "trained_params", "score"]]

# %%
for _, part in table.groupby(["task", "model"]):
    if part.score.notna().any():
        analysis.plots.pareto(part, cost="trained_params")
        plt.show()
