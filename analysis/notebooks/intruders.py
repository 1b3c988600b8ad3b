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
# # Intruder dimensions: what a method did to the weights
# Reads the spectra of the runs in `results` (or the folder named by `PARETUNE_RESULTS`), made by `spectra=true` or afterwards:
#
#     python -m bench -m method=lora,full_ft task=rte train.lr=1e-4,1e-3 spectra=true
#     python -m analysis spectra results
#
# An intruder is a leading singular vector of a tuned matrix that resembles none of the pretrained ones: every |cosine| is below
# ε. Shuttleworth et al. 2024 (arXiv 2410.21228) found them in LoRA and not in full fine-tuning, and tied them to forgetting.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import analysis
from analysis import spectra_plots, spectra_runs
from analysis.spectra_model import curve, participation

runs = analysis.load(os.environ.get("PARETUNE_RESULTS", "results"))
labels = analysis.summarise(runs).explode("ids").set_index("ids")["label"]
runs["label"] = runs["id"].map(labels.groupby(level=0).first())
runs = runs[(runs["status"] == "ok") & runs["spectra_matrices"].notna()]
print(f"{len(runs)} runs with spectra")

# %% [markdown]
# ## The numbers of each run
# `intruders` counts over the leading vectors of all matrices at ε = 0.5; a method that changes no weight has none and no absence
# of them, so its cell is empty. Compare counts only between runs of one model and the same matrices.

# %%
columns = ["intruders", "intruders_right", "share", "changed", "matrices", "effective_rank", "norm_ratio", "floor"]
names = [f"spectra_{c}" for c in columns if f"spectra_{c}" in runs]
runs.groupby("label")[["score", *names]].mean().rename(columns=lambda c: c.removeprefix("spectra_"))

# %% [markdown]
# ## Does the count depend on ε?
# A verdict that holds at one threshold only is none. The grey part is where a random vector would not count either.

# %%
lines = spectra_runs.curves(runs)
spectra_plots.counts(lines, floor=float(runs["spectra_floor"].max()))
plt.show()

# %% [markdown]
# And on how many leading vectors are looked at (ε = 0.5):

# %%
tables = {}
for run in runs.drop_duplicates("label").to_dict("records"):
    if (path := Path(run["path"]).parent / "spectra.parquet").exists():
        tables[run["label"]] = pd.read_parquet(path)
changed = {name: table for name, table in tables.items() if table["changed"].any()}
pd.DataFrame({name: curve(table, [0.5]).set_index("k")["intruders"] for name, table in changed.items()})

# %% [markdown]
# ## Where they are
# Intruders by layer and kind of matrix, and the share of the squared change that fell there.

# %%
most = max(changed, key=lambda name: runs.loc[runs["label"] == name, "spectra_intruders"].mean())
where = participation(changed[most])
for value in ("intruders", "share"):
    spectra_plots.layers(where, value, title=f"{most}: {value}")
    plt.show()

# %% [markdown]
# ## The matrix with the least similar vector
# Its leading singular values before and after: an intruder of LoRA typically sits near the top.

# %%
table = changed[most]
row = table[table["changed"]].sort_values("cos_left", key=lambda column: column.map(min)).iloc[0]
spectra_plots.singular_values(row)
plt.show()
print(f"{most}, {row['name']}: the lowest |cosine| of a leading vector is {min(row['cos_left']):.3f}")

# %% [markdown]
# ## Are they the price of the score?
# Intruders against score, one mark per run. With few runs this is a picture, not a finding.

# %%
ax = runs.plot.scatter("spectra_intruders", "score", figsize=(5.5, 3.6))
for run in runs.to_dict("records"):
    ax.annotate(run["label"], (run["spectra_intruders"], run["score"]), (4, 3), textcoords="offset points", fontsize=7)
plt.show()
ranked = runs[["spectra_intruders", "score", "trained_params"]].corr("spearman")["spectra_intruders"].round(2)
print(f"Spearman with intruders over {runs['spectra_intruders'].notna().sum()} runs: score {ranked['score']}")
