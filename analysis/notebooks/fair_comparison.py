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
# # A fair comparison of two methods
# Reads `results` (or the folder named by `PARETUNE_RESULTS`); compares the two methods of `PARETUNE_METHODS` (lora,dora). Runs for it:
#
#     python -m bench -m method=lora,dora task=rte,mrpc,cola,stsb seed=0,1,2,3,4 train.lr=3e-4,1e-3,3e-3
#
# Five questions, in this order: was it the same race, who chose the settings, is there a difference on each task, is there
# one over tasks, and what could these runs have shown at all?

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd

import analysis
from analysis import paired, plots_runs, power, ranks, tuning

first, second = os.environ.get("PARETUNE_METHODS", "lora,dora").split(",")
runs = analysis.load(os.environ.get("PARETUNE_RESULTS", "results"))
runs = runs[runs["method"].isin([first, second])]

# %% [markdown]
# ## 1. Was it the same race?
# One data revision, protocol, software and kind of data within each task; anything else is refused below with a sentence.

# %%
facts = ["protocol", "data_revision", "software", "device", "data_standin"]
runs.groupby("task")[facts].nunique(dropna=False)

# %% [markdown]
# The budget: how many settings of each method were tried, with how many seeds, and what failed. An unequal number of trials
# favours the method that had more.

# %%
budget = runs.groupby(["task", "method"]).agg(
    settings=("settings", "nunique"), seeds=("seed", "nunique"), runs=("id", "size")
)
budget["not ok"] = runs[runs["status"] != "ok"].groupby(["task", "method"]).size().reindex(budget.index, fill_value=0)
budget.sort_index()

# %%
trials = budget["settings"].unstack("method")
print(
    "equal budgets"
    if (trials[first] == trials[second]).all()
    else "UNEQUAL budgets: read the curves below at the smaller n"
)

# %% [markdown]
# ## 2. Val chooses the settings
# The best mean over seeds on val; the test split takes no part. What a user gets from n trials:

# %%
means = analysis.summarise(runs)
means["val"] = [row.get(f"metrics_val/{row['metric']}") for row in means.to_dict("records")]
curves = tuning.curve(means.dropna(subset=["val"]))
if curves["n"].max() > 1:
    plots_runs.tuning(curves)
    plt.show()

# %%
chosen = tuning.selected(runs)
gaps = tuning.gap_by_method(tuning.selection_gap(chosen), "val_minus_test")
print("val minus test of the chosen settings: the price of choosing")
gaps[["n", "mean", "low", "high"]]

# %% [markdown]
# ## 3. Each task, on the same rows
# `difference` is the first minus the second, with a paired bootstrap over test rows and seeds; `detectable` is the smallest true
# difference that these rows and seeds would have found four times of five.

# %%
table = power.detectable(paired.compare(chosen, first, second))
table[["task", "metric", "rows", "seeds", "a", "b", "difference", "low", "high", "p_holm", "detectable"]]

# %% [markdown]
# McNemar's test speaks of two trained models, so it is made for each seed.

# %%
paired.by_seed(chosen, first, second)

# %% [markdown]
# ## 4. Over tasks

# %%
scores = ranks.by_task(chosen, [first, second])
over = ranks.wilcoxon(scores, first) if len(scores) > 1 else pd.DataFrame()
least = 2.0 ** (1 - len(scores))
print(
    f"{len(scores)} tasks: no p below {least:.3g} is possible" + (": this test cannot decide" if least > 0.05 else "")
)
over.round(4)

# %% [markdown]
# ## 5. The answer

# %%
apart = table[table["p_holm"] < 0.05]
for row in apart.to_dict("records"):
    better = first if row["difference"] > 0 else second
    print(f"{row['task']}: {better} is better by {abs(row['difference']):.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
rest = table.drop(apart.index)
if len(rest):
    print(
        f"not decided: {', '.join(rest['task'])}; differences below {rest['detectable'].max():.3f} could not have been seen"
    )

# %% [markdown]
# What each costs, next to it: a difference that nobody can see may not be worth a cost that everybody can.

# %%
costs = ["trained_params", "memory_peak", "time_step", "flops_train_step"]
chosen.groupby(["task", "method"])[["score", *costs]].mean()
